"""The arena in one mapped file or device: a path on /dev/shm, on a disk, or a CXL memory device (`/dev/dax0.0`).

Owns: the mapping of the whole path, its superblock, and an exclusive lock on it for as long as the node lives.
Invariants: only a file of ours, known by its superblock, or one of zeros is ever written to. At start every stamp of the earlier
life is void, wherever its geometry had it, before any other byte changes; then every byte is zero. Stamps of two lives of a node
never meet, because each life counts from a number of its own. What a reader kept mapped from an earlier life is thereby known to be
gone.

One file cannot be taken away from a reader as the memory files of `ShmArena` can: whoever maps it sees every extent. So a node
hands it out only where it serves one tenant.
"""

from __future__ import annotations

import errno
import fcntl
import os
import secrets
import stat
import sys
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Final

from attnstore import memory_files
from attnstore.arena.stamped import Span, StampedArena, void
from attnstore.arena.superblock import EXTENTS_AT_BYTES, SUPERBLOCK_BYTES, VERSION, Superblock
from attnstore.errors import InvalidArgument
from attnstore.fences import write_fence
from attnstore.limits import MIB
from attnstore.memory_files import HUGE_PAGE_BYTES

_FIRST_STAMP_BITS: Final = 62
_ZEROS: Final = bytes(MIB)


class FileArena(StampedArena):
    """An arena in the file or device at `path`. A regular file is made, or made larger, as far as needed, and never smaller.

    Raises `InvalidArgument` naming the path where it cannot be opened or mapped, is too small, serves another node, or holds
    anything but an arena or zeros; nothing in it has changed then.
    """

    def __init__(self, capacity_bytes: int, extent_bytes: int, path: Path) -> None:
        super().__init__(capacity_bytes, extent_bytes, first_stamp=secrets.randbits(_FIRST_STAMP_BITS))
        self._span_bytes = -(-self.layout.file_bytes // HUGE_PAGE_BYTES) * HUGE_PAGE_BYTES
        block = Superblock(VERSION, self.extents, self._span_bytes, self.layout.stamps_offset_bytes, self.layout.stamps)
        self._file: int | None = None
        try:
            self._file = _opened(path)
            self._bytes = _taken_over(self._file, block, path)
        except OSError as error:
            self._close_file()
            raise InvalidArgument(f"--arena-path {path}: {_reason(error)}") from None
        except BaseException:
            self._close_file()
            raise
        self._data = [self._part(extent, 0, extent_bytes) for extent in range(self.extents)]
        at, end = self.layout.stamps_offset_bytes, self.layout.stamps_offset_bytes + 8 * self.layout.stamps
        self._words = [self._part(extent, at, end).cast("Q") for extent in range(self.extents)]
        for stamps in self._words:
            void(stamps)
        for extent in range(self.extents):
            self._erase(extent)

    def span(self, extent: int) -> Span:
        """See `StampedArena.span`."""
        return Span(EXTENTS_AT_BYTES + extent * self._span_bytes, self._span_bytes)

    def close(self) -> None:
        """See `Arena.close`. A regular file stays, with its bytes."""
        with ExitStack() as closing:
            closing.callback(self._close_file)
            for view in (self._bytes, *self._words, *self._data):
                closing.callback(view.release)

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
        at = EXTENTS_AT_BYTES + extent * self._span_bytes
        return self._bytes[at + begin : at + end]

    def _erase(self, extent: int) -> None:
        window = self._data[extent]
        for begin in range(0, len(window), len(_ZEROS)):
            end = min(begin + len(_ZEROS), len(window))
            window[begin:end] = _ZEROS[: end - begin]

    def _close_file(self) -> None:
        if self._file is not None:
            os.close(self._file)
            self._file = None


def _opened(path: Path) -> int:
    """The path, open for this process alone. Raises `OSError`."""
    flags = 0
    try:
        _require_memory(path.stat())  # before it is opened: to open some devices is to use them
    except FileNotFoundError:
        flags = os.O_CREAT | os.O_EXCL
    file = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOCTTY | os.O_NONBLOCK | flags, 0o600)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        _require_memory(os.fstat(file))
    except BaseException:
        os.close(file)
        raise
    return file


