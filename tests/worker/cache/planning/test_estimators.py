"""The estimators of computing: they learn a worker's costs from its steps, whatever other samples they get."""

from __future__ import annotations

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from attnstore_worker.cache.planning.cost_book import CostReport
from attnstore_worker.cache.planning.estimators import DurationEstimator, FactorEstimator, PrefillCost, PrefillEstimator

TRUTH = PrefillCost(chunk_ms=24.0, token_ms=0.5, pair_ms=3.3e-4)


def prompt(estimator: PrefillEstimator, tokens: int, draw: random.Random) -> None:
    for begin in range(0, tokens, 256):
        end = min(begin + 256, tokens)
        estimator.observe(begin, end, TRUTH.chunk(begin, end) * draw.uniform(0.95, 1.05))


@pytest.mark.parametrize("seed", range(5))
def test_prefill_is_predicted_within_noise_also_for_longer_prompts_than_seen(seed: int) -> None:
    draw = random.Random(seed)
    estimator = PrefillEstimator()
    for tokens in (2048, 300, 2000):
        prompt(estimator, tokens, draw)
    cost = estimator.estimate()
    assert cost is not None
    for tokens in (512, 2048, 6000):
        assert cost.span(0, tokens, 256) == pytest.approx(TRUTH.span(0, tokens, 256), rel=0.1)


@pytest.mark.parametrize("seed", range(5))
def test_steps_that_were_disturbed_hardly_move_the_prediction(seed: int) -> None:
    draw = random.Random(seed)
    estimator = PrefillEstimator()
    for _ in range(3):
        prompt(estimator, 2048, draw)
        estimator.observe(512, 768, 10_000.0)
    cost = estimator.estimate()
    assert cost is not None
    assert cost.span(0, 4096, 256) == pytest.approx(TRUTH.span(0, 4096, 256), rel=0.15)


def test_a_span_is_the_sum_of_its_chunks() -> None:
    chunks = [(40, 256), (256, 512), (512, 700)]
    assert TRUTH.span(40, 700, 256) == pytest.approx(sum(TRUTH.chunk(begin, end) for begin, end in chunks))
    assert TRUTH.span(256, 256, 256) == TRUTH.chunk(256, 256) == 0.0


def test_a_machine_that_became_slower_is_noticed() -> None:
    estimator = PrefillEstimator()
    draw = random.Random(1)
    for _ in range(4):
        prompt(estimator, 2048, draw)
    for _ in range(12):
        for begin in range(0, 2048, 256):
            estimator.observe(begin, begin + 256, 3 * TRUTH.chunk(begin, begin + 256))
    cost = estimator.estimate()
    assert cost is not None
    assert cost.span(0, 2048, 256) == pytest.approx(3 * TRUTH.span(0, 2048, 256), rel=0.1)


@given(st.lists(st.tuples(st.integers(-5, 1 << 20), st.integers(-5, 1 << 20), st.floats()), max_size=30))
def test_absurd_steps_never_give_negative_or_endless_costs(steps: list[tuple[int, int, float]]) -> None:
    estimator = PrefillEstimator()
    for begin, end, elapsed_ms in steps:
        estimator.observe(begin, end, elapsed_ms)
    cost = estimator.estimate()
    if cost is not None:
        assert min(cost.chunk_ms, cost.token_ms, cost.pair_ms) >= 0
        assert math.isfinite(cost.span(0, 8192, 256))


@given(st.lists(st.tuples(st.floats(), st.floats()), max_size=30))
def test_a_slowdown_stays_between_one_and_four(ratios: list[tuple[float, float]]) -> None:
    estimator = FactorEstimator(1.1)
    for measured_ms, expected_ms in ratios:
        estimator.observe(measured_ms, expected_ms)
    assert 1.0 <= estimator.estimate() <= 4.0


def test_a_duration_is_the_median_of_what_was_possible() -> None:
    estimator = DurationEstimator()
    assert estimator.estimate() is None
    for elapsed_ms in (math.nan, -1.0, 40.0, 41.0, 900.0, math.inf):
        estimator.observe(elapsed_ms)
    assert estimator.estimate() == 41.0


def test_a_prefill_rate_counts_chunks_tokens_and_pairs() -> None:
    report = CostReport(prefill=PrefillCost(chunk_ms=10.0, token_ms=1.0, pair_ms=0.001))
    assert report.prefill_tokens_per_s(1_024, 256) == pytest.approx(1024e3 / (4 * 10 + 1024 + 1024 * 0.512))
    assert CostReport().prefill_tokens_per_s(1_024, 256) is None
