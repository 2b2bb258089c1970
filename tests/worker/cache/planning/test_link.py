"""The link estimator: it learns a link, detects changes, and no sample can mislead or break it."""

from __future__ import annotations

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from attnstore.testing import ManualClock
from attnstore_worker.cache.planning.link import LinkEstimate, LinkEstimator

PAGE_BYTES = 368_640
SAMPLES = st.lists(
    st.tuples(st.integers(-(1 << 60), 1 << 60), st.floats(), st.floats(0, 1e7)),
    max_size=80,
)


class Link:
    """A link of known cost whose transfers an estimator observes."""

    def __init__(self, rtt_ms: float, bytes_per_ms: float) -> None:
        self.clock = ManualClock()
        self.estimator = LinkEstimator(self.clock)
        self.rtt_ms, self.bytes_per_ms = rtt_ms, bytes_per_ms

    def move(self, size_bytes: int, noise: float = 1.0) -> None:
        elapsed_ms = (self.rtt_ms + size_bytes / self.bytes_per_ms) * noise
        self.clock.advance_ms(elapsed_ms)
        self.estimator.observe(size_bytes, elapsed_ms)

    def estimate(self) -> LinkEstimate:
        estimate = self.estimator.estimate()
        assert estimate is not None
        return estimate


@pytest.mark.parametrize("rtt_ms", [0.05, 10.0, 50.0])
@pytest.mark.parametrize("bytes_per_ms", [1_250.0, 125_000.0, 1_250_000.0])
def test_round_trip_and_bandwidth_are_found_in_transfers_of_one_size(rtt_ms: float, bytes_per_ms: float) -> None:
    link = Link(rtt_ms, bytes_per_ms)
    for _ in range(4):
        link.move(0)
        link.move(8 * PAGE_BYTES)
    assert link.estimate().rtt_ms == pytest.approx(rtt_ms)
    assert link.estimate().bytes_per_ms == pytest.approx(bytes_per_ms)
    assert link.estimate().transfer_ms(1 << 30) == pytest.approx(rtt_ms + (1 << 30) / bytes_per_ms)


@pytest.mark.parametrize("seed", range(5))
def test_a_quarter_of_outliers_moves_the_estimate_by_less_than_the_noise(seed: int) -> None:
    draw = random.Random(seed)
    link = Link(1.0, 100_000.0)
    for index in range(40):
        noise = draw.uniform(0.9, 1.1)
        link.move(0, noise)
        link.move(4 * PAGE_BYTES, noise * (20.0 if index % 4 == 1 else 1.0))
    assert link.estimate().bytes_per_ms == pytest.approx(100_000.0, rel=0.12)


def test_without_a_bulk_transfer_there_is_no_estimate() -> None:
    link = Link(1.0, 100_000.0)
    assert link.estimator.estimate() is None
    link.move(0)
    assert link.estimator.estimate() is None


def test_one_sample_is_trusted_less_than_many() -> None:
    link = Link(1.0, 100_000.0)
    link.move(PAGE_BYTES)
    lonely = link.estimate().spread
    for _ in range(10):
        link.move(PAGE_BYTES)
    assert lonely >= 2.0
    assert link.estimate().spread < 1.3


def test_one_lucky_sample_among_slow_ones_changes_nothing() -> None:
    link = Link(1.0, 1_000.0)
    for _ in range(6):
        link.move(PAGE_BYTES)
    before = link.estimate().bytes_per_ms
    link.move(PAGE_BYTES, noise=0.001)
    assert link.estimate().bytes_per_ms == pytest.approx(before)


@pytest.mark.parametrize("factor", [0.01, 100.0])
def test_a_link_that_has_changed_is_known_after_three_transfers(factor: float) -> None:
    link = Link(0.5, 100_000.0)
    for _ in range(30):
        link.move(0)
        link.move(4 * PAGE_BYTES)
    link.bytes_per_ms *= factor
    for _ in range(3):
        link.move(4 * PAGE_BYTES)
    assert link.estimate().bytes_per_ms == pytest.approx(100_000.0 * factor, rel=0.05)


def test_age_makes_uncertain_and_then_unknown() -> None:
    link = Link(1.0, 100_000.0)
    for _ in range(10):
        link.move(PAGE_BYTES)
    fresh = link.estimate()
    link.clock.advance_ms(240_000)
    aged = link.estimate()
    assert aged.bytes_per_ms == pytest.approx(fresh.bytes_per_ms)
    assert aged.spread > 2 * fresh.spread
    link.clock.advance_ms(600_000)
    assert link.estimator.estimate() is None


def test_small_transfers_that_were_fast_do_not_make_a_large_one_look_slower_than_it_was() -> None:
    link = Link(0.5, 0.0)
    for size_bytes, elapsed_ms in ((6_000_000, 1.0), (6_000_000, 2.0), (6_000_000, 6.0), (77_000_000, 250.0)):
        link.clock.advance_ms(elapsed_ms)
        link.estimator.observe(size_bytes, elapsed_ms)
    assert 25 < link.estimate().transfer_ms_high(77_000_000) < 2 * 250


def test_a_failed_link_is_unknown_again() -> None:
    link = Link(1.0, 100_000.0)
    for _ in range(10):
        link.move(PAGE_BYTES)
    link.estimator.forget()
    assert link.estimator.estimate() is None


def test_a_link_that_flaps_has_a_wide_spread() -> None:
    link = Link(0.5, 100_000.0)
    for index in range(40):
        link.bytes_per_ms = 100_000.0 if index % 2 else 5_000.0
        link.move(4 * PAGE_BYTES)
    slow_ms = 0.5 + 4 * PAGE_BYTES / 5_000.0
    assert link.estimate().transfer_ms_high(4 * PAGE_BYTES) >= 0.9 * slow_ms


class JumpingClock:
    """A clock that a test sets to any time, including earlier ones."""

    time_ms = 0.0

    def now_ms(self) -> float:
        return self.time_ms


@given(SAMPLES)
def test_absurd_samples_and_clock_jumps_neither_raise_nor_give_absurd_estimates(samples: list[tuple[int, float, float]]) -> None:
    clock = JumpingClock()
    estimator = LinkEstimator(clock)
    for size_bytes, elapsed_ms, now_ms in samples:
        clock.time_ms = now_ms
        estimator.observe(size_bytes, elapsed_ms)
        estimate = estimator.estimate()
        if estimate is not None:
            assert estimate.rtt_ms >= 0
            assert estimate.bytes_per_ms > 0
            assert estimate.spread >= 1
            assert math.isfinite(estimate.transfer_ms_high(PAGE_BYTES))


@given(st.lists(st.tuples(st.integers(1, 256), st.floats(0.5, 2.0)), min_size=1, max_size=40))
def test_estimates_lie_within_what_was_seen(transfers: list[tuple[int, float]]) -> None:
    link = Link(0.0, 10_000.0)
    for pages, noise in transfers:
        link.move(pages * PAGE_BYTES, noise)
    noises = [noise for _, noise in transfers]
    assert 10_000.0 / max(noises) * 0.99 <= link.estimate().bytes_per_ms <= 10_000.0 / min(noises) * 2.01