def _taken_over(file: int, block: Superblock, path: Path) -> memoryview:
    """The file, mapped, without a stamp of an earlier life and with the new superblock. Raises `OSError`, `InvalidArgument`."""
    status = os.fstat(file)
    is_file = stat.S_ISREG(status.st_mode)
    found_bytes = status.st_size if is_file else block.file_bytes
    earlier = _superblock(_writable(file, found_bytes, path), file, path) if found_bytes else None
    size_bytes = block.file_bytes
    if earlier is not None:
        size_bytes = max(size_bytes, min(earlier.file_bytes, found_bytes) if is_file else earlier.file_bytes)
    if is_file:
        _allocate(file, status.st_size, block.file_bytes)
    mapping = _writable(file, size_bytes, path)
    if earlier is not None:
        for begin, end in earlier.stamps_in(size_bytes):
            mapping[begin:end] = bytes(end - begin)
        write_fence()
    mapping[:SUPERBLOCK_BYTES] = block.encode()
    with suppress(OSError):  # a device, which keeps what it is told
        os.fsync(file)
    return mapping[: block.file_bytes]


def _superblock(mapping: memoryview, file: int, path: Path) -> Superblock | None:
    """What an earlier life left; None where there was none. Raises `InvalidArgument` where the file is somebody else's."""
    earlier = Superblock.decode(mapping)
    if earlier is None and not _is_blank(mapping, file):
        raise InvalidArgument(
            f"--arena-path {path} is no arena: it holds other data, which a node would overwrite; delete it or name another"
        )
    if earlier is not None and earlier.version != VERSION:
        raise InvalidArgument(
            f"--arena-path {path} is an arena of version {earlier.version} and this node knows version {VERSION}; "
            "delete it or name another"
        )
    return earlier


def _is_blank(mapping: memoryview, file: int) -> bool:
    """All of it is zeros. Holes are not looked at: that would fill them."""
    at = 0
    while (at := max(at, _data_from(file, at))) < len(mapping):
        part = bytes(mapping[at : at + len(_ZEROS)])
        if part != _ZEROS[: len(part)]:
            return False
        at += len(part)
    return True


def _data_from(file: int, at: int) -> int:
    """Where the file has its next byte that is not in a hole, as far as the system can tell."""
    try:
        return os.lseek(file, at, os.SEEK_DATA)
    except OSError as error:
        return sys.maxsize if error.errno == errno.ENXIO else at


def _writable(file: int, size_bytes: int, path: Path) -> memoryview:
    try:
        return memory_files.map_writable(file, size_bytes)
    except OSError as error:
        raise InvalidArgument(
            f"--arena-path {path} cannot be mapped for {size_bytes} bytes ({error.strerror}); lower --capacity"
        ) from None


def _allocate(file: int, found_bytes: int, size_bytes: int) -> None:
    """Gives a regular file room for so many bytes, or leaves it as it was. Raises `OSError`."""
    os.ftruncate(file, max(found_bytes, size_bytes))
    try:
        memory_files.allocate_huge_pages(memory_files.map_writable(file, size_bytes))
        # Allocated now: a page of a mapped file that finds no room later is a fatal signal.
        os.posix_fallocate(file, 0, size_bytes)
    except OSError:
        os.ftruncate(file, found_bytes)
        raise


def _require_memory(status: os.stat_result) -> None:
    if stat.S_ISDIR(status.st_mode):
        raise OSError(errno.EISDIR, "a directory; name a file in it")
    if not (stat.S_ISREG(status.st_mode) or stat.S_ISCHR(status.st_mode)):
        raise OSError(errno.EINVAL, "neither a regular file nor a memory device")


def _reason(error: OSError) -> str:
    if error.errno == errno.EWOULDBLOCK:
        return "another node uses it"
    if error.errno == errno.EEXIST:
        return "a symbolic link that leads nowhere"
    return error.strerror or str(error)
