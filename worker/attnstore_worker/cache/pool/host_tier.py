"""The HOST tier: host memory for sealed blocks that the HBM pool evicts, from which they return without the network.

Owns: a second pool of an enforced size, with a prefix cache and an eviction policy of its own. It is a `BlockPool` over a
`PagePool` like HBM, so the same conservation holds and the same check verifies it.
Invariant: a page here is the whole sealed page of its hash; a page that is being copied up is held and cannot be evicted meanwhile.
A page that was copied up stays, so evicting it from HBM again costs no copy. Only the engine's thread calls it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from attnstore.core.eviction import EvictionPolicy
from attnstore.core.hashing import BlockHash
from attnstore.core.layout import PageLayout
from attnstore.errors import Overloaded
from attnstore_worker.cache.pool.block_pool import BlockPool, BlockPoolStatistics
from attnstore_worker.device.pages import PagePool

OnEvict = Callable[[BlockHash, memoryview], None]
"""Called with a page that leaves the tier; its bytes are valid until the call returns."""


class HostTier:
    """`pool_bytes // layout.page_bytes` pages in host memory.

    `policy` is the tier's own (default: least recently used). Raises `PoolTooSmall` if not even one page fits.
    """

    def __init__(self, layout: PageLayout, pool_bytes: int, policy: EvictionPolicy[BlockHash] | None = None) -> None:
        self._pages = PagePool(layout, pool_bytes)
        self._pool = BlockPool(self._pages.capacity, policy, on_evict=self._leaving)
        self.on_evict: OnEvict = _forget

    def __contains__(self, block_hash: BlockHash) -> bool:
        """Returns whether the page is here."""
        return block_hash in self._pool

    def keep(self, block_hash: BlockHash, page: Tensor) -> bool:
        """Copies a page that HBM evicts; a page that is already here only counts as used. `page` has the shape of the layout.

        Returns False if there is no room, because every slot is being copied up.
        """
        slots = self._pool.hold_prefix([block_hash]) or self._copied_down(block_hash, page)
        self._pool.release(slots)
        return bool(slots)

    def hold_prefix(self, hashes: Sequence[BlockHash]) -> list[int]:
        """Returns the slots of the longest prefix of `hashes` that is here, kept in place until `release`."""
        return self._pool.hold_prefix(hashes)

    def copy_up(self, slot: int, page: Tensor) -> None:
        """Copies a held slot's page to its place in HBM."""
        assert self._pool.holders(slot)
        page.copy_(self._pages.tensor[slot])

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

    def _copied_down(self, block_hash: BlockHash, page: Tensor) -> list[int]:
        try:
            slot = self._pool.allocate()
        except Overloaded:
            return []
        self._pages.tensor[slot].copy_(page)
        self._pool.seal(slot, block_hash)
        return [slot]

    def _leaving(self, block_hash: BlockHash, slot: int) -> None:
        self.on_evict(block_hash, self._pages.page(slot))


def _forget(block_hash: BlockHash, page: memoryview) -> None:
    del block_hash, page
