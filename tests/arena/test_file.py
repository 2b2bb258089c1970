"""The arena in a file: capacity, stamps that two lives of a node never share, and unusable paths."""

from __future__ import annotations

import dataclasses
import errno
import mmap
import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from attnstore.arena import FileArena, file
from attnstore.core.slots import Slot
from attnstore.errors import InvalidArgument
from tests.memory_files import huge_pages_in, makes_huge_pages

EXTENT_BYTES = 3 * (1 << 16) + 100
EXTENTS = 3
CAPACITY_BYTES = EXTENTS * EXTENT_BYTES + 7


def slot(extent: int, offset_bytes: int, size_bytes: int, tenancy: int = 1, generation: int = 1) -> Slot:
    return Slot(extent, offset_bytes, size_bytes, generation, tenancy)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "arena"


@pytest.fixture
def arena(path: Path) -> Iterator[FileArena]:
    arena = FileArena(CAPACITY_BYTES, EXTENT_BYTES, path)
    yield arena
    arena.close()


def mapped(arena: FileArena, extent: int, tenancy: int) -> mmap.mmap:
    """The extent as a reader in another process sees it."""
    descriptor = arena.descriptor(extent, tenancy)
    assert descriptor is not None
    span = arena.span(extent)
    try:
        return mmap.mmap(descriptor, span.size_bytes, mmap.MAP_SHARED, mmap.PROT_READ, offset=span.offset_bytes)
    finally:
        os.close(descriptor)


def stamp_seen(arena: FileArena, reader: mmap.mmap, offset_bytes: int) -> int:
    at = arena.layout.stamps_offset_bytes + 8 * arena.layout.stamp_index(offset_bytes)
    return int.from_bytes(reader[at : at + 8], "little")


def test_extents_lie_apart_and_end_where_they_should(arena: FileArena) -> None:
    for extent in range(EXTENTS):
        arena.view(slot(extent, 0, EXTENT_BYTES))[:] = bytes([extent + 1]) * EXTENT_BYTES
    for extent in range(EXTENTS):
        assert bytes(arena.view(slot(extent, 0, EXTENT_BYTES))) == bytes([extent + 1]) * EXTENT_BYTES
        assert mapped(arena, extent, 1)[:EXTENT_BYTES] == bytes([extent + 1]) * EXTENT_BYTES
    with pytest.raises(AssertionError, match="passes the end"):
        arena.view(slot(2, EXTENT_BYTES - 1, 2))


def test_spans_can_be_mapped_from_a_device_of_huge_pages(arena: FileArena) -> None:
    assert all(number % (2 << 20) == 0 for extent in range(EXTENTS) for number in arena.span(extent))


def test_a_stamp_changes_before_the_window_of_a_new_generation_is_had(arena: FileArena) -> None:
    arena.view(slot(0, 8192, 4096, generation=5))[:] = b"a" * 4096
    reader = mapped(arena, 0, 1)
    before = stamp_seen(arena, reader, 8192)
    assert before == arena.stamp(slot(0, 8192, 4096))
    arena.view(slot(0, 8192, 4096, generation=9))
    assert stamp_seen(arena, reader, 8192) == before + 8
    assert reader[8192:8196] == b"aaaa", "nothing was written yet, and the reader is warned already"


