"""The scheduler's half with several groups: a hit is what each group has of what it needs. Against a model of that rule."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from attnstore.core.hashing import Namespace
from attnstore.testing import ManualClock
from attnstore.types import MatchResult
from attnstore_worker.cache.store.base import PageStore
from attnstore_worker.cache.store.remote import RemoteTier
from attnstore_worker.vllm.gate import Gate
from attnstore_worker.vllm.identity import page_hashes
from attnstore_worker.vllm.lookups import StoredGroup, StoredSource
from attnstore_worker.vllm.plan import NO_BLOCK, Pages
from attnstore_worker.vllm.scheduling import SchedulerSide
from tests.worker.vllm.answers import CHUNK_TOKENS, FAST, FOREIGN, GROUP, LAYOUT, ROOT, TOKENS, settled

WHOLE = replace(GROUP, page_blocks=2, page_hashes=2)
WINDOW = replace(GROUP, index=1, window=2 * TOKENS + 1)
STATE = replace(GROUP, index=2, window=2, state=True)
GROUPS = (WHOLE, WINDOW, STATE)
ROOTS = [Namespace(bytes((index + 1,)) * 32) for index in range(len(GROUPS))]
NAMES = [page_hashes(root, FOREIGN[group.page_hashes - 1 :: group.page_hashes]) for group, root in zip(GROUPS, ROOTS, strict=True)]
UNIT = 2 * TOKENS
PROMPT = 10 * TOKENS


class Stored:
    """A store that has these pages of each group."""

    def __init__(self, *pages: set[int]) -> None:
        self.names = [{names[page] for page in own} for names, own in zip(NAMES, pages, strict=True)]
        self.asked: list[int] = []

    def register_layout(self, *_: Any, **__: Any) -> None:
        """Knows every namespace."""

    def match(self, space: bytes, prefixes: Sequence[Sequence[bytes]], /, **_: Any) -> MatchResult:
        have = self.names[ROOTS.index(Namespace(space))]
        self.asked.append(sum(map(len, prefixes)))
        return MatchResult(tuple(_leading(prefix, have) for prefix in prefixes), None)


def _leading(prefix: Sequence[bytes], have: set[Any]) -> int:
    return next((index for index, name in enumerate(prefix) if name not in have), len(prefix))


def side_of(store: Stored) -> SchedulerSide:
    clock = ManualClock()
    gate = Gate(clock, load_ms_max=5_000)
    groups = [
        StoredGroup(group, root, RemoteTier(cast("PageStore", store), root, LAYOUT, deadline_ms=1_000, clock=clock))
        for group, root in zip(GROUPS, ROOTS, strict=True)
    ]
    side = SchedulerSide([StoredSource(groups)], gate, clock, lookup_ms_max=100, chunk_tokens=CHUNK_TOKENS)
    side.learn(FAST)
    return side


@pytest.fixture
def side() -> Iterator[SchedulerSide]:
    side = side_of(Stored(set(range(5)), set(range(10)), set(range(10))))
    yield side
    side.close()


def blocks_at(first: int, null_before: int = 0) -> list[int]:
    """vLLM's numbers of a request's ten blocks; those that a group has given up are null."""
    return [0] * null_before + list(range(first + null_before, first + 10))


def parts_of(pages: Sequence[Pages]) -> dict[int, tuple[list[bytes], list[int]]]:
    return {each.group: (list(each.names), list(each.block_ids)) for each in pages}


pages_of = st.sets(st.integers(0, 9))


@settings(max_examples=150, deadline=None)
@given(pages_of, pages_of, pages_of, st.integers(0, 4))
def test_a_hit_ends_at_the_last_place_where_every_group_has_what_it_needs(
    whole: set[int], window: set[int], states: set[int], local: int
) -> None:
    store = Stored({page for page in whole if page < 5}, window, states)
    side = side_of(store)
    computed = local * UNIT
    expected = max(
        (
            end
            for end in range(UNIT, PROMPT, UNIT)
            if all(page in whole for page in range(end // UNIT))
            and all(page in window for page in range(max(0, end // TOKENS - 2), end // TOKENS))
            and end // TOKENS - 1 in states
        ),
        default=0,
    )
    assert settled(side, "a", PROMPT, computed) == max(0, expected - computed)
    side.close()


def test_only_what_each_group_needs_is_loaded(side: SchedulerSide) -> None:
    assert settled(side, "a", PROMPT) == 8 * TOKENS, "the last token is computed, and a page has two blocks"
    side.allocated("a", [blocks_at(20), blocks_at(40, 6), blocks_at(60, 7)], 8 * TOKENS)
    (load,) = side.step([], ()).loads
    assert parts_of(load.parts) == {
        0: (NAMES[0][:4], list(range(20, 28))),
        1: (NAMES[1][6:8], [46, 47]),
        2: (NAMES[2][7:8], [67]),
    }


def test_blocks_that_vllm_has_are_left_alone(side: SchedulerSide) -> None:
    """Its own hit ends inside a page of the first group, and inside the window of the second."""
    assert settled(side, "a", PROMPT, 7 * TOKENS) == TOKENS
    side.allocated("a", [blocks_at(20), blocks_at(40, 5), blocks_at(60, 6)], TOKENS)
    (load,) = side.step([], ()).loads
    assert parts_of(load.parts) == {
        0: (NAMES[0][3:4], [NO_BLOCK, 27]),
        1: (NAMES[1][7:8], [47]),
        2: (NAMES[2][7:8], [67]),
    }


def test_each_group_saves_what_a_step_completes_and_nothing_that_it_gave_up() -> None:
    side = side_of(Stored(set(), set(), set()))
    assert settled(side, "a", PROMPT) == 0
    side.allocated("a", [blocks_at(20)] * 3, 0)
    # vLLM ends steps of such a model where a block ends; the state inside a step has no block.
    saves = side.scheduled("a", [blocks_at(20)[:3], blocks_at(40)[:3], [0, 0, 62]], tokens_after=3 * TOKENS, restarted=True)
    assert parts_of(saves) == {
        0: (NAMES[0][:1], [20, 21]),
        1: (NAMES[1][:3], [40, 41, 42]),
        2: (NAMES[2][2:3], [62]),
    }
    saves = side.scheduled("a", [[23], [43], [63]], tokens_after=4 * TOKENS - 5, restarted=False)
    assert parts_of(saves) == {}, "no block is complete"
    saves = side.scheduled("a", None, tokens_after=4 * TOKENS, restarted=False)
    assert parts_of(saves) == {0: (NAMES[0][1:2], [22, 23]), 1: (NAMES[1][3:4], [43]), 2: (NAMES[2][3:4], [63])}
    saves = side.scheduled("a", [[24], [44], [64]], tokens_after=5 * TOKENS + 1, restarted=False)
    assert parts_of(saves) == {1: (NAMES[1][4:5], [44])}, "the state is that of one token more"
    side.close()


def test_a_request_that_vllm_had_in_part_saves_the_blocks_that_are_left_of_a_window() -> None:
    side = side_of(Stored(set(), set(), set()))
    assert settled(side, "a", PROMPT) == 0
    ids = [blocks_at(20)[:7], blocks_at(40, 4)[:7], [*[0] * 5, 65, 66]]
    saves = side.scheduled("a", ids, tokens_after=7 * TOKENS, restarted=True)
    assert parts_of(saves) == {
        0: (NAMES[0][:3], list(range(20, 26))),
        1: (NAMES[1][4:7], [44, 45, 46]),
        2: (NAMES[2][6:7], [66]),
    }
    side.close()


def test_a_load_that_failed_is_computed_and_saved_whole(side: SchedulerSide) -> None:
    assert settled(side, "a", PROMPT) == 8 * TOKENS
    side.allocated("a", [blocks_at(20), blocks_at(40, 6), blocks_at(60, 7)], 8 * TOKENS)
    side.failed_requests(["a", "one that has ended"])
    assert side.hit_tokens("a", FOREIGN, PROMPT, 0) == 0, "vLLM took its blocks back and asks as for a new request"
    saves = side.scheduled("a", [blocks_at(20), blocks_at(40), blocks_at(60)], tokens_after=8 * TOKENS, restarted=True)
    assert parts_of(saves)[0] == (NAMES[0][:4], list(range(20, 28)))
    assert parts_of(saves)[1][0][-2:] == NAMES[1][6:8]
    assert parts_of(saves)[2] == (NAMES[2][7:8], [67])


def test_a_hit_that_the_link_cannot_bring_whole_ends_where_every_group_can_go_on() -> None:
    """The window's pages before the last ones are gone, so there is no shorter hit."""
    store = Stored(set(range(5)), {6, 7}, {7})
    side = side_of(store)
    assert settled(side, "a", PROMPT) == 8 * TOKENS
    side.close()
    store = Stored(set(range(5)), {2, 3, 6}, {3, 7})
    side = side_of(store)
    assert settled(side, "b", PROMPT) == 4 * TOKENS
    side.close()


