"""Sealed memory files: memory that one process creates and another maps.

Owns: their creation and mapping, and the checks of a file received from a peer. Invariant: reading a file mapped here cannot kill
this process: the file cannot shrink, and it does not consist of huge pages that the system may lack when they are touched.

Every mapping begins at an address at which the system can map huge pages, and `allocate_huge_pages` requests them. Most systems
never use them for shared memory by default (`shmem_enabled` is `never`); every 4 KiB then need a TLB entry.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
import stat
from contextlib import suppress
from pathlib import Path
from typing import Final

from attnstore.copying import address_of
from attnstore.errors import ProtocolError
from attnstore.limits import MIB

HUGE_PAGE_BYTES: Final = 2 * MIB

_SEALS: Final = fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL
MADV_POPULATE_READ: Final = 22
MADV_POPULATE_WRITE: Final = 23
MADV_COLLAPSE: Final = 25
"""Linux 5.14, 5.14 and 6.1; the mmap module has no names for them."""
MAP_FIXED: Final = 0x10
MAP_NORESERVE: Final = 0x4000
"""Flags of mmap(2) for which the mmap module has no names either."""
_SIZE_BYTES_MAX: Final = 1 << 46

_system = ctypes.CDLL(None, use_errno=True)
_mmap, _madvise = _system.mmap, _system.madvise
_mmap.restype = ctypes.c_void_p
_mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_int64)
_madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)


def create(name: str, size_bytes: int) -> tuple[int, memoryview]:
    """Returns a sealed, allocated file of zeros and its writable mapping, which lives as long as a view of it.

    `size_bytes` is a multiple of the page size. The caller closes the descriptor. Raises `OSError`.
    """
    file = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(file, size_bytes)
        fcntl.fcntl(file, fcntl.F_ADD_SEALS, _SEALS)
        mapping = map_writable(file, size_bytes)
        _allocate(mapping, file)
    except BaseException:
        os.close(file)
        raise
    return file, mapping


def map_writable(file: int, size_bytes: int) -> memoryview:
    """Maps `size_bytes` of our own file from its beginning; the mapping lives as long as a view of it. Raises `OSError`."""
    return _mapped(file, 0, size_bytes, mmap.PROT_READ | mmap.PROT_WRITE)


def allocate_huge_pages(mapping: memoryview) -> None:
    """Allocates huge pages for a writable mapping, if the system supports them for such a file; otherwise has little effect.

    The system makes a huge page from one small page and holes without copying, ten times as fast as it allocates small pages. The
    bytes stay the same for every process that maps the file.
    """
    with suppress(OSError):  # no more huge pages, or none for such a file
        # Sufficient where `shmem_enabled` is `advise`, on kernels that cannot make them otherwise.
        _advise(mapping, mmap.MADV_HUGEPAGE)
        for begin in range(0, len(mapping) - HUGE_PAGE_BYTES + 1, HUGE_PAGE_BYTES):
            _advise(mapping[begin : begin + mmap.PAGESIZE], MADV_POPULATE_WRITE)
            _advise(mapping[begin : begin + HUGE_PAGE_BYTES], MADV_COLLAPSE)


def map_read_only(file: int, offset_bytes: int, size_bytes: int, trusted: Path | None = None) -> memoryview:
    """Maps bytes of a file received from a peer, faulted in; the caller still closes the descriptor.

    Raises `ProtocolError` if the file is too short, cannot be mapped, or is not a sealed memory file, unless it is the file at
    `trusted`, which the user has named.
    """
    try:
        status = os.fstat(file)
        if not (_is_harmless(file) or (trusted is not None and os.path.samestat(status, trusted.stat()))):
            raise ProtocolError("the peer passed a file that is neither sealed nor the one named as shared_path")
        if stat.S_ISREG(status.st_mode) and status.st_size < offset_bytes + size_bytes:
            raise ProtocolError("the peer passed a file that ends too soon")
        mapping = _mapped(file, offset_bytes, size_bytes, mmap.PROT_READ)
    except OSError as error:
        raise ProtocolError(f"the file that the peer passed cannot be mapped: {error.strerror}") from None
    with suppress(OSError):  # an older kernel: the first reads pay for the page faults
        _advise(mapping, MADV_POPULATE_READ)
    return mapping


def give_back(mapping: memoryview) -> None:
    """Frees the memory of a file: every process that maps it reads zeros. `mapping` is all of it. Raises `OSError`."""
    _advise(mapping, mmap.MADV_REMOVE)


def _mapped(file: int, offset_bytes: int, size_bytes: int, protection: int) -> memoryview:
    """Raises `OSError`."""
    if not 0 < size_bytes <= _SIZE_BYTES_MAX:
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
    # Python's own mapping reserves the addresses and frees them with the last view; ours lies in the middle of it.
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE
    reserved = memoryview(mmap.mmap(-1, size_bytes + HUGE_PAGE_BYTES, flags=flags, prot=protection))
    begin = -address_of(reserved) % HUGE_PAGE_BYTES
    mapping = reserved[begin : begin + size_bytes]
    address = address_of(mapping)
    mapped = _mmap(address, size_bytes, protection, mmap.MAP_SHARED | MAP_FIXED, file, offset_bytes)
    if mapped != address:
        raise _error()
    return mapping


def _is_harmless(file: int) -> bool:
    try:
        sealed = fcntl.fcntl(file, fcntl.F_GET_SEALS) & fcntl.F_SEAL_SHRINK == fcntl.F_SEAL_SHRINK
    except OSError:  # a file without seals
        return False
    return sealed and os.fstatvfs(file).f_bsize == mmap.PAGESIZE


def _allocate(mapping: memoryview, file: int) -> None:
    """Allocates every page of the file now."""
    allocate_huge_pages(mapping)
    try:
        _advise(mapping, MADV_POPULATE_WRITE)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        os.posix_fallocate(file, 0, len(mapping))


def _advise(mapping: memoryview, advice: int) -> None:
    # Not `mmap.madvise`, which holds the interpreter lock.
    if _madvise(address_of(mapping), len(mapping), advice) != 0:
        raise _error()


def _error() -> OSError:
    number = ctypes.get_errno()
    return OSError(number, os.strerror(number))