def test_a_reader_cannot_write(arena: FileArena) -> None:
    arena.view(slot(0, 0, 4))
    descriptor = arena.descriptor(0, 1)
    assert descriptor is not None
    with pytest.raises(PermissionError):
        mmap.mmap(descriptor, 4096, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
    os.close(descriptor)


def test_an_extent_that_changes_tenants_is_all_zeros_without_stamps_for_the_next_one(arena: FileArena) -> None:
    arena.view(slot(0, 0, EXTENT_BYTES))[:] = b"s" * EXTENT_BYTES
    reader = mapped(arena, 0, 1)
    before = stamp_seen(arena, reader, 0)
    assert bytes(arena.view(slot(0, 4096, 4096, tenancy=2, generation=2))) == bytes(4096)
    assert stamp_seen(arena, reader, 0) != before
    assert reader[:EXTENT_BYTES] == bytes(EXTENT_BYTES)
    assert arena.descriptor(0, 1) is None


def test_what_an_earlier_life_left_is_gone_and_no_stamp_comes_again(path: Path) -> None:
    first = FileArena(CAPACITY_BYTES, EXTENT_BYTES, path)
    first.view(slot(0, 0, 4096, generation=1))[:] = b"a" * 4096
    reader = mapped(first, 0, 1)
    old = stamp_seen(first, reader, 0)
    first.close()
    assert reader[:4096] == b"a" * 4096, "a reader outlives the node"
    second = FileArena(CAPACITY_BYTES, EXTENT_BYTES, path)
    assert stamp_seen(second, reader, 0) == 0
    assert bytes(second.view(slot(0, 0, 4096, generation=1))) == bytes(4096)
    assert stamp_seen(second, reader, 0) not in (0, old)
    second.close()


def test_a_larger_file_keeps_its_size(path: Path) -> None:
    path.write_bytes(bytes(32 << 20))
    FileArena(CAPACITY_BYTES, EXTENT_BYTES, path).close()
    assert path.stat().st_size == 32 << 20


def test_a_file_that_finds_no_room_keeps_its_size(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_range: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    path.write_bytes(bytes(100))
    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(InvalidArgument, match="No space left"):
        FileArena(CAPACITY_BYTES, EXTENT_BYTES, path)
    assert path.read_bytes() == bytes(100)


def test_a_file_in_memory_consists_of_huge_pages_where_the_system_makes_them() -> None:
    path = Path("/dev/shm") / f"attnstore-test-{os.getpid()}"
    try:
        arena = FileArena(CAPACITY_BYTES, EXTENT_BYTES, path)
        expected = EXTENTS + 1 if makes_huge_pages() else 0  # the superblock is in a page of its own
        assert huge_pages_in(arena.view(slot(0, 0, 4))) == expected
        assert bytes(arena.view(slot(0, 0, EXTENT_BYTES))) == bytes(EXTENT_BYTES)
        arena.close()
    finally:
        path.unlink(missing_ok=True)


def test_two_nodes_cannot_have_one_file(arena: FileArena, path: Path) -> None:
    with pytest.raises(InvalidArgument, match="another node uses it"):
        FileArena(CAPACITY_BYTES, EXTENT_BYTES, path)
    assert len(arena.view(slot(0, 0, 4))) == 4


def test_paths_that_cannot_serve_are_named(tmp_path: Path) -> None:
    for path, why in (
        (tmp_path, "directory"),
        (tmp_path / "no" / "such", "No such file"),
        (Path("/dev/null"), "cannot be mapped"),
    ):
        with pytest.raises(InvalidArgument, match=f"--arena-path {path}.*{why}"):
            FileArena(CAPACITY_BYTES, EXTENT_BYTES, path)


def test_a_window_outlives_the_close_of_the_arena(path: Path) -> None:
    arena = FileArena(CAPACITY_BYTES, EXTENT_BYTES, path)
    window = arena.view(slot(0, 0, 4))
    window[:] = b"last"
    arena.close()
    arena.close()
    assert bytes(window) == b"last"


GEOMETRIES = ((3 * (1 << 16), 1 << 16), (6 * (1 << 16), 1 << 16), (2 * (5 << 16), 5 << 16), (1 << 20, 1 << 20), (8 << 20, 4 << 20))
"""(capacity, extent size) of nodes that use one file, one after the other."""


@pytest.mark.parametrize("after", GEOMETRIES)
@pytest.mark.parametrize("before", GEOMETRIES)
def test_a_reader_of_one_geometry_is_never_shown_bytes_of_another_under_its_stamps(
    path: Path, before: tuple[int, int], after: tuple[int, int]
) -> None:
    first = FileArena(*before, path)
    places = [(extent, offset) for extent in range(first.extents) for offset in range(0, first.extent_bytes, 1 << 14)]
    for number, (extent, offset) in enumerate(places, 1):
        first.view(slot(extent, offset, 1 << 14, generation=number))[:] = b"a" * (1 << 14)
    readers = [mapped(first, extent, 1) for extent in range(first.extents)]
    seen = {(extent, offset): stamp_seen(first, readers[extent], offset) for extent, offset in places}
    first.close()
    second = FileArena(*after, path)
    for (extent, offset), stamp in seen.items():
        assert stamp_seen(first, readers[extent], offset) != stamp
    for extent in range(second.extents):
        second.view(slot(extent, 0, second.extent_bytes, generation=extent + 1))[:] = b"b" * second.extent_bytes
    for (extent, offset), stamp in seen.items():
        assert stamp_seen(first, readers[extent], offset) != stamp
    second.close()


def test_old_stamps_are_void_before_anything_else_is_written(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A node that dies at that moment leaves a file that the next node recognises, and in which no reader finds a wrong byte."""
    first = FileArena(CAPACITY_BYTES, EXTENT_BYTES, path)
    first.view(slot(2, 0, 4096))[:] = b"a" * 4096
    reader = mapped(first, 2, 1)
    old = stamp_seen(first, reader, 0)
    first.close()

    def dies(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(file.Superblock, "encode", dies)
    with pytest.raises(KeyboardInterrupt):
        FileArena(2 * EXTENT_BYTES, EXTENT_BYTES, path)
    assert stamp_seen(first, reader, 0) != old
    assert reader[:4096] == b"a" * 4096
    monkeypatch.undo()
    FileArena(2 * EXTENT_BYTES, EXTENT_BYTES, path).close()


def test_a_file_that_is_no_arena_is_refused_and_stays_as_it_is(path: Path) -> None:
    for content in (b"x", b"a text that matters\n" * 100, bytes(1 << 20) + b"\n", b"\x7fELF" + bytes(40 << 20)):
        path.write_bytes(content)
        with pytest.raises(InvalidArgument, match=f"--arena-path {path}.*is no arena.*delete it or name another"):
            FileArena(CAPACITY_BYTES, EXTENT_BYTES, path)
        assert path.read_bytes() == content


def test_a_superblock_that_was_damaged_or_is_of_another_version_is_refused(path: Path) -> None:
    FileArena(CAPACITY_BYTES, EXTENT_BYTES, path).close()
    whole = path.read_bytes()
    for at in (0, 8, 20, 60):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        with pytest.raises(InvalidArgument, match="is no arena"):
            FileArena(CAPACITY_BYTES, EXTENT_BYTES, path)
    block = file.Superblock.decode(whole)
    assert block is not None
    path.write_bytes(dataclasses.replace(block, version=block.version + 1).encode().ljust(len(whole), b"\0"))
    with pytest.raises(InvalidArgument, match=f"version {block.version + 1}"):
        FileArena(CAPACITY_BYTES, EXTENT_BYTES, path)


@pytest.mark.parametrize("content", [b"", bytes(100), bytes(64 << 20)])
def test_an_empty_file_and_one_of_zeros_are_taken(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    FileArena(CAPACITY_BYTES, EXTENT_BYTES, path).close()
    FileArena(CAPACITY_BYTES, EXTENT_BYTES, path).close()


def test_a_file_that_was_cut_behind_its_superblock_is_taken_over(path: Path) -> None:
    FileArena(CAPACITY_BYTES, EXTENT_BYTES, path).close()
    os.truncate(path, 3 << 20)
    arena = FileArena(CAPACITY_BYTES, EXTENT_BYTES, path)
    assert bytes(arena.view(slot(EXTENTS - 1, 0, EXTENT_BYTES))) == bytes(EXTENT_BYTES)
    arena.close()


def test_paths_that_are_no_files_are_refused_by_name(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "dangling").symlink_to(tmp_path / "nothing")
    (tmp_path / "tty").symlink_to("/dev/tty")
    (tmp_path / "null").symlink_to("/dev/null")
    (tmp_path / "folder").symlink_to(tmp_path)
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "socket"))
    for name in ("fifo", "dangling", "tty", "null", "folder", "loop", "socket"):
        with pytest.raises(InvalidArgument, match=f"--arena-path {tmp_path / name}"):
            FileArena(CAPACITY_BYTES, EXTENT_BYTES, tmp_path / name)
    assert not (tmp_path / "nothing").exists()


def test_a_link_to_a_file_serves_as_the_file_does(path: Path, tmp_path: Path) -> None:
    path.write_bytes(b"")
    link = tmp_path / "link"
    link.symlink_to(path)
    arena = FileArena(CAPACITY_BYTES, EXTENT_BYTES, link)
    with pytest.raises(InvalidArgument, match="another node uses it"):
        FileArena(CAPACITY_BYTES, EXTENT_BYTES, path)
    arena.close()
