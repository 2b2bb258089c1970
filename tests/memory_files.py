"""Memory files as peers make them, and huge pages as the kernel reports them."""

from __future__ import annotations

import fcntl
import mmap
import os
import re
from pathlib import Path

from attnstore.copying import address_of
from attnstore.memory_files import HUGE_PAGE_BYTES, MADV_COLLAPSE


def sealed_file(size_bytes: int, *, seals: int = fcntl.F_SEAL_SHRINK, flags: int = 0) -> int:
    """Returns the descriptor of an unallocated file; `flags` are added to those of `memfd_create`."""
    file = os.memfd_create("peer", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING | flags)
    os.ftruncate(file, size_bytes)
    fcntl.fcntl(file, fcntl.F_ADD_SEALS, seals)
    return file


def flip_bit(file: Path, page: bytes, at: int) -> None:
    """Changes one bit of byte `at` of the only place in a file with these bytes, as failing memory does."""
    with file.open("r+b") as opened, mmap.mmap(opened.fileno(), 0) as memory:
        begin = memory.find(page)
        assert begin >= 0
        assert memory.find(page, begin + 1) < 0
        memory[begin + at] ^= 0x10


def huge_pages_in(view: memoryview) -> int:
    """Returns how many huge pages this process has in the mapping of the view."""
    address, huge_pages, here = address_of(view), [], False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if bounds := re.match("([0-9a-f]+)-([0-9a-f]+) ", line):
            here = int(bounds[1], 16) <= address < int(bounds[2], 16)
        elif here and line.startswith("ShmemPmdMapped:"):
            huge_pages.append(int(line.split()[1]) * 1024 // HUGE_PAGE_BYTES)
    (count,) = huge_pages
    return count


def makes_huge_pages() -> bool:
    """Returns whether this system makes huge pages, without using the tested code."""
    probe = mmap.mmap(-1, 2 * HUGE_PAGE_BYTES, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    probe[:] = bytes(len(probe))
    try:
        probe.madvise(MADV_COLLAPSE, -address_of(memoryview(probe)) % HUGE_PAGE_BYTES, HUGE_PAGE_BYTES)
    except OSError as error:
        print(f"this system makes no huge pages: {error}")
        return False
    return True
