"""The page table claim by claim: life cycle, look-ups, eviction, classes and refusals."""

from __future__ import annotations

import pytest

from attnstore.core.eviction import Item, LeastRecentlyUsed
from attnstore.core.page_table import PageTable
from attnstore.types import PageEventKind, PageStatus
from tests.core.pages import (
    OTHER,
    PAGE_BYTES,
    SPACE,
    STRANGERS,
    MakeLayout,
    MakeTable,
    all_spaces,
    page_hash,
    pin,
    prepare,
    present,
    store,
)


def test_a_page_is_found_only_once_it_is_complete(table: PageTable) -> None:
    page = prepare(table, 1)
    assert table.match(SPACE, [[page_hash(1)]], 0, 0.0).hits == (0,)
    assert table.pin(SPACE, page_hash(1), None, 0.0) is PageStatus.MISSING
    table.complete(page, 0.0)
    assert table.match(SPACE, [[page_hash(1)]], 0, 0.0).hits == (1,)
    assert pin(table, 1).checksum == 1


def test_an_aborted_page_leaves_nothing_behind(table: PageTable) -> None:
    table.abort(prepare(table, 1))
    table.check()
    assert table.statistics().used_bytes == 0
    assert table.take_events() == []
    store(table, 1)


@pytest.mark.parametrize("finish", ["complete", "abort"])
def test_finishing_a_page_twice_is_caught(table: PageTable, finish: str) -> None:
    page = prepare(table, 1)
    table.complete(page, 0.0) if finish == "complete" else table.abort(page)
    with pytest.raises(AssertionError, match="cannot abort"):
        table.abort(page)
    with pytest.raises(AssertionError, match="cannot complete"):
        table.complete(page, 0.0)


def test_unpinning_more_often_than_pinning_is_caught(table: PageTable) -> None:
    store(table, 1)
    page = pin(table, 1)
    table.unpin(page)
    with pytest.raises(AssertionError, match="unpinned more often"):
        table.unpin(page)


def test_a_second_writer_of_a_page_is_told_so(table: PageTable) -> None:
    page = prepare(table, 1)
    assert table.prepare(SPACE, page_hash(1), 1, 0.0) is PageStatus.ARRIVING
    table.complete(page, 0.0)
    assert table.prepare(SPACE, page_hash(1), 1, 0.0) is PageStatus.ALREADY_PRESENT
    assert table.statistics().stored_pages == 1


def test_a_match_counts_leading_pages_of_each_prefix(table: PageTable) -> None:
    for number in (1, 2, 4):
        store(table, number)
    prefixes = [[page_hash(number) for number in prefix] for prefix in ([1, 2, 3, 4], [4], [], [9, 1], [2, 1])]
    assert table.match(SPACE, prefixes, 0, 0.0).hits == (2, 1, 0, 0, 2)
    statistics = table.statistics()
    assert (statistics.hit_pages, statistics.missed_pages) == (5, 4)


def test_only_a_match_counts_as_a_look_up(table: PageTable) -> None:
    store(table, 1)
    table.match(SPACE, [[page_hash(1), page_hash(2)]], 0, 0.0)
    table.unpin(pin(table, 1))
    assert table.pin(SPACE, page_hash(2), None, 0.0) is PageStatus.MISSING
    table.use(SPACE, [page_hash(1), page_hash(2)], None, 0.0)
    table.use(SPACE, [page_hash(1)], bytes(16), 0.0)
    statistics = table.statistics()
    assert (statistics.hit_pages, statistics.missed_pages) == (1, 1)


def test_a_hash_stored_under_another_namespace_is_a_miss(make_table: MakeTable, layout_of_bytes: MakeLayout) -> None:
    table = make_table(4 * PAGE_BYTES)
    for namespace in (SPACE, OTHER):
        table.namespaces.register(namespace, layout_of_bytes(PAGE_BYTES))
    store(table, 1)
    assert table.match(OTHER, [[page_hash(1)]], 100, 0.0).hits == (0,)
    assert table.pin(OTHER, page_hash(1), None, 0.0) is PageStatus.MISSING
    assert table.delete(OTHER, [page_hash(1)], 0.0) == [PageStatus.MISSING]
    store(table, 1, OTHER)
    assert table.statistics().pages_sealed == 2


