"""Hot segments: which segments become hot, and for how long."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from attnstore.core import heat
from attnstore.core.hashing import block_hashes, segment_key
from attnstore.core.heat import SegmentHeat
from attnstore.limits import HEAT_WINDOW_MS, HOT_SEGMENTS_MAX, SEGMENT_BLOCKS

ROOT = b"\xff" + bytes(31)
CHAIN = block_hashes(ROOT, range(3 * SEGMENT_BLOCKS), 1)
KEYS = [segment_key(CHAIN[index]) for index in range(0, len(CHAIN), SEGMENT_BLOCKS)]


def other(number: int) -> list[bytes]:
    """A chain of one block, in its own segment."""
    return block_hashes(ROOT, [1_000 + number], 1)


@pytest.mark.parametrize("begin", [0, 1, SEGMENT_BLOCKS - 1, SEGMENT_BLOCKS])
@pytest.mark.parametrize("end", [SEGMENT_BLOCKS, 2 * SEGMENT_BLOCKS + 1, 3 * SEGMENT_BLOCKS])
def test_one_use_of_a_run_counts_once_for_each_segment_that_it_touches(begin: int, end: int) -> None:
    counts = SegmentHeat(2)
    run = CHAIN[begin:end]
    counts.used("t", [run, run])
    assert counts.hot(0.0) == frozenset()
    counts.used("t", [[page_hash] for page_hash in run])
    assert counts.hot(1.0) == frozenset()  # the first call began a window
    counts.used("t", [run])
    assert counts.hot(2.0) == set(map(segment_key, run))


def test_what_is_not_used_any_more_cools_down_and_half_of_the_uses_keep_it_hot() -> None:
    counts = SegmentHeat(8)
    counts.hot(0.0)
    for _ in range(8):
        counts.used("t", [CHAIN])
    assert counts.hot(1.0) == set(KEYS)
    assert counts.hot(HEAT_WINDOW_MS) == set(KEYS)
    for _ in range(4):
        counts.used("t", [CHAIN[:1]])
    assert counts.hot(HEAT_WINDOW_MS + 1.0) == set(KEYS)
    assert counts.hot(2.0 * HEAT_WINDOW_MS) == set(KEYS)
    assert counts.hot(2.0 * HEAT_WINDOW_MS + 1.0) == {KEYS[0]}
    counts.hot(3.0 * HEAT_WINDOW_MS)
    assert counts.hot(3.0 * HEAT_WINDOW_MS + 1.0) == frozenset()


def test_the_hottest_are_announced_and_no_more_than_the_limit() -> None:
    counts = SegmentHeat(1)
    counts.hot(0.0)
    for number in range(2 * HOT_SEGMENTS_MAX):
        for _ in range(1 + number % 2):
            counts.used("t", [other(number)])
    assert counts.hot(1.0) == {segment_key(other(number)[0]) for number in range(1, 2 * HOT_SEGMENTS_MAX, 2)}


def test_memory_is_bounded_and_what_is_counted_goes_on_being_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heat, "HEAT_SEGMENTS_MAX", 3)
    counts = SegmentHeat(2)
    counts.hot(0.0)
    for number in [*range(5), *range(5)]:
        counts.used("t", [other(number)])
    assert counts.hot(1.0) == {segment_key(other(number)[0]) for number in range(3)}


def test_a_tenant_that_uses_many_segments_leaves_counts_and_places_to_another(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heat, "HEAT_SEGMENTS_MAX", 40)
    monkeypatch.setattr(heat, "HOT_SEGMENTS_MAX", 8)
    counts = SegmentHeat(2, tenants=2)
    counts.hot(0.0)
    for number in range(40):
        for _ in range(9):
            counts.used("greedy", [other(number)])
    for number in range(100, 102):
        for _ in range(2):
            counts.used("modest", [other(number)])
    hot = counts.hot(1.0)
    assert {segment_key(other(number)[0]) for number in range(100, 102)} <= hot
    assert len(hot) == 5 + 2


def test_with_zero_nothing_is_ever_hot() -> None:
    counts = SegmentHeat(0)
    counts.used("t", [CHAIN])
    assert counts.hot(1.0) == frozenset()


@given(st.lists(st.lists(st.binary(min_size=32, max_size=32), max_size=5), max_size=5))
def test_bytes_that_are_no_block_hashes_do_no_harm(prefixes: list[list[bytes]]) -> None:
    counts = SegmentHeat(1)
    counts.hot(0.0)
    counts.used("t", prefixes)
    assert counts.hot(1.0) <= {segment_key(page_hash) for prefix in prefixes for page_hash in prefix}
