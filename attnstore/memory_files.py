"""Sealed memory files: memory that one process makes and another maps.

Owns: how they are made, and what is looked at before one that a peer passed is mapped. Invariant: reading a file that was mapped
here cannot kill this process: it can neither shrink, nor does it consist of huge pages that the system may lack when touched.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import stat
from contextlib import suppress
from pathlib import Path
from typing import Final

from attnstore.errors import ProtocolError

_SEALS: Final = fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL
_MADV_POPULATE_WRITE: Final = 23
"""Linux 5.14; the mmap module has no name for it."""


def create(name: str, size_bytes: int) -> tuple[int, mmap.mmap]:
    """A sealed file of zeros, allocated, and its writable mapping. The caller closes the descriptor. Raises `OSError`."""
    file = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(file, size_bytes)
        fcntl.fcntl(file, fcntl.F_ADD_SEALS, _SEALS)
        mapping = mmap.mmap(file, size_bytes)
        _allocate(mapping, file)
    except BaseException:
        os.close(file)
        raise
    return file, mapping


def map_read_only(file: int, offset_bytes: int, size_bytes: int, trusted: Path | None = None) -> mmap.mmap:
    """Maps bytes of a file that a peer passed; the descriptor stays the caller's to close.

    Raises `ProtocolError` for one that is too short, that cannot be mapped, or that is no sealed memory file, unless it is the
    one at `trusted`, for which the user vouches.
    """
    try:
        status = os.fstat(file)
        if not (_is_harmless(file) or (trusted is not None and os.path.samestat(status, trusted.stat()))):
            raise ProtocolError("the peer passed a file that is neither sealed nor the one named as shared_path")
        if stat.S_ISREG(status.st_mode) and status.st_size < offset_bytes + size_bytes:
            raise ProtocolError("the peer passed a file that ends too soon")
        return mmap.mmap(file, size_bytes, mmap.MAP_SHARED, mmap.PROT_READ, offset=offset_bytes)
    except OSError as error:
        raise ProtocolError(f"the file that the peer passed cannot be mapped: {error.strerror}") from None


def _is_harmless(file: int) -> bool:
    try:
        sealed = fcntl.fcntl(file, fcntl.F_GET_SEALS) & fcntl.F_SEAL_SHRINK == fcntl.F_SEAL_SHRINK
    except OSError:  # a kind of file that has no seals
        return False
    return sealed and os.fstatvfs(file).f_bsize == mmap.PAGESIZE


def _allocate(mapping: mmap.mmap, file: int) -> None:
    """Allocates every page of the file now, as huge pages where the system has them for shared memory."""
    with suppress(OSError):
        mapping.madvise(mmap.MADV_HUGEPAGE)
    try:
        mapping.madvise(_MADV_POPULATE_WRITE)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        os.posix_fallocate(file, 0, len(mapping))
