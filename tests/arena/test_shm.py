"""The shared memory arena: views, stamps, descriptors, and memory that another process has mapped."""

from __future__ import annotations

import errno
import mmap
import os
import random
import resource
import threading
from collections.abc import Iterator

import pytest

from attnstore import memory_files
from attnstore.arena.shm import ShmArena
from attnstore.core.layout import DType, PageLayout
from attnstore.core.page_table import ArrivingPage, PageTable
from attnstore.core.slots import Slot
from attnstore.errors import InvalidArgument, Overloaded
from attnstore.limits import DESCRIPTORS_BESIDE_ARENA_MIN
from attnstore.types import Space

EXTENT_BYTES = 3 * (1 << 16) + 100
EXTENTS = 3
CAPACITY_BYTES = EXTENTS * EXTENT_BYTES + 7


def slot(extent: int, offset_bytes: int, size_bytes: int, tenancy: int = 1, generation: int = 1) -> Slot:
    return Slot(extent, offset_bytes, size_bytes, generation, tenancy)


@pytest.fixture
def arena() -> Iterator[ShmArena]:
    arena = ShmArena(CAPACITY_BYTES, EXTENT_BYTES)
    yield arena
    arena.close()


def mapped(arena: ShmArena, extent: int, tenancy: int) -> mmap.mmap:
    """The extent as a reader in another process sees it."""
    descriptor = arena.descriptor(extent, tenancy)
    assert descriptor is not None
    try:
        return mmap.mmap(descriptor, arena.layout.file_bytes, mmap.MAP_SHARED, mmap.PROT_READ)
    finally:
        os.close(descriptor)


def stamp_seen(arena: ShmArena, reader: mmap.mmap, offset_bytes: int) -> int:
    at = arena.layout.stamps_offset_bytes + 8 * arena.layout.stamp_index(offset_bytes)
    return int.from_bytes(reader[at : at + 8], "little")


def allocated_bytes() -> int:
    """Memory in all memory files that this process holds open, each file counted once."""
    blocks: dict[int, int] = {}
    for name in os.listdir("/proc/self/fd"):
        path = f"/proc/self/fd/{name}"
        if os.path.lexists(path) and "attnstore-extent" in os.readlink(path):
            status = os.stat(path)
            blocks[status.st_ino] = status.st_blocks * 512
    return sum(blocks.values())


def test_a_window_is_exactly_its_slot_and_writable(arena: ShmArena) -> None:
    window = arena.view(slot(1, 100, 50))
    assert (len(window), window.readonly, window.itemsize) == (50, False, 1)
    window[:] = b"x" * 50
    assert bytes(arena.view(slot(1, 99, 52))) == b"\0" + b"x" * 50 + b"\0"


def test_the_last_byte_of_an_extent_is_reachable_and_the_next_is_not(arena: ShmArena) -> None:
    assert len(arena.view(slot(2, EXTENT_BYTES - 1, 1))) == 1
    with pytest.raises(AssertionError, match="passes the end"):
        arena.view(slot(2, EXTENT_BYTES - 1, 2))


def test_a_reader_sees_what_the_node_writes(arena: ShmArena) -> None:
    arena.view(slot(0, 4096, 4))[:] = b"page"
    reader = mapped(arena, 0, 1)
    assert reader[4096:4100] == b"page"
    arena.view(slot(0, 4096, 4))[:] = b"PAGE"
    assert reader[4096:4100] == b"PAGE"


