"""The arena of shared memory: extents that other processes of this host may map and read in place.

Owns: one sealed memory file (`memfd`) for each extent, and the read-only descriptor that is handed out.
Invariants: whoever mapped an extent for one tenant never sees a byte of the next one, because the next one gets another file; the
old file is emptied before the new one is filled, so the memory of all files together never passes the capacity and its stamps.

Why a new file and not a wipe: a mapping in another process cannot be taken back, so what comes next must not be in that file.
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

    Raises `InvalidArgument` where the machine has less memory than the capacity, or where this process may not have two
    descriptors for each extent; it raises its own soft limit of descriptors as far as it must.
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
        """Each extent is a file of its own."""
        del extent
        return Span(0, self.layout.file_bytes)

    def close(self) -> None:
        """See `Arena.close`. Memory that a reader has mapped lives on, unchanged, until the reader lets it go."""
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
            # The tenancy is not recorded yet: the next slot of it tries again.
            raise Overloaded(f"no memory for the extent of a new tenant: {error.strerror}") from error
        self._files[extent].close()
        self._files[extent] = fresh
        self._slot_bytes[extent] = 0

    def _open(self, extent: int) -> int:
        return os.dup(self._files[extent].descriptor)

    def _stamps(self, extent: int) -> memoryview:
        return self._files[extent].stamps


class _ExtentFile:
    """One extent's memory file, mapped writable here and nowhere else. Raises `OSError` where there is no memory for it."""

    def __init__(self, layout: ExtentLayout) -> None:
        file, self._bytes = memory_files.create("attnstore-extent", layout.file_bytes)
        try:
            # Opened anew, because a duplicate would be as writable as the original. (F_SEAL_FUTURE_WRITE would bind even a reader
            # who opens the file himself, but with it the kernel gives no memory back as long as any reader maps the file.)
            self.descriptor = os.open(f"/proc/self/fd/{file}", os.O_RDONLY | os.O_CLOEXEC)
        finally:
            os.close(file)
        self.data = self._bytes[: layout.extent_bytes]
        self.stamps = self._bytes[layout.stamps_offset_bytes :].cast("Q")[: layout.stamps]
        self._closed = False

    def empty(self) -> None:
        """Voids every stamp, then gives the memory back: whoever still maps the file reads zeros, and can tell."""
        void(self.stamps)
        memory_files.give_back(self._bytes)

    def close(self) -> None:
        """Lets the file go; the kernel frees it with the last window of ours and the last mapping of others.

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
    # The kernel does not refuse a memory file that is too large; it looks for a process to kill when it fills up.
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
