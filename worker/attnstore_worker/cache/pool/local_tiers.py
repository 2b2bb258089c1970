"""The tiers inside the worker: the HBM pool and, if there is one, HOST below it.

Owns: the copies of blocks between the two. Invariant: a prompt's leading blocks are found in both tiers, in any mixture. The blocks
found in HOST are held there until they are copied up, so that blocks which HBM evicts to make room for them cannot push them out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

from attnstore.core.eviction import EvictionPolicy
from attnstore.core.hashing import BlockHash
from attnstore_worker.cache.pool.block_pool import BlockPool
from attnstore_worker.cache.pool.device_blocks import DeviceBlocks
from attnstore_worker.cache.pool.host_tier import HostPages
from attnstore_worker.cache.pool.tier import Tier, TierCounter
from attnstore_worker.device.pages import PagePool


@dataclass(frozen=True, slots=True)
class LocalPrefix:
    """The leading blocks that were found, each with one more holder; `from_host` of them were copied up."""

    block_ids: list[int]
    from_host: int


class LocalTiers:
    """`pool` is the HBM pool, `policy` its own (default: least recently used); `leaving` is called with the blocks of the pool that
    leave the worker. `host` is a `HostTier`, or a `PinnedHostTier` of the same `DeviceBlocks`.
    """

    def __init__(
        self,
        pages: PagePool | DeviceBlocks,
        policy: EvictionPolicy[BlockHash] | None,
        host: HostPages[Any] | None,
        counter: TierCounter,
        leaving: Callable[[BlockHash, int], None],
    ) -> None:
        self._host = host
        self._counter = counter
        self._leaving = leaving
        self._block: Callable[[int], Any] = pages.tensor.__getitem__ if isinstance(pages, PagePool) else int
        self.pool = BlockPool(pages.capacity, policy, on_evict=self._move_down)

    def hold_prefix(self, hashes: Sequence[BlockHash], allocate: Callable[[int], list[int]]) -> LocalPrefix:
        """Holds the longest prefix of `hashes` that the tiers have. Raises `Overloaded`, with nothing held, if `allocate` does."""
        if self._host is None:
            found = LocalPrefix(self.pool.hold_prefix(hashes), 0)
        else:
            found = self._hold_in_both(self._host, hashes, allocate)
            self._counter.queried(Tier.HOST, len(hashes) - len(found.block_ids) + found.from_host)
            self._counter.copied(Tier.HOST, found.from_host)
        self._counter.queried(Tier.HBM, len(hashes))
        self._counter.used_in_place(Tier.HBM, len(found.block_ids) - found.from_host)
        return found

    def prefix_blocks(self, hashes: Sequence[BlockHash]) -> tuple[int, int]:
        """Returns how many leading blocks of `hashes` the tiers have now, and how many of them only HOST has. Holds nothing, and
        does not count as use.
        """

        def is_here(block_hash: BlockHash) -> bool:
            return block_hash in self.pool or (self._host is not None and block_hash in self._host)

        here = list(takewhile(is_here, hashes))
        return len(here), sum(block_hash not in self.pool for block_hash in here)

    def evicted_blocks(self) -> dict[Tier, int]:
        """Returns how many blocks left each tier since the start."""
        evicted = {Tier.HBM: self.pool.statistics().evicted}
        if self._host is not None:
            evicted[Tier.HOST] = self._host.statistics().evicted
        return evicted

    def announce(self, hashes: Sequence[BlockHash]) -> None:
        """As `BlockPool.announce`, of every tier."""
        self.pool.announce(hashes)
        if self._host is not None:
            self._host.announce(hashes)

    def settle(self, hashes: Sequence[BlockHash]) -> None:
        """As `BlockPool.settle`, of every tier."""
        self.pool.settle(hashes)
        if self._host is not None:
            self._host.settle(hashes)

    def check(self) -> None:
        """Asserts the conservation of blocks in every tier."""
        self.pool.check()
        if self._host is not None:
            self._host.check()

    def _hold_in_both(self, host: HostPages[Any], hashes: Sequence[BlockHash], allocate: Callable[[int], list[int]]) -> LocalPrefix:
        block_ids: dict[int, int] = {}
        slots: dict[int, int] = {}
        for index, block_hash in enumerate(hashes):
            for found, pool in ((block_ids, self.pool), (slots, host)):
                if held := pool.hold_prefix([block_hash]):
                    found[index] = held[0]
                    break
            else:
                break
        try:
            block_ids.update(zip(slots, allocate(len(slots)), strict=True))
            host.copy_all_up(list(slots.values()), [self._block(block_ids[index]) for index in slots])
        except BaseException:
            self.pool.release(reversed(block_ids.values()))
            raise
        finally:
            host.release(list(slots.values()))
        for index in slots:
            self.pool.seal(block_ids[index], hashes[index])
        return LocalPrefix([block_ids[index] for index in range(len(block_ids))], len(slots))

    def _move_down(self, block_hash: BlockHash, block_id: int) -> None:
        if self._host is None or not self._host.keep(block_hash, self._block(block_id)):
            self._leaving(block_hash, block_id)
