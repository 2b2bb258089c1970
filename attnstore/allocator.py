"""Makes the C library's allocator keep freed memory.

Owns: one setting of a process that moves pages over gRPC. gRPC allocates and frees memory for every message. By default glibc
returns blocks of that size to the kernel and gets them back page by page, zeroed, which costs about as much as copying a message.
Only for our own programs (node, worker): a library must not decide this for its host.
"""

from __future__ import annotations

import ctypes

from attnstore.limits import MIB

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3
_KEPT_BYTES = 64 * MIB
_MMAP_THRESHOLD_BYTES = 32 * MIB  # glibc's own maximum


def keep_freed_memory() -> bool:
    """Keeps up to 64 MiB of freed memory for reuse. Returns False, without effect, if the C library is not glibc."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):
        return False
    settings = ((_M_MMAP_THRESHOLD, _MMAP_THRESHOLD_BYTES), (_M_TRIM_THRESHOLD, _KEPT_BYTES), (_M_TOP_PAD, _KEPT_BYTES // 4))
    return all([mallopt(name, value) == 1 for name, value in settings])
