"""The arena of anonymous memory, private to the process.

Owns: one anonymous mapping. It is faulted in at start, so that a running node cannot fail for lack of memory and no first write
pays for page faults. Huge pages are used if available, because a layer slice of many pages then touches fewer TLB entries.
"""

from __future__ import annotations

import errno
import mmap
from contextlib import suppress
from typing import Final

from attnstore.arena.base import Arena
from attnstore.core.slots import Slot
from attnstore.errors import InvalidArgument
from attnstore.limits import MIB
from attnstore.memory_files import MADV_POPULATE_WRITE

_ZEROS: Final = bytes(MIB)


class MemoryArena(Arena):
    """An arena in this process's memory. No other process can see it, so an extent that changes tenants is overwritten in place.

    >>> from attnstore.core.slots import Slot
    >>> arena = MemoryArena(capacity_bytes=8192, extent_bytes=4096)
    >>> window = arena.view(Slot(extent=1, offset_bytes=1024, size_bytes=512, generation=1, tenancy=1))
    >>> len(window), window.readonly
    (512, False)
    """

    def __init__(self, capacity_bytes: int, extent_bytes: int) -> None:
        super().__init__(capacity_bytes, extent_bytes)
        try:
            self._mapping = mmap.mmap(-1, capacity_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            _populate(self._mapping)
        except OSError as error:
            raise InvalidArgument(
                f"no memory for an arena of {capacity_bytes} bytes ({error.strerror}); lower the capacity"
            ) from error
        self._bytes = memoryview(self._mapping)
        self._windows = [self._bytes[begin : begin + extent_bytes] for begin in range(0, self.extents * extent_bytes, extent_bytes)]

    def withdraw(self, slot: Slot) -> None:
        """No-op: no other process uses the bytes in place."""

    def close(self) -> None:
        for window in (*self._windows, self._bytes):
            window.release()
        with suppress(BufferError):  # views are still held; the mapping ends with the last of them
            self._mapping.close()

    def _extent(self, extent: int) -> memoryview:
        return self._windows[extent]

    def _replace(self, extent: int) -> None:
        window = self._extent(extent)
        for begin in range(0, len(window), len(_ZEROS)):
            end = min(begin + len(_ZEROS), len(window))
            window[begin:end] = _ZEROS[: end - begin]


def _populate(mapping: mmap.mmap) -> None:
    """Faults in every page of the mapping, as huge pages if possible."""
    with suppress(AttributeError, OSError):  # no huge pages on this system
        mapping.madvise(mmap.MADV_HUGEPAGE)
    try:
        mapping.madvise(MADV_POPULATE_WRITE)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        for offset in range(0, len(mapping), mmap.PAGESIZE):
            mapping[offset] = 0