def test_a_store_that_has_nothing_is_not_asked_for_windows() -> None:
    store = Stored(set(), set(range(10)), set(range(10)))
    side = side_of(store)
    assert settled(side, "a", PROMPT) == 0
    assert store.asked == [4]
    side.close()


def test_histories_never_name_a_null_block_nor_one_page_twice() -> None:
    rng = random.Random(7)
    for request in map(str, range(20)):
        side = side_of(Stored(set(), set(), set()))
        settled(side, request, PROMPT)
        tokens, ids = 0, [blocks_at(20), blocks_at(40), blocks_at(60)]
        seen: list[bytes] = []
        while tokens < PROMPT:
            tokens = min(PROMPT, tokens + rng.choice((1, 5, TOKENS, 3 * TOKENS)))
            for pages in side.scheduled(request, ids, tokens_after=tokens, restarted=True):
                assert 0 not in pages.block_ids
                seen += pages.names
        assert seen, "something was saved"
        assert len(seen) == len(set(seen))
        side.close()


OTHER_ROOT = Namespace(b"o" * 32)
OTHER = replace(GROUP, page_blocks=2, page_hashes=2)
"""The pages of an engine of another tensor-parallel size, of two blocks."""
OTHER_NAMES = page_hashes(OTHER_ROOT, FOREIGN[1::2])