def test_the_least_recently_used_page_is_evicted_first(table: PageTable) -> None:
    for number in range(4):
        store(table, number)
    table.match(SPACE, [[page_hash(0)]], 0, 0.0)
    table.unpin(pin(table, 1))
    table.prepare(SPACE, page_hash(2), 2, 0.0)
    for number in range(4, 6):
        store(table, number)
    assert present(table, range(6)) == [1, 2, 4, 5]
    assert table.statistics().evicted_pages == 2


def test_a_chain_loses_its_tail_before_its_head(table: PageTable) -> None:
    for number in range(4):
        store(table, number)
    table.match(SPACE, [[page_hash(number) for number in range(4)]], 0, 0.0)
    store(table, 4)
    store(table, 5)
    assert present(table, range(6)) == [0, 1, 4, 5]


def test_a_chain_whose_lease_ended_loses_its_tail_before_its_head(table: PageTable) -> None:
    for number in range(4):
        store(table, number)
    table.match(SPACE, [[page_hash(number) for number in range(4)]], 10, 0.0)
    table.pins.expire(10.0)
    store(table, 4)
    assert present(table, range(5)) == [0, 1, 2, 4]


def test_pinned_and_arriving_pages_are_never_evicted(table: PageTable) -> None:
    store(table, 0)
    store(table, 1)
    reader = pin(table, 0)
    table.match(SPACE, [[page_hash(1)]], 10, 0.0)
    arriving = [prepare(table, 2), prepare(table, 3)]
    assert table.prepare(SPACE, page_hash(4), 4, 0.0) is PageStatus.NO_SPACE
    table.check()
    assert table.match(SPACE, [[page_hash(0)], [page_hash(1)]], 0, 0.0).hits == (1, 1)
    table.unpin(reader)
    store(table, 4)
    assert present(table, range(5)) == [1, 4]
    for page in arriving:
        table.abort(page)
    table.check()


def test_a_store_with_everything_leased_has_no_space_until_the_leases_expire(table: PageTable) -> None:
    for number in range(4):
        store(table, number)
    table.match(SPACE, [[page_hash(number) for number in range(4)]], 50, 0.0)
    assert table.prepare(SPACE, page_hash(4), 4, 49.9) is PageStatus.NO_SPACE
    assert table.statistics().evicted_pages == 0
    store(table, 4, now_ms=50.0)


def test_a_recycled_slot_has_a_new_generation(make_table: MakeTable, layout_of_bytes: MakeLayout) -> None:
    table = make_table(PAGE_BYTES)
    table.namespaces.register(SPACE, layout_of_bytes(PAGE_BYTES))
    slots = [store(table, number) for number in range(3)]
    assert len({(slot.extent, slot.offset_bytes) for slot in slots}) == 1
    assert len({slot.generation for slot in slots}) == 3


def test_a_deleted_page_is_gone_and_its_slot_is_free(table: PageTable) -> None:
    store(table, 1)
    reader = pin(table, 1)
    assert table.delete(SPACE, [page_hash(1)], 0.0) == [PageStatus.PINNED]
    table.unpin(reader)
    assert table.delete(SPACE, [page_hash(1)], 0.0) == [PageStatus.OK]
    assert table.delete(SPACE, [page_hash(1)], 0.0) == [PageStatus.MISSING]
    assert table.statistics().used_bytes == 0
    table.check()


def test_an_arriving_page_cannot_be_deleted(table: PageTable) -> None:
    page = prepare(table, 1)
    assert table.delete(SPACE, [page_hash(1)], 0.0) == [PageStatus.MISSING]
    table.complete(page, 0.0)
    table.check()


