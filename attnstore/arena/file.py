"""The arena in one mapped file or device: a path on /dev/shm, on a disk, or a CXL memory device (`/dev/dax0.0`).

Owns: the mapping of the whole path, its superblock, and an exclusive lock on it while the node lives.
Invariants: only a file with our superblock or a file of zeros is ever written to. At start, every stamp of the previous life is
voided, by the geometry recorded in its superblock, before any other byte changes; then every byte is zero. Stamps of two lives of a
node never collide, because each life counts from its own number. A reader that kept a mapping from a previous life therefore sees
that its pages are gone.

The file cannot be withdrawn from a reader, unlike the memory files of `ShmArena`: a reader that maps it sees every extent. A node
therefore hands it out only if it serves a single tenant.
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
    """An arena in the file or device at `path`. A regular file is created, or enlarged as needed, and never shrunk.

    Raises `InvalidArgument` naming the path if it cannot be opened or mapped, is too small, is used by another node, or contains
    anything but an arena or zeros; it is unchanged then.
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
        # Opened again, because a duplicated descriptor would be as writable as the original.
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
    """Opens the path for this process alone. Raises `OSError`."""
    flags = 0
    try:
        _require_memory(path.stat())  # checked before opening, because opening some devices has side effects
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
    """Maps the file, with the stamps of a previous life voided and a new superblock. Raises `OSError`, `InvalidArgument`."""
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
    with suppress(OSError):  # a device keeps its old bytes
        os.fsync(file)
    return mapping[: block.file_bytes]


def _superblock(mapping: memoryview, file: int, path: Path) -> Superblock | None:
    """Returns the superblock of a previous life, or None. Raises `InvalidArgument` if the file contains other data."""
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
    """Returns whether all bytes are zeros. Skips holes, because reading would fill them."""
    at = 0
    while (at := max(at, _data_from(file, at))) < len(mapping):
        part = bytes(mapping[at : at + len(_ZEROS)])
        if part != _ZEROS[: len(part)]:
            return False
        at += len(part)
    return True


def _data_from(file: int, at: int) -> int:
    """Returns the offset of the next byte that is not in a hole, as far as the system reports holes."""
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
    """Allocates space for a regular file, or leaves it as it was. Raises `OSError`."""
    os.ftruncate(file, max(found_bytes, size_bytes))
    try:
        memory_files.allocate_huge_pages(memory_files.map_writable(file, size_bytes))
        # Allocated now, because a mapped page without disk space causes a fatal signal later.
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
