"""Operations on many pages are done in bounded slices, and completely in the end."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest

from attnstore.core import matching, pins, room
from attnstore.core.layout import PageLayout
from attnstore.core.matching import SlicedMatch
from attnstore.core.page_table import ArrivingPage, PageTable, Room
from attnstore.types import PageStatus, Space

SLICE = 4
PAGES = 18
PAGE_BYTES = 100
MINE, OTHERS = Space("me", b"m" * 32), Space("others", b"o" * 32)
HASHES = [bytes([number]) * 32 for number in range(PAGES)]

MakeTable = Callable[..., PageTable]
MakeLayout = Callable[[int], PageLayout]


@pytest.fixture(autouse=True)
def _small_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (pins, room):
        monkeypatch.setattr(module, "WORK_PAGES_MAX", SLICE)
    for module in (pins, matching):
        monkeypatch.setattr(module, "MATCH_PAGES_MAX", SLICE)


@pytest.fixture
def table(make_table: MakeTable, layout_of_bytes: MakeLayout) -> PageTable:
    """One extent, full of the pages `HASHES`."""
    table = make_table(PAGES * PAGE_BYTES)
    table.namespaces.register(MINE, layout_of_bytes(PAGE_BYTES))
    table.namespaces.register(OTHERS, layout_of_bytes(PAGE_BYTES))
    for page_hash in HASHES:
        store(table, MINE, page_hash)
    return table


def store(table: PageTable, space: Space, page_hash: bytes) -> None:
    page = table.prepare(space, page_hash, 0, 0.0)
    assert isinstance(page, ArrivingPage)
    table.complete(page, 0.0)


def pinned(table: PageTable) -> int:
    return table.statistics().pages_pinned


def drained(table: PageTable, now_ms: float) -> list[int]:
    """Returns how many pages are pinned after each slice, until nothing is left to do."""
    counts = []
    while True:
        next_ms = table.pins.expire(now_ms)
        table.check()
        counts.append(pinned(table))
        if next_ms is None or next_ms > now_ms:
            return counts


def test_a_released_lease_is_void_at_once_and_its_pages_go_in_slices(table: PageTable) -> None:
    lease_id = table.match(MINE, [HASHES], 100, 0.0).lease_id
    assert lease_id is not None
    assert table.pins.release("me", lease_id, 1.0)
    assert not table.holds(MINE, lease_id, 1.0)
    assert table.pin(MINE, HASHES[0], lease_id, 1.0) is PageStatus.LEASE_EXPIRED
    assert pinned(table) == PAGES - SLICE
    assert drained(table, 1.0) == [10, 6, 2, 0]
    assert table.delete(MINE, HASHES, 1.0) == [PageStatus.OK] * PAGES


def test_leases_that_expire_together_go_in_slices_the_tail_of_a_prefix_first(table: PageTable) -> None:
    for begin in range(0, PAGES, 6):
        table.match(MINE, [HASHES[begin : begin + 6]], 100, 0.0)
    assert drained(table, 100.0) == [14, 10, 6, 2, 0]
    evicted = [next(event.hash for _, event in events_of_a_write(table, number)) for number in range(100, 103)]
    assert evicted == [HASHES[5], HASHES[4], HASHES[3]]


def events_of_a_write(table: PageTable, number: int) -> list[tuple[Space, object]]:
    table.take_events()
    store(table, MINE, bytes([number]) * 32)
    return table.take_events()  # type: ignore[return-value]


def test_many_short_leases_are_ended_in_slices(table: PageTable) -> None:
    for _ in range(3 * SLICE):
        table.match(MINE, [HASHES[:1]], 100, 0.0)
    assert [table.pins.expire(100.0), table.pins.expire(100.0)] == [100.0, 100.0]
    assert table.statistics().leases == SLICE
    drained(table, 100.0)
    assert (table.statistics().leases, pinned(table)) == (0, 0)


def test_after_a_lowered_quota_a_write_evicts_what_it_needs_and_the_rest_is_trimmed_in_slices(table: PageTable) -> None:
    table.quotas.limit({"me": 3 * PAGE_BYTES})
    store(table, MINE, b"n" * 32)
    assert table.statistics().evicted_pages == 1
    left = []
    while table.trim():
        table.check()
        left.append(table.statistics().pages_sealed)
    assert left == [14, 10, 6]
    assert table.statistics().pages_sealed == 3


def test_another_tenants_extent_is_emptied_in_slices(table: PageTable) -> None:
    answers = []
    while (page := table.prepare(OTHERS, HASHES[0], 0, 0.0)) is Room.MAKING:
        table.check()
        answers.append(table.statistics().pages_sealed)
    assert answers == [14, 10, 6, 2]
    assert isinstance(page, ArrivingPage)
    table.complete(page, 0.0)
    table.check()


def test_a_write_waits_for_pages_of_ended_leases_before_it_says_that_there_is_no_space(table: PageTable) -> None:
    lease_id = table.match(MINE, [HASHES], 100, 0.0).lease_id
    assert lease_id is not None
    assert table.prepare(OTHERS, HASHES[0], 0, 99.0) is PageStatus.NO_SPACE
    while (page := table.prepare(OTHERS, HASHES[0], 0, 100.0)) is Room.MAKING:
        table.check()
    assert isinstance(page, ArrivingPage)


GONE = b"?" * 32
ASKED: list[Sequence[Sequence[bytes]]] = [
    [HASHES],
    [HASHES[:7], HASHES[3:12], HASHES],
    [[page_hash] for page_hash in HASHES],
    [[*HASHES[:5], GONE, *HASHES[5:]], HASHES[9:]],
    [[GONE, *HASHES], [], HASHES[:2]],
    [[HASHES[0]] * 11],
    [],
]


@pytest.mark.parametrize("lease_ms", [0, 50])
@pytest.mark.parametrize("prefixes", ASKED)
def test_a_match_in_slices_answers_as_one_at_once(table: PageTable, prefixes: Sequence[Sequence[bytes]], lease_ms: int) -> None:
    at_once = table.match(MINE, prefixes, 0, 0.0)
    before = table.statistics()
    match = SlicedMatch(table, MINE, prefixes, lease_ms)
    while not match.advance(0.0):
        table.check()
    found = match.outcome()
    assert found.hits == at_once.hits
    after = table.statistics()
    assert (after.hit_pages - before.hit_pages, after.missed_pages - before.missed_pages) == (
        before.hit_pages,
        before.missed_pages,
    )
    held = {page_hash for prefix, hits in zip(prefixes, found.hits, strict=True) for page_hash in prefix[:hits]}
    assert (found.lease_id is not None) == bool(held and lease_ms)
    assert pinned(table) == (len(held) if lease_ms else 0)
    assert drained(table, 50.0)[-1] == 0


def test_a_match_in_slices_leaves_the_head_of_a_chain_as_the_most_recent(table: PageTable) -> None:
    match = SlicedMatch(table, MINE, [HASHES[:10]], 0)
    while not match.advance(0.0):
        pass
    order = [next(event.hash for _, event in events_of_a_write(table, number)) for number in range(100, 100 + PAGES)]
    assert order == [*HASHES[10:], *HASHES[9::-1]]


def test_a_lease_that_ends_while_its_match_goes_on_holds_nothing_afterwards(table: PageTable) -> None:
    match = SlicedMatch(table, MINE, [HASHES], 10)
    now_ms = 0.0
    while not match.advance(now_ms):
        now_ms += 20.0
    assert match.outcome().hits == (PAGES,)
    assert drained(table, now_ms)[-1] == 0
