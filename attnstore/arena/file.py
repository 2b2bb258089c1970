"""The arena in one mapped file or device: a path on /dev/shm, on a disk, or a CXL memory device (`/dev/dax0.0`).

Owns: the mapping of the whole path, and an exclusive lock on it for as long as the node lives.
Invariants: at start every stamp is void before any byte changes, and then every byte is zero; stamps of two lives of a node never
meet, because each life counts from a number of its own. What a reader kept mapped from an earlier life is thereby known to be gone.

One file cannot be taken away from a reader as the memory files of `SharedArena` can: whoever maps it sees every extent. So a node
hands it out only where it serves one tenant.
"""

from __future__ import annotations

import errno
import fcntl
import os
import secrets
import stat
from pathlib import Path
from typing import Final

from attnstore import memory_files
from attnstore.arena.stamped import Span, StampedArena, void
from attnstore.errors import InvalidArgument
from attnstore.limits import MIB
from attnstore.memory_files import HUGE_PAGE_BYTES

_FIRST_STAMP_BITS: Final = 62
_ZEROS: Final = bytes(MIB)


class FileArena(StampedArena):
    """An arena in the file or device at `path`. A regular file is made, or made larger, as far as needed, and never smaller.

    Raises `InvalidArgument` naming the path where it cannot be opened or mapped, is too small or serves another node.
    """

    def __init__(self, capacity_bytes: int, extent_bytes: int, path: Path) -> None:
        super().__init__(capacity_bytes, extent_bytes, first_stamp=secrets.randbits(_FIRST_STAMP_BITS))
        # A device of CXL memory can be mapped in multiples of this.
        self._span_bytes = -(-self.layout.file_bytes // HUGE_PAGE_BYTES) * HUGE_PAGE_BYTES
        try:
            self._file: int | None = _opened(path, self.extents * self._span_bytes)
        except OSError as error:
            raise InvalidArgument(f"--arena-path {path}: {_reason(error)}") from None
        try:
            self._bytes = memory_files.map_writable(self._file, self.extents * self._span_bytes)
        except OSError as error:
            os.close(self._file)
            raise InvalidArgument(
                f"--arena-path {path} cannot be mapped for a capacity of {capacity_bytes} bytes ({error.strerror}); "
                "lower --capacity"
            ) from None
        self._data = [self._part(extent, 0, extent_bytes) for extent in range(self.extents)]
        at, end = self.layout.stamps_offset_bytes, self.layout.stamps_offset_bytes + 8 * self.layout.stamps
        self._words = [self._part(extent, at, end).cast("Q") for extent in range(self.extents)]
        for stamps in self._words:
            void(stamps)
        for extent in range(self.extents):
            self._erase(extent)

    def span(self, extent: int) -> Span:
        """See `StampedArena.span`."""
        return Span(extent * self._span_bytes, self._span_bytes)

    def close(self) -> None:
        """See `Arena.close`. A regular file stays, with its bytes."""
        for view in (*self._data, *self._words, self._bytes):
            view.release()
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def _extent(self, extent: int) -> memoryview:
        return self._data[extent]

    def _stamps(self, extent: int) -> memoryview:
        return self._words[extent]

    def _open(self, extent: int) -> int:
        del extent
        # Opened anew, because a duplicate would be as writable as the original.
        return os.open(f"/proc/self/fd/{self._file}", os.O_RDONLY | os.O_CLOEXEC)

    def _replace(self, extent: int) -> None:
        void(self._words[extent])
        self._slot_bytes[extent] = 0
        self._erase(extent)

    def _part(self, extent: int, begin: int, end: int) -> memoryview:
        at = extent * self._span_bytes
        return self._bytes[at + begin : at + end]

    def _erase(self, extent: int) -> None:
        window = self._data[extent]
        for begin in range(0, len(window), len(_ZEROS)):
            end = min(begin + len(_ZEROS), len(window))
            window[begin:end] = _ZEROS[: end - begin]


def _opened(path: Path, size_bytes: int) -> int:
    """The path, open for this process alone and with room for so many bytes. Raises `OSError`."""
    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        status = os.fstat(file)
        if stat.S_ISREG(status.st_mode):
            os.ftruncate(file, max(status.st_size, size_bytes))
            try:
                memory_files.allocate_huge_pages(memory_files.map_writable(file, size_bytes))
                # Allocated now: a page of a mapped file that finds no room later is a fatal signal.
                os.posix_fallocate(file, 0, size_bytes)
            except OSError:
                os.ftruncate(file, status.st_size)
                raise
        elif not stat.S_ISCHR(status.st_mode):
            raise OSError(errno.EINVAL, "neither a regular file nor a memory device")
    except BaseException:
        os.close(file)
        raise
    return file


def _reason(error: OSError) -> str:
    if error.errno == errno.EWOULDBLOCK:
        return "another node uses it"
    return error.strerror or str(error)