class TwoSizes:
    """A store with the first `own` pages of an engine, and the first `other` of one of another size."""

    def __init__(self, own: int, other: int) -> None:
        self.pages = {ROOT: own, OTHER_ROOT: other}
        self.asked: list[bytes] = []

    def register_layout(self, *_: Any, **__: Any) -> None:
        """Knows every namespace."""

    def match(self, space: bytes, prefixes: Sequence[Sequence[bytes]], /, **_: Any) -> MatchResult:
        self.asked.append(space)
        return MatchResult(tuple(min(self.pages[Namespace(space)], len(prefix)) for prefix in prefixes), None)


def of_two_sizes(store: TwoSizes) -> SchedulerSide:
    clock = ManualClock()
    stored = [
        StoredSource(
            [StoredGroup(group, root, RemoteTier(cast("PageStore", store), root, LAYOUT, deadline_ms=1_000, clock=clock))], parts
        )
        for group, root, parts in ((GROUP, ROOT, 1), (OTHER, OTHER_ROOT, 2))
    ]
    side = SchedulerSide(stored, Gate(clock, load_ms_max=5_000), clock, lookup_ms_max=100, chunk_tokens=CHUNK_TOKENS)
    side.learn(FAST)
    return side


def test_pages_of_another_size_are_not_asked_for_where_the_engines_own_are_there() -> None:
    store = TwoSizes(9, 4)
    side = of_two_sizes(store)
    assert settled(side, "a", PROMPT) == 9 * TOKENS
    assert store.asked == [ROOT]
    side.close()


@pytest.mark.parametrize(
    ("own", "other", "tokens", "source"), [(0, 4, 8, 1), (3, 4, 8, 1), (8, 4, 8, 0), (5, 2, 5, 0), (0, 0, 0, 0)]
)
def test_the_longest_hit_is_claimed_and_the_engines_own_if_it_is_as_long(own: int, other: int, tokens: int, source: int) -> None:
    store = TwoSizes(own, other)
    side = of_two_sizes(store)
    assert settled(side, "a", PROMPT) == tokens * TOKENS
    assert store.asked == [ROOT, OTHER_ROOT]
    side.allocated("a", [blocks_at(20)], tokens * TOKENS)
    loads = side.step([], ()).loads
    assert [(load.source, load.parts[0].names) for load in loads] == [
        (source, OTHER_NAMES[: tokens // 2] if source else page_hashes(ROOT, FOREIGN)[:tokens])
    ] * bool(tokens)
    side.close()


def test_what_was_loaded_from_another_size_and_failed_is_saved_under_the_engines_own_names() -> None:
    side = of_two_sizes(TwoSizes(0, 4))
    assert settled(side, "a", PROMPT, TOKENS) == 7 * TOKENS
    side.allocated("a", [blocks_at(20)], 7 * TOKENS)
    (load,) = side.step([], ()).loads
    assert (load.parts[0].names, list(load.parts[0].block_ids)) == (OTHER_NAMES[:4], [NO_BLOCK, *range(21, 28)])
    side.failed({24, 25, 26, 27})
    saves = side.scheduled("a", [blocks_at(20)], tokens_after=9 * TOKENS, restarted=True)
    assert parts_of(saves) == {0: (page_hashes(ROOT, FOREIGN)[4:9], list(range(24, 29)))}
    side.close()