def test_a_reader_cannot_write(arena: ShmArena) -> None:
    arena.view(slot(0, 0, 4))
    descriptor = arena.descriptor(0, 1)
    assert descriptor is not None
    with pytest.raises(PermissionError):
        mmap.mmap(descriptor, arena.layout.file_bytes, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.pwrite(descriptor, b"x", 0)
    os.close(descriptor)


def test_an_extent_can_neither_grow_nor_shrink(arena: ShmArena) -> None:
    arena.view(slot(0, 0, 4))
    descriptor = arena.descriptor(0, 1)
    assert descriptor is not None
    for size_bytes in (0, 1 << 30):
        with pytest.raises(OSError, match=r".") as refused:
            os.truncate(f"/proc/self/fd/{descriptor}", size_bytes)
        assert refused.value.errno == errno.EPERM
    os.close(descriptor)


def test_a_descriptor_is_given_for_the_current_tenancy_only(arena: ShmArena) -> None:
    assert arena.descriptor(0, 1) is None
    arena.view(slot(0, 0, 4, tenancy=2))
    assert arena.descriptor(0, 1) is None
    assert arena.descriptor(0, 3) is None
    assert arena.descriptor(EXTENTS, 0) is None
    assert arena.descriptor(-1, 2) is None
    mapped(arena, 0, 2)


def test_a_stamp_changes_before_the_window_of_a_new_generation_is_had(arena: ShmArena) -> None:
    arena.view(slot(0, 8192, 4096, generation=5))[:] = b"a" * 4096
    reader = mapped(arena, 0, 1)
    assert stamp_seen(arena, reader, 8192) == arena.stamp(slot(0, 8192, 4096)) == 10
    arena.view(slot(0, 8192, 4096, generation=5))
    assert stamp_seen(arena, reader, 8192) == 10, "reading a page back is no reason to call it recycled"
    arena.view(slot(0, 8192, 4096, generation=9))
    assert stamp_seen(arena, reader, 8192) == 18
    assert reader[8192:8196] == b"aaaa", "nothing was written yet, and the reader is warned already"


def test_stamps_of_slots_of_a_page_or_more_are_their_own(arena: ShmArena) -> None:
    places = [slot(0, at, 4096, generation=at // 4096 + 1) for at in range(0, EXTENT_BYTES - 4096, 4096)]
    for place in places:
        arena.view(place)
    assert [arena.stamp(place) for place in places] == [2 * place.generation for place in places]


def test_a_slot_that_is_withdrawn_has_a_stamp_of_no_page_until_the_next_one_has_it(arena: ShmArena) -> None:
    bad, next_to_it = slot(0, 8192, 4096, generation=5), slot(0, 12288, 4096, generation=6)
    arena.view(bad)[:] = b"a" * 4096
    arena.view(next_to_it)
    reader = mapped(arena, 0, 1)
    arena.withdraw(bad)
    assert stamp_seen(arena, reader, 8192) == 11
    assert bytes(arena.view(bad)) == b"a" * 4096
    assert stamp_seen(arena, reader, 8192) == 11, "whoever still reads it in the node makes it no good again"
    assert stamp_seen(arena, reader, 12288) == 12
    arena.view(slot(0, 8192, 4096, generation=7))
    arena.withdraw(bad)
    assert stamp_seen(arena, reader, 8192) == 14


def test_slots_of_another_size_void_every_older_stamp_of_their_extent(arena: ShmArena) -> None:
    """A large slot covers the beginnings of several small ones, whose stamp words are not its own."""
    for generation, offset_bytes in enumerate(range(0, 65536, 4096), 1):
        arena.view(slot(0, offset_bytes, 4096, generation=generation))
    reader = mapped(arena, 0, 1)
    arena.view(slot(0, 0, 65536, generation=100))
    for generation, offset_bytes in enumerate(range(0, 65536, 4096), 1):
        assert stamp_seen(arena, reader, offset_bytes) != 2 * generation


def test_small_slots_that_share_a_stamp_never_keep_it_when_recycled(arena: ShmArena) -> None:
    arena.view(slot(0, 0, 512, generation=1))
    arena.view(slot(0, 512, 512, generation=2))
    located = arena.stamp(slot(0, 0, 512, generation=1))
    arena.view(slot(0, 0, 512, generation=3))
    assert arena.stamp(slot(0, 0, 512, generation=3)) != located


def test_a_new_tenant_gets_another_file_and_the_old_one_reads_as_zeros_without_stamps(arena: ShmArena) -> None:
    arena.view(slot(0, 0, EXTENT_BYTES, tenancy=1, generation=1))[:] = b"s" * EXTENT_BYTES
    window = arena.view(slot(0, 0, 8, tenancy=1, generation=1))
    reader = mapped(arena, 0, 1)
    fresh = arena.view(slot(0, 0, EXTENT_BYTES, tenancy=2, generation=2))
    assert bytes(fresh) == bytes(EXTENT_BYTES)
    fresh[:] = b"t" * EXTENT_BYTES
    assert reader[:] == bytes(len(reader)), "neither the old tenant's bytes nor the new one's"
    window[:] = b"too late"
    assert bytes(arena.view(slot(0, 0, 8, tenancy=2, generation=2))) == b"t" * 8
    with pytest.raises(AssertionError, match="earlier tenant"):
        arena.view(slot(0, 0, 4, tenancy=1))


def test_memory_never_passes_the_capacity_and_its_stamps_however_often_tenants_change(arena: ShmArena) -> None:
    limit_bytes = EXTENTS * arena.layout.file_bytes
    readers = []
    assert allocated_bytes() == limit_bytes, "all of it is allocated at the start"
    for tenancy in range(1, 6):
        for extent in range(EXTENTS):
            arena.view(slot(extent, 0, EXTENT_BYTES, tenancy=tenancy, generation=tenancy))[:] = b"x" * EXTENT_BYTES
            readers.append(mapped(arena, extent, tenancy))  # keeps the old file alive, as a reader does
            assert allocated_bytes() == limit_bytes
    assert arena.layout.file_bytes - EXTENT_BYTES < 3 * 4096 + EXTENT_BYTES // 512


def test_an_extent_without_memory_for_its_new_tenant_is_tried_again(arena: ShmArena, monkeypatch: pytest.MonkeyPatch) -> None:
    arena.view(slot(0, 0, 8, tenancy=1))[:] = b"secretly"
    with monkeypatch.context() as patch:

        def refuse(*_: object) -> None:
            raise OSError(errno.ENOMEM, "Cannot allocate memory")

        patch.setattr(memory_files, "_allocate", refuse)
        with pytest.raises(Overloaded, match="no memory"):
            arena.view(slot(0, 0, 8, tenancy=2))
    assert bytes(arena.view(slot(0, 0, 8, tenancy=2))) == bytes(8)


def test_threads_that_bring_a_new_tenancy_at_once_lose_no_byte_of_it(arena: ShmArena) -> None:
    for tenancy in range(1, 30):
        barrier = threading.Barrier(4)

        def write(number: int, tenancy: int = tenancy, barrier: threading.Barrier = barrier) -> None:
            barrier.wait()
            arena.view(slot(0, number * 4096, 4096, tenancy, tenancy * 4 + number))[:] = bytes([number + 1]) * 4096

        threads = [threading.Thread(target=write, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        reader = mapped(arena, 0, tenancy)
        assert reader[: 4 * 4096] == b"".join(bytes([number + 1]) * 4096 for number in range(4))


def test_a_window_and_a_reader_outlive_the_close_of_the_arena(arena: ShmArena) -> None:
    window = arena.view(slot(0, 0, 4))
    window[:] = b"held"
    reader = mapped(arena, 0, 1)
    arena.close()
    arena.close()
    assert bytes(window) == b"held"
    assert reader[:4] == b"held"
    with pytest.raises(ValueError, match="released"):
        arena.view(slot(0, 0, 4))


@pytest.mark.parametrize(("capacity_bytes", "extent_bytes"), [(0, 1), (100, 0), (100, 101)])
def test_sizes_that_make_no_extent_are_refused(capacity_bytes: int, extent_bytes: int) -> None:
    with pytest.raises(InvalidArgument, match="extent_bytes"):
        ShmArena(capacity_bytes, extent_bytes)


def test_more_memory_than_the_machine_has_is_refused_at_start() -> None:
    with pytest.raises(InvalidArgument, match="lower the capacity"):
        ShmArena(1 << 60, 1 << 56)


def test_the_soft_limit_of_descriptors_is_raised_and_the_hard_one_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    limits = [(100, 10_000)]
    monkeypatch.setattr(resource, "getrlimit", lambda _: limits[-1])
    monkeypatch.setattr(resource, "setrlimit", lambda _, pair: limits.append(pair))
    ShmArena(8192, 4096).close()
    assert limits[-1] == (4 + DESCRIPTORS_BESIDE_ARENA_MIN, 10_000)
    limits.append((100, resource.RLIM_INFINITY))
    ShmArena(8192, 4096).close()
    assert limits[-1] == (4 + DESCRIPTORS_BESIDE_ARENA_MIN, resource.RLIM_INFINITY)
    limits.append((100, 200))
    with pytest.raises(InvalidArgument, match="ulimit"):
        ShmArena(8192, 4096)


@pytest.mark.parametrize("seed", range(3))
def test_no_reader_ever_sees_a_byte_of_another_tenant_nor_a_valid_place_with_wrong_bytes(seed: int) -> None:
    """Table and arena together against readers that keep every mapping they ever made."""
    chance = random.Random(seed)
    arena = ShmArena(8 * 16384, 16384)
    table = PageTable(capacity_bytes=8 * 16384, extent_bytes=16384, new_lease_id=lambda: bytes(16))
    tenants = {Space(str(number), b"n" * 32): number for number in (1, 2, 3)}
    for space, number in tenants.items():
        layout = PageLayout(layers=1, kv_heads=1, head_dim=(1024, 2048, 3000)[number - 1], block_tokens=1, dtype=DType.OPAQUE)
        table.namespaces.register(space, layout)
    readers: dict[tuple[int, int], tuple[int, mmap.mmap]] = {}
    places: list[tuple[Slot, int, bytes, mmap.mmap]] = []
    for step in range(600):
        space = chance.choice(list(tenants))
        page = table.prepare(space, step.to_bytes(32, "big"), 0, 0.0)
        assert isinstance(page, ArrivingPage)
        serial = bytes((0x80 | step >> 7, 0x80 | step & 0x7F))  # a byte that no tenant writes
        content = serial + bytes([tenants[space]]) * (page.slot.size_bytes - 2)
        arena.view(page.slot)[:] = content
        table.complete(page, 0.0)
        key = (page.slot.extent, page.slot.tenancy)
        if key not in readers:
            readers[key] = tenants[space], mapped(arena, *key)
        places.append((page.slot, arena.stamp(page.slot), content, readers[key][1]))
        if chance.random() < 0.3:
            table.delete(space, [chance.randrange(step + 1).to_bytes(32, "big")], 0.0)
    for number, reader in readers.values():
        assert not set(reader[:16384]) & (set(tenants.values()) - {number})
    valid = [place for place in places if stamp_seen(arena, place[3], place[0].offset_bytes) == place[1]]
    for place, _, content, reader in valid:
        assert reader[place.offset_bytes : place.offset_bytes + place.size_bytes] == content
    assert 0 < len(valid) < len(places)
    assert len(readers) > 8, "the history moved no extent between tenants and tested nothing"
    arena.close()
