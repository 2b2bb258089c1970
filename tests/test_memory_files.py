"""Sealed memory files: their creation, and the checks of a file received from a peer."""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from attnstore import memory_files
from attnstore.copying import address_of
from attnstore.errors import ProtocolError
from attnstore.memory_files import HUGE_PAGE_BYTES
from tests.memory_files import huge_pages_in, makes_huge_pages, sealed_file

SIZE_BYTES = 3 * mmap.PAGESIZE


def test_a_file_is_zeros_that_its_maker_writes_and_others_read() -> None:
    file, mapping = memory_files.create("test", SIZE_BYTES)
    try:
        reading = memory_files.map_read_only(file, 0, SIZE_BYTES)
        assert reading[:] == bytes(SIZE_BYTES)
        mapping[5:8] = b"abc"
        assert reading[5:8] == b"abc"
        with pytest.raises(TypeError):
            reading[0] = 1
        assert memory_files.map_read_only(file, mmap.PAGESIZE, mmap.PAGESIZE)[:] == bytes(mmap.PAGESIZE)
    finally:
        os.close(file)


@pytest.mark.parametrize("size_bytes", [0, mmap.PAGESIZE, 2 * SIZE_BYTES])
def test_nobody_can_shrink_or_grow_it_or_lift_its_seals(size_bytes: int) -> None:
    file, _ = memory_files.create("test", SIZE_BYTES)
    try:
        with pytest.raises(PermissionError):
            os.ftruncate(file, size_bytes)
        with pytest.raises(PermissionError):
            fcntl.fcntl(file, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)
    finally:
        os.close(file)


def test_mappings_begin_where_huge_pages_can_be_mapped_and_end_with_their_last_view() -> None:
    file, mapping = memory_files.create("attnstore-ends", SIZE_BYTES)
    reading = memory_files.map_read_only(file, 0, SIZE_BYTES)
    os.close(file)
    assert address_of(mapping) % HUGE_PAGE_BYTES == address_of(reading) % HUGE_PAGE_BYTES == 0

    def mapped() -> int:
        return Path("/proc/self/maps").read_text().count("attnstore-ends")

    part = reading[5:9]
    del reading
    assert mapped() == 2
    del part
    assert mapped() == 1
    del mapping
    assert mapped() == 0


def test_memory_that_is_given_back_reads_as_zeros_for_everybody() -> None:
    file, mapping = memory_files.create("test", SIZE_BYTES)
    reading = memory_files.map_read_only(file, 0, SIZE_BYTES)
    mapping[:] = b"x" * SIZE_BYTES
    memory_files.give_back(mapping)
    assert os.fstat(file).st_blocks == 0
    assert reading == bytes(SIZE_BYTES)
    os.close(file)


def test_files_are_allocated_in_huge_pages_where_the_system_makes_them() -> None:
    size_bytes = 2 * HUGE_PAGE_BYTES + 5 * mmap.PAGESIZE
    file, mapping = memory_files.create("test", size_bytes)
    assert os.fstat(file).st_blocks * 512 == size_bytes
    reading = memory_files.map_read_only(file, 0, size_bytes)
    os.close(file)
    expected = 2 if makes_huge_pages() else 0
    assert huge_pages_in(mapping) == huge_pages_in(reading) == expected
    assert reading == bytes(size_bytes)
    mapping[-3:] = b"abc"
    assert reading[-4:] == b"\0abc"


def test_a_file_that_has_bytes_already_keeps_them() -> None:
    size_bytes = 2 * HUGE_PAGE_BYTES
    data = random.Random(1).randbytes(size_bytes)
    file = os.memfd_create("test")
    os.write(file, data)
    mapping = memory_files.map_writable(file, size_bytes)
    os.close(file)
    memory_files.allocate_huge_pages(mapping)
    assert mapping == data


@pytest.mark.parametrize("failing", [errno.EINVAL, errno.ENOMEM], ids=["none for such files", "no more of them"])
def test_a_system_without_huge_pages_allocates_small_ones(failing: int, monkeypatch: pytest.MonkeyPatch) -> None:
    advise = memory_files._advise
    asked: list[int] = []

    def refuse_to_collapse(mapping: memoryview, advice: int) -> None:
        if advice == memory_files.MADV_COLLAPSE:
            asked.append(len(mapping))
            raise OSError(failing, os.strerror(failing))
        advise(mapping, advice)

    monkeypatch.setattr(memory_files, "_advise", refuse_to_collapse)
    size_bytes = 3 * HUGE_PAGE_BYTES
    file, mapping = memory_files.create("test", size_bytes)
    assert os.fstat(file).st_blocks * 512 == size_bytes
    assert mapping == bytes(size_bytes)
    assert asked == [HUGE_PAGE_BYTES], "the first refusal is enough"
    os.close(file)


@pytest.mark.parametrize("size_bytes", [0, -1, 1 << 60])
def test_sizes_that_no_mapping_has_are_refused(size_bytes: int) -> None:
    with pytest.raises((OSError, ValueError)):
        memory_files.create("test", size_bytes)
    file, _ = memory_files.create("test", SIZE_BYTES)
    with pytest.raises(ProtocolError):
        memory_files.map_read_only(file, 0, size_bytes)
    os.close(file)


def unsealed() -> int:
    file = os.memfd_create("peer")
    os.ftruncate(file, SIZE_BYTES)
    return file


@pytest.mark.parametrize(
    ("make", "complaint"),
    [
        (unsealed, "neither sealed"),
        (lambda: os.open("/dev/null", os.O_RDONLY), "neither sealed"),
        (lambda: os.open("/", os.O_RDONLY), "neither sealed"),
        (lambda: sealed_file(SIZE_BYTES - 1), "ends too soon"),
        (lambda: sealed_file(2 << 20, flags=os.MFD_HUGETLB), "neither sealed"),
    ],
    ids=["unsealed", "a device", "a directory", "too short", "huge pages that may be lacking when they are touched"],
)
def test_what_could_kill_its_reader_is_not_mapped(make: Callable[[], int], complaint: str) -> None:
    file = make()
    try:
        with pytest.raises(ProtocolError, match=complaint):
            memory_files.map_read_only(file, 0, SIZE_BYTES)
    finally:
        os.close(file)


def test_a_file_that_the_user_names_is_trusted_and_no_other(tmp_path: Path) -> None:
    named, other = tmp_path / "named", tmp_path / "other"
    for path in (named, other):
        path.write_bytes(b"x" * SIZE_BYTES)
    file = os.open(named, os.O_RDONLY)
    try:
        assert memory_files.map_read_only(file, 0, SIZE_BYTES, named)[:1] == b"x"
        with pytest.raises(ProtocolError, match="shared_path"):
            memory_files.map_read_only(file, 0, SIZE_BYTES, other)
        with pytest.raises(ProtocolError):
            memory_files.map_read_only(file, 0, SIZE_BYTES, tmp_path / "missing")
    finally:
        os.close(file)
