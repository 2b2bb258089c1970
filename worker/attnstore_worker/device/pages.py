"""The bytes of a block pool: one allocation of an enforced size, which takes the place of HBM on a machine without it.

Owns: the memory, as a tensor for attention and copies, and as one writable view per page for transfers.
Invariant: a block is the bytes of its page in the order of every other tier, so a transfer is one copy without transformation.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Callable

import torch

from attnstore.core.layout import PageLayout
from attnstore.memory_files import HUGE_PAGE_BYTES
from attnstore_worker.dtypes import element_type
from attnstore_worker.errors import PoolTooSmall


def anonymous_memory(size_bytes: int) -> mmap.mmap:
    """Returns private memory, in huge pages if available: attention reads slices that are a page stride apart."""
    memory = mmap.mmap(-1, size_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE") and size_bytes >= HUGE_PAGE_BYTES:
        memory.madvise(mmap.MADV_HUGEPAGE)
    return memory


def page_capacity(layout: PageLayout, pool_bytes: int) -> int:
    """Returns how many pages fit into a pool of this size. Raises `PoolTooSmall` if not even one does."""
    capacity = pool_bytes // layout.page_bytes
    if capacity < 1:
        raise PoolTooSmall(f"a pool of {pool_bytes} bytes cannot hold one page of {layout.page_bytes} bytes; give it more")
    return capacity


class HostPages:
    """`pool_bytes // layout.page_bytes` pages in memory; never more than `pool_bytes` of pages. The system gives a page its memory
    when it is first written.

    `allocate` returns writable memory of the given size. Raises `PoolTooSmall` if not even one page fits.
    """

    def __init__(
        self, layout: PageLayout, pool_bytes: int, *, allocate: Callable[[int], mmap.mmap | memoryview] = anonymous_memory
    ) -> None:
        self.layout = layout
        self.capacity = page_capacity(layout, pool_bytes)
        self._memory = allocate(self.capacity * layout.page_bytes)
        flat = torch.frombuffer(self._memory, dtype=element_type(layout.dtype), count=self.capacity * math.prod(layout.shape))
        self.tensor = flat.view(self.capacity, *layout.shape)
        self._bytes = memoryview(self._memory)

    def page(self, block_id: int) -> memoryview:
        """Returns the block's page as `page_bytes` writable bytes. Valid as long as the pool."""
        assert 0 <= block_id < self.capacity
        begin = block_id * self.layout.page_bytes
        return self._bytes[begin : begin + self.layout.page_bytes]


class PagePool(HostPages):
    """`HostPages` that have all their memory from the start. Arguments and errors are those of `HostPages`."""

    def __init__(
        self, layout: PageLayout, pool_bytes: int, *, allocate: Callable[[int], mmap.mmap | memoryview] = anonymous_memory
    ) -> None:
        super().__init__(layout, pool_bytes, allocate=allocate)
        self.attended = self.tensor
        """The tensor that attention reads: the pool, followed by other memory if the pool lies in a window."""
        # Touches every page now, because a first touch during a load would cost as much as the copy itself.
        self.tensor.zero_()
