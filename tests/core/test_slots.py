"""Geometry of extents and slots, and the numbers that distinguish an old slot from a new one."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from attnstore.core.slots import Slot, SlotClass, SlotPool, extent_bytes_for
from attnstore.errors import InvalidArgument
from attnstore.limits import EXTENT_BYTES_MAX, GIB, MIB

PAGE_BYTES = 368_640


def take_all(pool: SlotPool, slot_class: SlotClass) -> list[Slot]:
    slots = []
    while (slot := pool.take(slot_class)) is not None:
        slots.append(slot)
    return slots


def take_one(pool: SlotPool, slot_class: SlotClass) -> Slot:
    slot = pool.take(slot_class)
    assert slot is not None
    return slot


@pytest.mark.parametrize("page_bytes", [2, 1000, 4096, PAGE_BYTES, 2 * MIB])
@pytest.mark.parametrize("pages", [1, 2, 7, 10, 63])
def test_an_extent_of_exactly_n_pages_holds_n_pages(page_bytes: int, pages: int) -> None:
    pool = SlotPool(pages * page_bytes, pages * page_bytes)
    slots = take_all(pool, pool.slot_class("a", page_bytes))
    assert len(slots) == pages
    pool.check(slots)


@given(page_bytes=st.integers(1, 9000), extent_bytes=st.integers(1, 2 * MIB))
def test_alignment_costs_less_than_one_slot_in_64(page_bytes: int, extent_bytes: int) -> None:
    if page_bytes > extent_bytes:
        return
    slot_class = SlotPool(extent_bytes, extent_bytes).slot_class("a", page_bytes)
    exact = extent_bytes // page_bytes
    assert slot_class.stride_bytes >= page_bytes
    assert exact - slot_class.slots_per_extent <= exact // 64


@pytest.mark.parametrize("page_bytes", [PAGE_BYTES, PAGE_BYTES - 1, 2 * MIB - 100])
def test_large_pages_start_on_memory_page_boundaries(page_bytes: int) -> None:
    pool = SlotPool(64 * MIB, 64 * MIB)
    assert all(slot.offset_bytes % 4096 == 0 for slot in take_all(pool, pool.slot_class("a", page_bytes)))


def test_small_pages_are_packed() -> None:
    pool = SlotPool(MIB, MIB)
    assert len(take_all(pool, pool.slot_class("a", 256))) == MIB // 256


@pytest.mark.parametrize("capacity_bytes", [1, 4096, 10 * PAGE_BYTES, 100 * MIB, GIB + 12345, 3 * 1024 * GIB])
def test_default_extents_use_the_capacity_and_pass_no_limit(capacity_bytes: int) -> None:
    extent_bytes = extent_bytes_for(capacity_bytes)
    extents = capacity_bytes // extent_bytes
    assert extent_bytes <= EXTENT_BYTES_MAX
    assert capacity_bytes - extents * extent_bytes <= 4096 * extents


def test_default_extents_of_a_small_arena_are_one() -> None:
    assert extent_bytes_for(10 * PAGE_BYTES) == 10 * PAGE_BYTES


def test_default_extents_of_a_middling_arena_let_several_classes_share_it() -> None:
    assert 64 * MIB // extent_bytes_for(64 * MIB) == 8
    assert 2 * GIB // extent_bytes_for(2 * GIB) == 32


@pytest.mark.parametrize(("capacity_bytes", "extent_bytes"), [(0, 1), (-5, 1), (100, 0), (100, 101)])
def test_sizes_that_make_no_extent_are_refused(capacity_bytes: int, extent_bytes: int) -> None:
    with pytest.raises(InvalidArgument, match=r"capacity_bytes|extent_bytes"):
        SlotPool(capacity_bytes, extent_bytes)


def test_a_page_larger_than_an_extent_is_refused_with_the_sizes_named() -> None:
    pool = SlotPool(1000, 250)
    with pytest.raises(InvalidArgument, match=r"251 bytes.*1000 bytes.*250 bytes.*raise the capacity"):
        pool.slot_class("a", 251)


def test_an_extent_serves_one_class_until_its_last_slot_is_given_back() -> None:
    pool = SlotPool(800, 400)
    small, large = pool.slot_class("a", 100), pool.slot_class("a", 200)
    first, second = take_one(pool, small), take_one(pool, large)
    assert first.extent != second.extent
    smalls = [first, *take_all(pool, small)]
    assert len(smalls) == 4
    for slot in smalls[1:]:
        pool.give_back(slot)
    assert pool.take(pool.slot_class("b", 400)) is None
    pool.give_back(first)
    assert take_one(pool, pool.slot_class("b", 400)).extent == first.extent


def test_a_slot_taken_again_has_a_new_generation() -> None:
    pool = SlotPool(100, 100)
    slot_class = pool.slot_class("a", 100)
    old = take_one(pool, slot_class)
    pool.give_back(old)
    new = take_one(pool, slot_class)
    assert (new.extent, new.offset_bytes) == (old.extent, old.offset_bytes)
    assert new.generation > old.generation


def test_the_tenancy_rises_only_when_the_tenant_changes() -> None:
    pool = SlotPool(100, 100)
    tenancies = []
    for tenant, page_bytes in [("a", 100), ("a", 50), ("b", 50), ("a", 50)]:
        slot = take_one(pool, pool.slot_class(tenant, page_bytes))
        tenancies.append(slot.tenancy)
        pool.give_back(slot)
    assert tenancies == [1, 1, 2, 3]


def test_a_tenant_gets_its_own_old_extent_then_a_fresh_one_then_a_foreign_one() -> None:
    pool = SlotPool(300, 100)
    mine, theirs = pool.slot_class("a", 100), pool.slot_class("b", 100)
    my_old, their_old = take_one(pool, mine), take_one(pool, theirs)
    pool.give_back(their_old)
    pool.give_back(my_old)
    again = [take_one(pool, mine) for _ in range(3)]
    assert again[0].extent == my_old.extent
    assert again[1].extent not in (my_old.extent, their_old.extent)
    assert again[2].extent == their_old.extent


def test_giving_a_slot_back_to_a_free_extent_is_caught() -> None:
    pool = SlotPool(100, 100)
    slot = take_one(pool, pool.slot_class("a", 100))
    pool.give_back(slot)
    with pytest.raises(AssertionError, match="not taken"):
        pool.give_back(slot)


@given(st.data())
def test_slots_are_conserved_through_any_sequence(data: st.DataObject) -> None:
    pool = SlotPool(4096, data.draw(st.sampled_from([512, 1000, 4096])))
    classes = [pool.slot_class(tenant, page_bytes) for tenant in "ab" for page_bytes in (64, 100, 256)]
    taken: list[Slot] = []
    for give in data.draw(st.lists(st.booleans(), max_size=60)):
        if give and taken:
            pool.give_back(taken.pop(data.draw(st.integers(0, len(taken) - 1))))
        elif (slot := pool.take(data.draw(st.sampled_from(classes)))) is not None:
            taken.append(slot)
        pool.check(taken)