def test_a_page_that_is_found_corrupt_is_gone_and_its_slot_is_free(table: PageTable) -> None:
    for number in range(4):
        store(table, number)
    page = table.peek(SPACE, page_hash(1))
    assert page is not None
    assert page.verified_ms < 0, "it was not hashed since it was sealed"
    assert not table.verified(page, 7.0, intact=True)
    assert page.verified_ms == 7.0
    assert present(table, range(4)) == [0, 1, 2, 3]
    assert table.verified(page, 8.0, intact=False)
    table.check()
    assert table.peek(SPACE, page_hash(1)) is None
    assert table.match(SPACE, [[page_hash(0), page_hash(1)]], 0, 0.0).hits == (1,)
    assert [(event.kind, event.hash) for _, event in table.take_events()] == [(PageEventKind.EVICTED, page_hash(1))]
    now = table.statistics()
    assert (now.verified_pages, now.corrupt_pages, now.evicted_pages, now.pages_sealed) == (2, 1, 0, 3)
    assert now.used_bytes == 3 * PAGE_BYTES
    assert not table.verified(page, 9.0, intact=False), "it was gone before"
    assert table.statistics().corrupt_pages == 1
    store(table, 1)
    assert table.statistics().pages_sealed == 4


def test_a_corrupt_page_keeps_its_slot_for_those_who_hold_it_while_its_hash_is_written_anew(table: PageTable) -> None:
    slot = store(table, 1)
    lease_id = table.match(SPACE, [[page_hash(1)]], 100, 0.0).lease_id
    assert lease_id is not None
    reader = pin(table, 1)
    assert table.verified(reader, 0.0, intact=False)
    table.check()
    assert table.pin(SPACE, page_hash(1), None, 0.0) is PageStatus.MISSING
    assert table.delete(SPACE, [page_hash(1)], 0.0) == [PageStatus.MISSING]
    again = store(table, 1)
    assert again.offset_bytes != slot.offset_bytes, "somebody still looks at the old bytes"
    table.unpin(reader)
    table.check()
    assert table.statistics().used_bytes == 2 * PAGE_BYTES
    assert table.pins.release("a", lease_id, 0.0)
    table.check()
    assert table.statistics().used_bytes == PAGE_BYTES
    assert table.statistics().pages_pinned == 0
    assert pin(table, 1).slot is again


def test_a_slot_that_only_an_expired_lease_keeps_for_a_corrupt_page_is_room(
    make_table: MakeTable, layout_of_bytes: MakeLayout
) -> None:
    table = make_table(PAGE_BYTES)
    table.namespaces.register(SPACE, layout_of_bytes(PAGE_BYTES))
    store(table, 1)
    table.match(SPACE, [[page_hash(1)]], 100, 0.0)
    page = table.peek(SPACE, page_hash(1))
    assert page is not None
    assert table.verified(page, 0.0, intact=False)
    assert table.prepare(SPACE, page_hash(2), 2, 99.0) is PageStatus.NO_SPACE
    store(table, 2, now_ms=100.0)


def test_looking_at_a_page_to_verify_it_is_no_use_of_it(make_table: MakeTable, layout_of_bytes: MakeLayout) -> None:
    table = make_table(2 * PAGE_BYTES)
    table.namespaces.register(SPACE, layout_of_bytes(PAGE_BYTES))
    store(table, 1)
    store(table, 2)
    page = table.peek(SPACE, page_hash(1))
    assert page is not None
    before = table.statistics()
    assert (before.hit_pages, before.missed_pages, before.pages_pinned) == (0, 0, 0)
    table.verified(page, 0.0, intact=True)
    store(table, 3)
    assert present(table, range(4)) == [2, 3], "the one that was only looked at went first"
    assert not table.verified(page, 0.0, intact=False), "its slot is another page's by now"
    assert present(table, range(4)) == []


def test_events_tell_what_was_sealed_evicted_and_deleted(make_table: MakeTable, layout_of_bytes: MakeLayout) -> None:
    table = make_table(PAGE_BYTES)
    table.namespaces.register(SPACE, layout_of_bytes(PAGE_BYTES))
    store(table, 1)
    store(table, 2)
    table.delete(SPACE, [page_hash(2)], 0.0)
    events = [(namespace, event.kind, event.hash, event.sequence) for namespace, event in table.take_events()]
    assert events == [
        (SPACE, PageEventKind.SEALED, page_hash(1), 1),
        (SPACE, PageEventKind.EVICTED, page_hash(1), 2),
        (SPACE, PageEventKind.SEALED, page_hash(2), 3),
        (SPACE, PageEventKind.DELETED, page_hash(2), 4),
    ]


