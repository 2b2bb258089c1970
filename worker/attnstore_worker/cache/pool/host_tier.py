"""The HOST tier: host memory for sealed blocks that the HBM pool evicts, from which they return without the network.

Owns: a second pool of an enforced size, with a prefix cache and an eviction policy of its own. It is a `BlockPool` over a
`PagePool` like HBM, so the same conservation holds and the same check verifies it.
Invariant: a page here is the whole sealed page of its hash; a page that is being copied up is held and cannot be evicted meanwhile.
A page that was copied up stays, so evicting it from HBM again costs no copy. Only the engine's thread calls it.

`HostTier` copies at once. `PinnedHostTier` lets a device with memory of its own copy: a page is findable when its copy down is
submitted. It is copied up, and read by the host, after that copy; its slot is overwritten after the copies up that may read it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

from torch import Tensor

from attnstore.core.eviction import EvictionPolicy
from attnstore.core.hashing import BlockHash
from attnstore.core.layout import PageLayout
from attnstore.errors import Overloaded
from attnstore_worker.cache.pool.block_pool import BlockPool, BlockPoolStatistics
from attnstore_worker.cache.pool.device_blocks import DeviceBlocks
from attnstore_worker.device.base import Event, Wait
from attnstore_worker.device.pages import PagePool
from attnstore_worker.errors import DeviceLost

OnEvict = Callable[[BlockHash, memoryview], None]
"""Called with a page that leaves the tier; its bytes are valid until the call returns."""


_Block = TypeVar("_Block")
"""How a block of HBM is named: by its tensor of the shape of the layout, or by its number."""


class HostPages(ABC, Generic[_Block]):
    """The pages of `pages` that are kept, and the order in which they leave."""

    def __init__(self, pages: PagePool, policy: EvictionPolicy[BlockHash] | None) -> None:
        self._pages = pages
        self._pool = BlockPool(pages.capacity, policy, on_evict=self._leaving)
        self.on_evict: OnEvict | None = None
        """Called with each page that leaves the tier; None: nobody reads it."""

    def __contains__(self, block_hash: BlockHash) -> bool:
        """Returns whether the page is here."""
        return block_hash in self._pool

    def keep(self, block_hash: BlockHash, page: _Block) -> bool:
        """Copies a page that HBM evicts; a page that is already here only counts as used.

        Returns False if there is no room, because every slot is being copied up, or if the device is lost.
        """
        slots = self._pool.hold_prefix([block_hash]) or self._copied_down(block_hash, page)
        self._pool.release(slots)
        return bool(slots)

    def hold_prefix(self, hashes: Sequence[BlockHash]) -> list[int]:
        """Returns the slots of the longest prefix of `hashes` that is here, kept in place until `release`."""
        return self._pool.hold_prefix(hashes)

    @abstractmethod
    def copy_all_up(self, slots: Sequence[int], pages: Sequence[_Block]) -> None:
        """Copies the pages of held slots to their places in HBM. Raises `DeviceLost`."""

    def release(self, slots: Sequence[int]) -> None:
        """Ends a hold. The tail of a prefix is evicted before its head."""
        self._pool.release(reversed(slots))

    def announce(self, hashes: Sequence[BlockHash]) -> None:
        """As `BlockPool.announce`."""
        self._pool.announce(hashes)

    def settle(self, hashes: Sequence[BlockHash]) -> None:
        """As `BlockPool.settle`."""
        self._pool.settle(hashes)

    def statistics(self) -> BlockPoolStatistics:
        """A snapshot, in pages."""
        return self._pool.statistics()

    def check(self) -> None:
        """Asserts the conservation of slots."""
        self._pool.check()

    def _copied_down(self, block_hash: BlockHash, page: _Block) -> list[int]:
        try:
            slot = self._pool.allocate()
        except Overloaded:
            return []
        if not self._copy_down(page, slot):
            self._pool.release([slot])
            return []
        self._pool.seal(slot, block_hash)
        return [slot]

    @abstractmethod
    def _copy_down(self, page: _Block, slot: int) -> bool:
        """Returns False if the device is lost."""

    def _leaving(self, block_hash: BlockHash, slot: int) -> None:
        if self.on_evict is not None:
            self.on_evict(block_hash, self._pages.page(slot))


class HostTier(HostPages[Tensor]):
    """`pool_bytes // layout.page_bytes` pages in host memory, for blocks in host memory.

    `policy` is the tier's own (default: least recently used). Raises `PoolTooSmall` if not even one page fits.
    """

    def __init__(self, layout: PageLayout, pool_bytes: int, policy: EvictionPolicy[BlockHash] | None = None) -> None:
        super().__init__(PagePool(layout, pool_bytes), policy)

    def copy_up(self, slot: int, page: Tensor) -> None:
        """Copies a held slot's page to its place in HBM."""
        assert self._pool.holders(slot)
        page.copy_(self._pages.tensor[slot])

    def copy_all_up(self, slots: Sequence[int], pages: Sequence[Tensor]) -> None:
        """Copies one page after the other."""
        for slot, page in zip(slots, pages, strict=True):
            self.copy_up(slot, page)

    def _copy_down(self, page: Tensor, slot: int) -> bool:
        self._pages.tensor[slot].copy_(page)
        return True


class PinnedHostTier(HostPages[int]):
    """`HostTier` for the blocks of a device with memory of its own, which are named by their numbers."""

    def __init__(self, blocks: DeviceBlocks, pool_bytes: int, policy: EvictionPolicy[BlockHash] | None = None) -> None:
        super().__init__(blocks.device.host_pages(blocks.layout, pool_bytes), policy)
        self._blocks = blocks
        self._down: dict[int, tuple[int, Event]] = {}  # by slot, with the number of the copy
        self._copied_down_pages = 0

    def copy_all_up(self, slots: Sequence[int], pages: Sequence[int]) -> None:
        """Submits the copies. A slot may be released at once: a copy down into it waits for them."""
        if not slots:
            return
        after = self._blocks.overwriting(pages)
        down = [self._down[slot] for slot in slots if slot in self._down]
        if down:
            after.append((Wait.HOST_UP_AFTER_DOWN, max(down, key=lambda copied: copied[0])[1]))
        self._blocks.copy_up(self._pages.tensor, slots, pages, after)

    def _copy_down(self, page: int, slot: int) -> bool:
        event = self._blocks.copy_down(page, self._pages.tensor, slot)
        if event is None:
            return False
        self._copied_down_pages += 1
        self._down[slot] = self._copied_down_pages, event
        return True

    def _leaving(self, block_hash: BlockHash, slot: int) -> None:
        copied = self._down.pop(slot, None)
        if self.on_evict is None:
            return
        try:
            if copied is not None:
                copied[1].wait(Wait.HOST_READ_AFTER_DOWN)
        except DeviceLost:
            return
        if (accesses := self._blocks.device.accesses) is not None:
            accesses.host(self._pages.tensor, [slot], writes=False)
        super()._leaving(block_hash, slot)
