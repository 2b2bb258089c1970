"""The memory arena: views, the isolation of tenants, and closing."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest

from attnstore.arena import MemoryArena
from attnstore.core.layout import DType, PageLayout
from attnstore.core.page_table import ArrivingPage, PageTable
from attnstore.core.slots import Slot
from attnstore.errors import InvalidArgument
from attnstore.types import Space

EXTENT_BYTES = 3 * (1 << 20) + 4096
CAPACITY_BYTES = 2 * EXTENT_BYTES


def slot(extent: int, offset_bytes: int, size_bytes: int, tenancy: int = 1) -> Slot:
    return Slot(extent, offset_bytes, size_bytes, generation=1, tenancy=tenancy)


@pytest.fixture
def arena() -> Iterator[MemoryArena]:
    arena = MemoryArena(CAPACITY_BYTES, EXTENT_BYTES)
    yield arena
    arena.close()


def test_a_window_is_exactly_its_slot_and_writable(arena: MemoryArena) -> None:
    window = arena.view(slot(1, 100, 50))
    assert (len(window), window.readonly, window.itemsize) == (50, False, 1)
    window[:] = b"x" * 50
    around = arena.view(slot(1, 99, 52))
    assert bytes(around) == b"\0" + b"x" * 50 + b"\0"


def test_two_views_of_a_slot_are_the_same_bytes(arena: MemoryArena) -> None:
    arena.view(slot(0, 0, 8))[:] = b"abcdefgh"
    assert bytes(arena.view(slot(0, 0, 8))) == b"abcdefgh"


def test_the_last_byte_of_the_capacity_is_reachable_and_the_next_is_not(arena: MemoryArena) -> None:
    assert len(arena.view(slot(1, EXTENT_BYTES - 1, 1))) == 1
    with pytest.raises(AssertionError, match="passes the end"):
        arena.view(slot(1, EXTENT_BYTES - 1, 2))
    with pytest.raises(IndexError):
        arena.view(slot(2, 0, 1))


def test_an_extent_that_changes_tenants_is_all_zeros_for_the_next_one(arena: MemoryArena) -> None:
    arena.view(slot(0, 0, EXTENT_BYTES))[:] = b"s" * EXTENT_BYTES
    arena.view(slot(1, 0, 4))[:] = b"keep"
    assert bytes(arena.view(slot(0, 0, EXTENT_BYTES, tenancy=2))) == bytes(EXTENT_BYTES)
    assert bytes(arena.view(slot(1, 0, 4))) == b"keep"


def test_an_extent_is_wiped_once_and_not_again_for_the_same_tenant(arena: MemoryArena) -> None:
    arena.view(slot(0, 0, 4, tenancy=1))[:] = b"aaaa"
    arena.view(slot(0, 0, 4, tenancy=2))[:] = b"bbbb"
    assert bytes(arena.view(slot(0, 0, 8, tenancy=2))) == b"bbbb" + bytes(4)


def test_a_slot_of_an_earlier_tenant_is_refused(arena: MemoryArena) -> None:
    arena.view(slot(0, 0, 4, tenancy=2))
    with pytest.raises(AssertionError, match="earlier tenant"):
        arena.view(slot(0, 0, 4, tenancy=1))


def test_a_window_outlives_the_close_of_its_arena(arena: MemoryArena) -> None:
    window = arena.view(slot(0, 0, 4))
    window[:] = b"held"
    arena.close()
    arena.close()
    assert bytes(window) == b"held"
    with pytest.raises(ValueError, match="released"):
        arena.view(slot(0, 0, 4))


@pytest.mark.parametrize(("capacity_bytes", "extent_bytes"), [(0, 1), (100, 0), (100, 101)])
def test_sizes_that_make_no_extent_are_refused(capacity_bytes: int, extent_bytes: int) -> None:
    with pytest.raises(InvalidArgument, match="extent_bytes"):
        MemoryArena(capacity_bytes, extent_bytes)


def test_memory_that_cannot_be_had_is_refused_at_start() -> None:
    with pytest.raises(InvalidArgument, match="lower the capacity"):
        MemoryArena(1 << 60, 1 << 56)


@pytest.mark.parametrize("seed", range(5))
def test_no_tenant_ever_sees_a_byte_of_another(seed: int) -> None:
    """Table and arena together: the whole extent of a new slot contains only zeros and bytes of its own tenant."""
    chance = random.Random(seed)
    arena = MemoryArena(4096, 1024)
    table = PageTable(capacity_bytes=4096, extent_bytes=1024, new_lease_id=lambda: bytes(16))
    tenants = {Space(str(number), b"n" * 32): bytes([number]) for number in (1, 2, 3)}
    for space, fill in tenants.items():
        layout = PageLayout(layers=1, kv_heads=1, head_dim=32 * fill[0], block_tokens=1, dtype=DType.OPAQUE)
        table.namespaces.register(space, layout)
    tenancies = set()
    for step in range(400):
        space = chance.choice(list(tenants))
        page = table.prepare(space, step.to_bytes(32, "big"), 0, 0.0)
        assert isinstance(page, ArrivingPage)
        arena.view(page.slot)[:] = tenants[space] * page.slot.size_bytes
        whole_extent = arena.view(Slot(page.slot.extent, 0, 1024, page.slot.generation, page.slot.tenancy))
        assert set(bytes(whole_extent)) <= {0, *tenants[space]}
        table.complete(page, 0.0)
        tenancies.add(page.slot.tenancy)
        if chance.random() < 0.3:
            table.delete(space, [chance.randrange(step + 1).to_bytes(32, "big")], 0.0)
    assert max(tenancies) > 2, "the history moved no extent between tenants and tested nothing"
    arena.close()