def test_an_extent_never_holds_pages_of_two_tenants(shared_table: PageTable) -> None:
    mine = {store(shared_table, 0).extent}
    theirs = {store(shared_table, number, STRANGERS).extent for number in range(2)}
    assert mine.isdisjoint(theirs)


def test_a_class_without_slots_takes_the_coldest_idle_extent_of_another(shared_table: PageTable) -> None:
    for number in range(4):
        store(shared_table, number)
    shared_table.match(SPACE, [[page_hash(0)]], 0, 0.0)
    slot = store(shared_table, 9, STRANGERS)
    assert slot.tenancy == 2
    assert present(shared_table, range(4)) == [0, 1]


def test_an_extent_with_a_busy_page_is_not_taken(shared_table: PageTable) -> None:
    for number in range(4):
        store(shared_table, number)
    readers = [pin(shared_table, 0), pin(shared_table, 2)]
    assert shared_table.prepare(STRANGERS, page_hash(9), 9, 0.0) is PageStatus.NO_SPACE
    assert present(shared_table, range(4)) == [0, 1, 2, 3]
    shared_table.unpin(readers[0])
    store(shared_table, 9, STRANGERS)
    assert present(shared_table, range(4)) == []


class MostRecentlyUsed(LeastRecentlyUsed[Item]):
    """Evicts the most recently used page, to show that the table follows its policy."""

    def victim(self) -> Item | None:
        return next(reversed(self._order), None)


def test_the_policy_decides_within_a_class_even_where_an_older_extent_is_idle(layout_of_bytes: MakeLayout) -> None:
    table = PageTable(
        capacity_bytes=4 * PAGE_BYTES, extent_bytes=2 * PAGE_BYTES, policy=MostRecentlyUsed, new_lease_id=lambda: bytes(16)
    )
    table.namespaces.register(SPACE, layout_of_bytes(PAGE_BYTES))
    for number in range(6):
        store(table, number)
    assert present(table, range(6)) == [0, 1, 2, 5]


def test_memory_flows_from_a_tenant_that_rests_to_one_that_works(shared_table: PageTable) -> None:
    for number in range(4):
        store(shared_table, number)
    for number in range(10, 16):
        store(shared_table, number, STRANGERS)
    sealed = {statistics.space.tenant: statistics.pages_sealed for statistics in all_spaces(shared_table)}
    assert sealed == {"a": 0, "b": 4}


def test_a_tenant_in_use_is_not_robbed_by_one_that_only_writes(shared_table: PageTable) -> None:
    store(shared_table, 0)
    store(shared_table, 1)
    for number in range(10, 20):
        store(shared_table, number, STRANGERS)
        shared_table.match(SPACE, [[page_hash(0), page_hash(1)]], 0, 0.0)
    sealed = {statistics.space.tenant: statistics.pages_sealed for statistics in all_spaces(shared_table)}
    assert sealed == {"a": 2, "b": 2}


def test_pages_of_two_sizes_share_the_capacity(make_table: MakeTable, layout_of_bytes: MakeLayout) -> None:
    table = make_table(800, 400)
    assert table.namespaces.register(SPACE, layout_of_bytes(100)) == 8
    assert table.namespaces.register(OTHER, layout_of_bytes(400)) == 2
    small = [store(table, number) for number in range(4)]
    large = store(table, 9, OTHER)
    assert large.extent not in {slot.extent for slot in small}
    assert table.statistics().used_bytes == 800


def test_statistics_agree_with_what_was_done(table: PageTable) -> None:
    store(table, 1)
    store(table, 2)
    prepare(table, 3)
    table.match(SPACE, [[page_hash(1)]], 10, 0.0)
    pin(table, 1)
    statistics = table.statistics()
    assert statistics.capacity_bytes == 400
    assert statistics.used_bytes == 300
    assert (statistics.pages_sealed, statistics.pages_arriving, statistics.pages_pinned, statistics.leases) == (2, 1, 1, 1)
    [space] = table.namespaces.statistics([SPACE])
    assert (space.pages_sealed, space.pages_arriving) == (2, 1)


@pytest.mark.parametrize("length", [0, 31, 33])
def test_a_hash_of_another_length_is_never_stored(table: PageTable, length: int) -> None:
    with pytest.raises(AssertionError, match="32 bytes"):
        table.prepare(SPACE, bytes(length), 0, 0.0)
