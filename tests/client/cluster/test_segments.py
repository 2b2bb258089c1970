"""Answers of several nodes become the answer of one store."""

from __future__ import annotations

import itertools

from hypothesis import given, settings
from hypothesis import strategies as st

from attnstore.client.cluster.layer_merge import LayerMerge
from attnstore.client.cluster.segments import leading_hits, runs_of
from attnstore.core.hashing import block_hashes, segment_key
from attnstore.limits import SEGMENT_BLOCKS

ROOT = b"\xff" * 32
CHAIN = block_hashes(ROOT, range(4 * SEGMENT_BLOCKS), 1)


@settings(deadline=None, derandomize=True)
@given(begin=st.integers(0, len(CHAIN)), end=st.integers(0, len(CHAIN)))
def test_runs_are_the_prefix_cut_where_the_segment_changes(begin: int, end: int) -> None:
    prefix = CHAIN[begin:end]
    runs = runs_of([prefix])
    assert [page_hash for run in runs for page_hash in run.hashes] == prefix
    assert all({segment_key(page_hash) for page_hash in run.hashes} == {run.key} for run in runs)
    assert all(left.key != right.key for left, right in itertools.pairwise(runs))


@settings(deadline=None, derandomize=True)
@given(present=st.lists(st.booleans(), min_size=len(CHAIN), max_size=len(CHAIN)), begin=st.integers(0, 200))
def test_hits_are_the_pages_before_the_first_one_that_is_missing(present: list[bool], begin: int) -> None:
    prefixes = [CHAIN, CHAIN[begin:]]
    there = {page_hash for page_hash, is_there in zip(CHAIN, present, strict=True) if is_there}
    runs = runs_of(prefixes)
    for run in runs:
        run.hits = next((index for index, page_hash in enumerate(run.hashes) if page_hash not in there), len(run.hashes))
    expected = [next((index for index, page in enumerate(prefix) if page not in there), len(prefix)) for prefix in prefixes]
    assert leading_hits(2, runs) == tuple(expected)


def test_a_prefix_of_nothing_has_no_hits() -> None:
    assert leading_hits(2, runs_of([[], CHAIN[:1]])) == (0, 0)


def test_a_layer_is_told_of_when_the_last_node_has_sent_it() -> None:
    told: list[tuple[int, int]] = []
    merge = LayerMerge(lambda layer, pages: told.append((layer, pages)), (0, 2), [[0, 2], [1, 3]], 4)
    even, odd = merge.of_group(0), merge.of_group(1)
    even(0, 2)
    even(1, 2)
    assert told == []
    odd(0, 2)
    assert told == [(0, 4)]
    odd(1, 1)  # its second page, the fourth of the read, is missing
    assert told == [(0, 4), (1, 3)]
    merge.finish(3)
    assert told == [(0, 4), (1, 3)]


def test_layers_that_a_node_did_not_send_are_told_of_at_the_end() -> None:
    told: list[tuple[int, int]] = []
    merge = LayerMerge(lambda layer, pages: told.append((layer, pages)), (1, 4), [[0], [1]], 3)
    merge.of_group(0)(1, 1)
    merge.of_group(1)(1, 1)
    merge.finish(2)
    assert told == [(1, 2), (2, 2), (3, 2)]
