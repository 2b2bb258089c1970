"""Memory files as peers make them, and huge pages as the kernel reports them."""

from __future__ import annotations

import fcntl
import mmap
import os
from pathlib import Path

from attnstore.copying import address_of
from attnstore.memory_files import HUGE_PAGE_BYTES

_MADV_COLLAPSE = 25


def sealed_file(size_bytes: int, *, seals: int = fcntl.F_SEAL_SHRINK, flags: int = 0) -> int:
    """The descriptor of a file that nobody allocated; `flags` are more of `memfd_create`'s."""
    file = os.memfd_create("peer", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING | flags)
    os.ftruncate(file, size_bytes)
    fcntl.fcntl(file, fcntl.F_ADD_SEALS, seals)
    return file


def huge_pages_in(mapping: memoryview) -> int:
    """How many huge pages this process has mapped there."""
    entries = Path("/proc/self/smaps").read_text().split("VmFlags")
    (entry,) = (entry for entry in entries if f"\n{address_of(mapping):x}-" in entry)
    (line,) = (line for line in entry.splitlines() if line.startswith("ShmemPmdMapped:"))
    return int(line.split()[1]) * 1024 // HUGE_PAGE_BYTES


def makes_huge_pages() -> bool:
    """Whether this system does, asked without the code that is tested."""
    probe = mmap.mmap(-1, 2 * HUGE_PAGE_BYTES, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    probe[:] = bytes(len(probe))
    try:
        probe.madvise(_MADV_COLLAPSE, -address_of(memoryview(probe)) % HUGE_PAGE_BYTES, HUGE_PAGE_BYTES)
    except OSError as error:
        print(f"this system makes no huge pages: {error}")
        return False
    return True
