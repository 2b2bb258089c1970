"""The device below the disk tier: files of one directory, aligned I/O, durability.

Owns: the `Device` contract, and the real one, which uses O_DIRECT. Invariants: `create`, `rename` and `unlink` are durable when
they return; `write` is durable after a `flush` of the same file that returned; a read or a write is complete or raises `OSError`. A
second node that opens the directory is refused.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import Final, Protocol

from attnstore.logs import get_logger
from attnstore.spill.errors import DiskRefused

_log = get_logger(__name__)

ALIGNMENT_BYTES: Final = 512
"""Memory addresses and lengths of O_DIRECT; offsets are multiples of a block of the format."""
LOCK_NAME: Final = "lock"


class Device(Protocol):
    """Files by name. Offsets are multiples of 4,096; buffers are writable or readable views, aligned as `ALIGNMENT_BYTES` says."""

    @property
    def name(self) -> str:
        """What messages call it."""

    def lock(self) -> None:
        """Takes the directory for this process. Raises `DiskRefused`."""

    def names(self) -> list[str]:
        """Returns the names of all files, without the lock's."""

    def create(self, name: str, size_bytes: int) -> None:
        """Makes a file of zeros with its space allocated; durable. Raises `OSError`, without leaving a file."""

    def size_bytes(self, name: str) -> int:
        """Returns a file's size."""

    def rename(self, name: str, new_name: str) -> None:
        """Durable."""

    def unlink(self, name: str) -> None:
        """Durable."""

    def read(self, name: str, offset_bytes: int, buffers: Sequence[memoryview]) -> None:
        """Fills the buffers one after the other. A file that ends too soon is an `OSError` (EIO)."""

    def write(self, name: str, offset_bytes: int, buffers: Sequence[memoryview]) -> None:
        """Writes the buffers one after the other."""

    def flush(self, name: str) -> None:
        """Makes the completed writes of a file durable."""

    def close(self) -> None:
        """Gives up the files and the lock."""


class DirectoryDevice:
    """The files of a real directory, made with mode 0700 unless it exists.

    Raises `DiskRefused` naming the path if it is not a directory or cannot be used.
    """

    def __init__(self, path: Path, *, read_only: bool = False) -> None:
        self.name = str(path)
        self._path = path
        self._read_only = read_only
        self._files: dict[str, _File] = {}
        self._is_direct = True
        self._lock: int | None = None
        try:
            if not read_only:
                path.mkdir(mode=0o700, exist_ok=True)
            self._directory = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError as error:
            raise DiskRefused(f"spill directory {path}: {error.strerror}") from None

    def lock(self) -> None:
        """See `Device`. A reader takes a lock of its own, so that no node starts beneath it."""
        flags = os.O_RDONLY if self._read_only else os.O_RDWR | os.O_CREAT
        kind = fcntl.LOCK_SH if self._read_only else fcntl.LOCK_EX
        try:
            self._lock = os.open(LOCK_NAME, flags | os.O_CLOEXEC, 0o600, dir_fd=self._directory)
            fcntl.flock(self._lock, kind | fcntl.LOCK_NB)
        except OSError as error:
            reason = "another node uses it" if error.errno == errno.EWOULDBLOCK else error.strerror
            raise DiskRefused(f"spill directory {self.name}: {reason}") from None

    def names(self) -> list[str]:
        """See `Device`."""
        return sorted(set(os.listdir(self._directory)) - {LOCK_NAME})

    def create(self, name: str, size_bytes: int) -> None:
        """See `Device`."""
        file = self._opened(name, os.O_CREAT | os.O_EXCL)
        try:
            os.posix_fallocate(file.descriptor, 0, size_bytes)
            os.fsync(file.descriptor)
            os.fsync(self._directory)
        except OSError:
            self._files.pop(name, None)
            os.unlink(name, dir_fd=self._directory)
            raise

    def size_bytes(self, name: str) -> int:
        """See `Device`. Anything but a regular file has no bytes."""
        status = os.stat(name, dir_fd=self._directory, follow_symlinks=False)
        return status.st_size if stat.S_ISREG(status.st_mode) else 0

    def rename(self, name: str, new_name: str) -> None:
        """See `Device`."""
        self._files.pop(name, None)
        os.rename(name, new_name, src_dir_fd=self._directory, dst_dir_fd=self._directory)
        os.fsync(self._directory)

    def unlink(self, name: str) -> None:
        """See `Device`."""
        self._files.pop(name, None)
        os.unlink(name, dir_fd=self._directory)
        os.fsync(self._directory)

    def read(self, name: str, offset_bytes: int, buffers: Sequence[memoryview]) -> None:
        """See `Device`."""
        if os.preadv(self._file(name).descriptor, buffers, offset_bytes) != sum(map(len, buffers)):
            raise OSError(errno.EIO, "a short read")

    def write(self, name: str, offset_bytes: int, buffers: Sequence[memoryview]) -> None:
        """See `Device`."""
        if os.pwritev(self._file(name).descriptor, buffers, offset_bytes) != sum(map(len, buffers)):
            raise OSError(errno.EIO, "a short write")

    def flush(self, name: str) -> None:
        """See `Device`."""
        os.fdatasync(self._file(name).descriptor)

    def close(self) -> None:
        """See `Device`."""
        self._files.clear()
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None
        os.close(self._directory)

    def _file(self, name: str) -> _File:
        file = self._files.get(name)
        return self._opened(name) if file is None else file

    def _opened(self, name: str, flags: int = 0) -> _File:
        flags |= os.O_CLOEXEC | os.O_NOFOLLOW | (os.O_RDONLY if self._read_only else os.O_RDWR)
        if self._is_direct:
            try:
                return self._kept(name, flags | os.O_DIRECT)
            except OSError as error:
                if error.errno != errno.EINVAL:
                    raise
                self._is_direct = False
                flags &= ~os.O_EXCL  # the refused call may have made the file
                _log.warning("the file system has no direct I/O; pages also pass through the system's cache", path=self.name)
        return self._kept(name, flags)

    def _kept(self, name: str, flags: int) -> _File:
        return self._files.setdefault(name, _File(os.open(name, flags, 0o600, dir_fd=self._directory)))


class _File:
    """An open file, closed with the last reference: a read that still runs keeps it open."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor

    def __del__(self) -> None:
        os.close(self.descriptor)


def aligned_buffer(size_bytes: int) -> memoryview:
    """Returns zeroed memory of its own that direct I/O accepts; freed with its last view."""
    return memoryview(mmap.mmap(-1, size_bytes))
