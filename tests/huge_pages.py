"""Huge pages as the kernel reports them, for the tests of what is made of them."""

from __future__ import annotations

import mmap
from pathlib import Path

from attnstore.copying import address_of
from attnstore.memory_files import HUGE_PAGE_BYTES

_MADV_COLLAPSE = 25


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
