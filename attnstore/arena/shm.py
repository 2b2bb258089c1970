"""The arena of shared memory: extents that other processes of this host may map and read in place.

Owns: one sealed memory file (`memfd`) per extent, and the read-only descriptor that is handed out.
Invariants: a reader that mapped an extent for one tenant never sees a byte of the next tenant, because the next tenant gets another
file; the old file is emptied before the new one is filled, so all files together never use more memory than the capacity plus
stamps.

A new file instead of a wipe, because a mapping in another process cannot be revoked: later bytes must not be in that file.
"""

from __future__ import annotations

import mmap
import os
import resource
from contextlib import ExitStack

from attnstore import memory_files
from attnstore.arena.stamped import Span, StampedArena, void
from attnstore.errors import InvalidArgument, Overloaded
from attnstore.limits import DESCRIPTORS_BESIDE_ARENA_MIN
from attnstore.wire.shm import ExtentLayout


class ShmArena(StampedArena):
    """An arena of memory files. Linux only.

    Raises `InvalidArgument` if the machine has less memory than the capacity, or if this process may not open two descriptors per
    extent; it raises its own soft limit of descriptors as needed.
    """

    descriptors_per_extent = 2

    def __init__(self, capacity_bytes: int, extent_bytes: int) -> None:
        super().__init__(capacity_bytes, extent_bytes)
        _require_memory(capacity_bytes)
        _require_descriptors(self.extents * self.descriptors_per_extent + DESCRIPTORS_BESIDE_ARENA_MIN)
        self._files: list[_ExtentFile] = []
        try:
            for _ in range(self.extents):
                self._files.append(_ExtentFile(self.layout))
        except OSError as error:
            self.close()
            raise InvalidArgument(
                f"no shared memory for an arena of {capacity_bytes} bytes ({error.strerror}); lower the capacity"
            ) from error

    def span(self, extent: int) -> Span:
        """Returns the whole file: each extent has its own."""
        del extent
        return Span(0, self.layout.file_bytes)

    def close(self) -> None:
        """See `Arena.close`. Memory that a reader has mapped stays, unchanged, until the reader unmaps it."""
        with ExitStack() as closing:
            for file in self._files:
                closing.callback(file.close)

    def _extent(self, extent: int) -> memoryview:
        return self._files[extent].data

    def _replace(self, extent: int) -> None:
        self._files[extent].empty()
        try:
            fresh = _ExtentFile(self.layout)
        except OSError as error:
            # The tenancy is not recorded yet: its next slot tries again.
            raise Overloaded(f"no memory for the extent of a new tenant: {error.strerror}") from error
        self._files[extent].close()
        self._files[extent] = fresh
        self._slot_bytes[extent] = 0

    def _open(self, extent: int) -> int:
        return os.dup(self._files[extent].descriptor)

    def _stamps(self, extent: int) -> memoryview:
        return self._files[extent].stamps


class _ExtentFile:
    """One extent's memory file, mapped writable only here. Raises `OSError` if there is no memory for it."""

    def __init__(self, layout: ExtentLayout) -> None:
        file, self._bytes = memory_files.create("attnstore-extent", layout.file_bytes)
        try:
            # Opened again, because a duplicated descriptor would be as writable as the original. (F_SEAL_FUTURE_WRITE would also
            # stop a reader who opens the file itself, but with it the kernel frees no memory while any reader maps the file.)
            self.descriptor = os.open(f"/proc/self/fd/{file}", os.O_RDONLY | os.O_CLOEXEC)
        finally:
            os.close(file)
        self.data = self._bytes[: layout.extent_bytes]
        self.stamps = self._bytes[layout.stamps_offset_bytes :].cast("Q")[: layout.stamps]
        self._closed = False

    def empty(self) -> None:
        """Voids every stamp, then frees the memory: a reader that still maps the file reads zeros, and detects it by the stamps."""
        void(self.stamps)
        memory_files.give_back(self._bytes)

    def close(self) -> None:
        """Closes the file; the kernel frees it with the last view here and the last mapping elsewhere.

        Closing twice is allowed.
        """
        if self._closed:
            return
        self._closed = True
        with ExitStack() as closing:
            closing.callback(os.close, self.descriptor)
            for view in (self._bytes, self.stamps, self.data):
                closing.callback(view.release)


def _require_memory(capacity_bytes: int) -> None:
    # The kernel does not refuse a memory file that is too large; it kills a process when memory runs out.
    machine_bytes = os.sysconf("SC_PHYS_PAGES") * mmap.PAGESIZE
    if capacity_bytes > machine_bytes:
        raise InvalidArgument(
            f"no shared memory for an arena of {capacity_bytes} bytes: the machine has {machine_bytes}; lower the capacity"
        )


def _require_descriptors(count: int) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= count:
        return
    if hard != resource.RLIM_INFINITY and hard < count:
        raise InvalidArgument(f"this arena needs {count} file descriptors and this process may have {hard}: raise `ulimit -Hn`")
    resource.setrlimit(resource.RLIMIT_NOFILE, (count, hard))
