"""One range of addresses that contains the worker's own pool and, next to it, the mapped memory of store nodes.

Owns: the reservation, the pool's memory at its beginning, and the places after it where extents of nodes are mapped a second time.
Invariant: page `i` of the window is the `page_bytes` bytes at `i * page_bytes`, whoever owns that memory. One tensor and plain
block ids therefore name own and foreign pages alike, and one kernel reads both in the same call. An extent stays mapped here
exactly as long as its `MappedExtent` lives. Unmapped pages must not be touched: reading them is a fault.

The alternatives are one partial per region and a merge, which costs every layer a call for each extent, or tables of addresses,
which every attention backend would have to support (docs/decisions/0015-pages-attended-in-place.md). Linux only.
"""

from __future__ import annotations

import ctypes
import math
import mmap
import os
import threading
import weakref
from typing import Final

import torch
from torch import Tensor

from attnstore.client.transports.mapped import MappedExtent
from attnstore.core.layout import PageLayout
from attnstore.errors import InvalidArgument
from attnstore.limits import GIB
from attnstore.memory_files import HUGE_PAGE_BYTES, MADV_POPULATE_READ, MAP_FIXED, MAP_NORESERVE
from attnstore_worker.device.pages import PagePool
from attnstore_worker.dtypes import TORCH_DTYPES

WINDOW_BYTES_MAX: Final = 1024 * GIB
"""Addresses, not memory: a reservation costs nothing until something is mapped."""
_BLOCK_IDS_MAX: Final = (1 << 31) - 1
_UNIT_BYTES_MAX: Final = 1 * GIB
_MREMAP_MAYMOVE: Final = 1
_MREMAP_FIXED: Final = 2
_PROT_NONE: Final = 0
_RESERVED: Final = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE
_MAP_FAILED: Final = ctypes.c_void_p(-1).value

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long)
_libc.mremap.restype = ctypes.c_void_p
_libc.mremap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t, ctypes.c_int, ctypes.c_void_p)
_libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
_libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)


class PageWindow:
    """A window for pages of one layout. Raises `InvalidArgument` if the addresses cannot be reserved.

    >>> window = PageWindow(PageLayout(layers=1, kv_heads=1, head_dim=16, block_tokens=16))
    >>> pool = window.pool(4 * 1024)
    >>> pool.tensor[1] = 0.5
    >>> float(window.tensor[1, 0, 0, 0, 0, 0])
    0.5
    """

    def __init__(self, layout: PageLayout) -> None:
        self._layout = layout
        self._page_bytes = layout.page_bytes
        pages = min(WINDOW_BYTES_MAX // layout.page_bytes, _BLOCK_IDS_MAX)
        self._size_bytes = pages * layout.page_bytes
        reserved_bytes = self._size_bytes + HUGE_PAGE_BYTES  # the window itself begins where huge pages do
        start = _mapped(None, reserved_bytes, _PROT_NONE, _RESERVED)
        self._base = -(-start // HUGE_PAGE_BYTES) * HUGE_PAGE_BYTES
        self._whole = (ctypes.c_char * self._size_bytes).from_address(self._base)
        # A tensor or view of the window refers to this object, which keeps the addresses reserved.
        weakref.finalize(self._whole, _libc.munmap, start, reserved_bytes).atexit = False
        self._unit_bytes = _unit_bytes(layout.page_bytes)
        self._free_at = 0
        self._vacant: dict[int, list[int]] = {}
        self._mapping = threading.Lock()
        self._mapped: weakref.WeakKeyDictionary[MappedExtent, int] = weakref.WeakKeyDictionary()
        flat = torch.frombuffer(self._whole, dtype=TORCH_DTYPES[layout.dtype], count=pages * math.prod(layout.shape))
        self.tensor: Tensor = flat.view(pages, *layout.shape)
        """`[pages, layers, 2, kv_heads, block_tokens, head_dim]`; only mapped pages may be touched."""

    def pool(self, pool_bytes: int) -> PagePool:
        """Returns the worker's own pages: the first pages of the window. May be called once. Raises `PoolTooSmall`."""
        pages = PagePool(self._layout, pool_bytes, allocate=self._allocate)
        pages.attended = self.tensor
        return pages

    def page_of(self, extent: MappedExtent, offset_bytes: int) -> int | None:
        """Returns the window's page for `offset_bytes` of the extent, mapping the extent here if needed. From any thread.

        Returns None if the page is not aligned to the window's pages, or if no addresses are left.
        """
        if offset_bytes % self._page_bytes:
            return None
        with self._mapping:
            at = self._mapped.get(extent)
            if at is None:
                at = self._map(extent)
        return None if at is None else (at + offset_bytes) // self._page_bytes

    def _allocate(self, size_bytes: int) -> memoryview:
        assert self._free_at == 0, "a window has one pool"
        _mapped(self._base, size_bytes, mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_FIXED)
        _libc.madvise(self._base, size_bytes, mmap.MADV_HUGEPAGE)
        self._free_at = -(-size_bytes // self._unit_bytes) * self._unit_bytes
        return memoryview(self._whole).cast("B")[:size_bytes]

    def _map(self, extent: MappedExtent) -> int | None:
        span = -(-extent.size_bytes // self._unit_bytes) * self._unit_bytes
        vacant = self._vacant.setdefault(span, [])
        if vacant:
            at = vacant.pop()
        elif self._free_at + span <= self._size_bytes:
            at, self._free_at = self._free_at, self._free_at + span
        else:
            return None
        flags = _MREMAP_MAYMOVE | _MREMAP_FIXED
        # An old size of 0 requests a second mapping of the same shared pages (mremap(2)).
        if _libc.mremap(extent.address, 0, extent.size_bytes, flags, self._base + at) != self._base + at:
            vacant.append(at)
            return None
        _libc.madvise(self._base + at, extent.size_bytes, MADV_POPULATE_READ)
        weakref.finalize(extent, _vacate, self._whole, self._base + at, extent.size_bytes, vacant, at).atexit = False
        self._mapped[extent] = at
        return at


def _unit_bytes(page_bytes: int) -> int:
    """Returns the alignment of an extent's place: whole pages of the window that begin where the system's (huge) pages do."""
    aligned = math.lcm(page_bytes, HUGE_PAGE_BYTES)
    return aligned if aligned <= _UNIT_BYTES_MAX else math.lcm(page_bytes, mmap.PAGESIZE)


def _mapped(address: int | None, size_bytes: int, protection: int, flags: int) -> int:
    got: int | None = _libc.mmap(address, size_bytes, protection, flags, -1, 0)
    if got is None or got == _MAP_FAILED:
        raise InvalidArgument(
            f"{size_bytes} bytes of addresses for pages used in place are not to be had: {os.strerror(ctypes.get_errno())}; "
            "raise `ulimit -v`, or copy pages instead"
        )
    return got


def _vacate(whole: object, address: int, size_bytes: int, vacant: list[int], at: int) -> None:
    """Removes a mapping and keeps its addresses reserved. `whole` keeps them reserved until then."""
    del whole
    _mapped(address, size_bytes, _PROT_NONE, _RESERVED | MAP_FIXED)
    vacant.append(at)
