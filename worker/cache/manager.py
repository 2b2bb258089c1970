"""The worker's KV manager: which tier a sequence's blocks come from and where they go when they are sealed.

Owns: the block pool with its pages, and the transfers between it and the store.
Invariant: a block that a transfer reads or writes is held until that transfer is over, and only pages that came whole and
verified are ever given to a sequence. One thread (the engine's) calls everything here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from attnstore.clock import Clock
from attnstore.core.eviction import EvictionPolicy
from attnstore.core.hashing import BlockHash, Namespace, block_hash, block_hashes
from attnstore.errors import Overloaded
from attnstore.types import Lease
from worker.cache.block_pool import BlockPool, BlockPoolStatistics
from worker.cache.block_table import BlockTable
from worker.cache.pages import PagePool
from worker.cache.remote import RemoteStatistics, RemoteTier
from worker.cache.swap_in import SwapIn
from worker.cache.swap_out import SwapOut

_GRACE_MS = 250.0
"""How much longer than a store's own deadline the engine waits before it gives a transfer up."""
_POLL_MS = 5.0


@dataclass(frozen=True, slots=True)
class Admission:
    """What was found of a prompt. Tokens count whole blocks; `bytes_read` came over the network."""

    table: BlockTable
    local_tokens: int
    remote_tokens: int
    bytes_read: int
    match_ms: float
    read_ms: float

    @property
    def hit_tokens(self) -> int:
        """Tokens that need no prefill."""
        return self.local_tokens + self.remote_tokens


@dataclass(frozen=True, slots=True)
class CacheStatistics:
    """A snapshot of the manager. `swap_out_dropped`: sealed blocks that were never sent, for lack of queue or of blocks."""

    pool: BlockPoolStatistics
    remote: RemoteStatistics
    swap_out_pending: int
    swap_out_dropped: int
    quarantined: int


class CacheManager:
    """Block tables for sequences. Without `remote` the pool is the only tier. `policy` orders the pool's evictions (default: least
    recently used).
    """

    def __init__(
        self,
        pages: PagePool,
        namespace: Namespace,
        *,
        remote: RemoteTier | None,
        clock: Clock,
        policy: EvictionPolicy[BlockHash] | None = None,
    ) -> None:
        self.pages = pages
        self._namespace = namespace
        self._clock = clock
        self._pool = BlockPool(pages.capacity, policy)
        self._remote = remote
        self._swap_out = SwapOut(self._write_batch, queue_blocks_max=pages.capacity) if remote is not None else None
        self._quarantine: list[SwapIn] = []
        self._dropped = 0

    @property
    def block_tokens(self) -> int:
        """Tokens of one block."""
        return self.pages.layout.block_tokens

    @property
    def capacity_tokens(self) -> int:
        """Tokens of the longest sequence that fits into the pool."""
        return self.pages.capacity * self.block_tokens

    @property
    def available_blocks(self) -> int:
        """Blocks that could be given out without waiting, among them those that are held only by the queue to the store."""
        self._reap()
        queued = self._swap_out.queued(self._is_held_once) if self._swap_out is not None else 0
        return self._pool.available + queued

    def connect(self) -> None:
        """Prepares the store connection, if there is a store, ahead of the first request."""
        if self._remote is not None:
            self._remote.connect()

    def announce(self, token_ids: Sequence[int]) -> list[BlockHash]:
        """Tells the eviction policy that a prompt waits behind all others; returns the blocks that `settle` takes back."""
        usable = (len(token_ids) - 1) // self.block_tokens
        hashes = block_hashes(self._namespace, token_ids[: usable * self.block_tokens], self.block_tokens)
        self._pool.announce(hashes)
        return hashes

    def settle(self, announced: Sequence[BlockHash]) -> None:
        """An announced prompt waits no longer: it is about to be admitted, or was cancelled."""
        self._pool.settle(announced)

    def admit(self, token_ids: Sequence[int]) -> Admission:
        """A table for a prompt, with the longest prefix of whole blocks that the pool and then the store have.

        At most all tokens but the last: that one must be computed to have logits. Raises `Overloaded` where the hit pages find
        no room because transfers hold the whole pool.
        """
        usable = (len(token_ids) - 1) // self.block_tokens
        hashes = block_hashes(self._namespace, token_ids, self.block_tokens)
        table = BlockTable(self.block_tokens, self._pool.hold_prefix(hashes[:usable]), hashes)
        table.sealed = local = len(table.block_ids)
        if self._remote is None or local == usable:
            return Admission(table, local * self.block_tokens, 0, 0, 0.0, 0.0)
        started_ms = self._clock.now_ms()
        found = self._remote.match(hashes[local:usable])
        matched_ms = self._clock.now_ms()
        bytes_read = 0
        if found.hits[0]:
            try:
                transfer = self._start_swap_in(self._remote, hashes[local : local + found.hits[0]], found.lease)
            except Overloaded:
                self._remote.release(found.lease)
                self.release(table)
                raise
            bytes_read = self._finish_swap_in(self._remote, table, transfer)
        read_ms = self._clock.now_ms() - matched_ms
        remote_tokens = (table.sealed - local) * self.block_tokens
        return Admission(table, local * self.block_tokens, remote_tokens, bytes_read, matched_ms - started_ms, read_ms)

    def admit_nothing(self) -> Admission:
        """An empty table for a sequence whose content matters to nobody."""
        return Admission(BlockTable(self.block_tokens), 0, 0, 0, 0.0, 0.0)

    def grow(self, table: BlockTable, tokens: int) -> None:
        """Gives the table blocks for `tokens` tokens. Raises `Overloaded` where others hold all blocks."""
        missing = -(-tokens // self.block_tokens) - len(table.block_ids)
        table.block_ids += self._allocate(missing)

    def seal(self, table: BlockTable, token_ids: Sequence[int], computed_tokens: int) -> None:
        """Seals the blocks that `computed_tokens` completed, makes them findable and starts their way to the store."""
        for index in range(table.sealed, computed_tokens // self.block_tokens):
            if index == len(table.hashes):
                parent = table.hashes[-1] if table.hashes else self._namespace
                block = token_ids[index * self.block_tokens : (index + 1) * self.block_tokens]
                table.hashes.append(block_hash(parent, block))
            if self._pool.seal(table.block_ids[index], table.hashes[index]):
                self._start_swap_out(table.hashes[index], table.block_ids[index])
            table.sealed = index + 1

    def release(self, table: BlockTable) -> None:
        """Ends a sequence's hold. Its tail is evicted before its head, because a prefix needs its head."""
        self._pool.release(reversed(table.block_ids))
        table.block_ids.clear()
        self._reap()

    def flush(self, timeout_ms: float) -> bool:
        """Waits until all sealed blocks are written or refused. False when time ran out."""
        flushed = self._swap_out is None or self._swap_out.flush(timeout_ms)
        self._reap()
        return flushed

    def close(self) -> None:
        """Ends write-behind; what is still queued is not written."""
        if self._swap_out is not None:
            self._swap_out.close()
        self._reap()

    def statistics(self) -> CacheStatistics:
        """A snapshot."""
        return CacheStatistics(
            pool=self._pool.statistics(),
            remote=self._remote.statistics() if self._remote is not None else RemoteStatistics(),
            swap_out_pending=self._swap_out.pending if self._swap_out is not None else 0,
            swap_out_dropped=self._dropped,
            quarantined=sum(len(transfer.block_ids) for transfer in self._quarantine),
        )

    def check(self) -> None:
        """Asserts the conservation of blocks."""
        self._pool.check()

    def _start_swap_in(self, remote: RemoteTier, hashes: Sequence[BlockHash], lease: Lease | None) -> SwapIn:
        block_ids = self._allocate(len(hashes))
        buffers = [self.pages.page(block_id) for block_id in block_ids]
        return SwapIn(block_ids, lambda: remote.read(hashes, buffers, lease))

    def _finish_swap_in(self, remote: RemoteTier, table: BlockTable, transfer: SwapIn) -> int:
        """Moves the leading verified pages into the table; returns the bytes that were read."""
        result = transfer.wait(remote.deadline_ms + _GRACE_MS)
        if result is None:
            self._quarantine.append(transfer)
            return 0
        hits = result.leading_hits
        for block_id in transfer.block_ids[:hits]:
            self._pool.seal(block_id, table.hashes[len(table.block_ids)])
            table.block_ids.append(block_id)
        table.sealed = len(table.block_ids)
        self._pool.release(transfer.block_ids[hits:])
        return result.bytes_read

    def _start_swap_out(self, block_hash: BlockHash, block_id: int) -> None:
        if self._swap_out is None:
            return
        self._pool.hold(block_id)
        if not self._swap_out.offer(block_hash, block_id):
            self._dropped += 1
            self._pool.release([block_id])

    def _write_batch(self, hashes: Sequence[BlockHash], block_ids: Sequence[int]) -> None:
        assert self._remote is not None
        self._remote.write(hashes, [self.pages.page(block_id) for block_id in block_ids])

    def _allocate(self, blocks: int) -> list[int]:
        self._reap()
        block_ids: list[int] = []
        try:
            while len(block_ids) < blocks:
                if not self._pool.available:
                    self._reclaim()
                block_ids.append(self._pool.allocate())
        except Overloaded:
            self._pool.release(block_ids)
            raise
        return block_ids

    def _reclaim(self) -> None:
        """Gets a block back from transfers: first one that is only queued for the store, else whatever ends in time."""
        swap_out = self._swap_out
        if swap_out is None or self._remote is None:
            return
        cancelled = swap_out.cancel_newest(self._is_held_once)
        if cancelled is not None:
            self._dropped += 1
            self._pool.release([cancelled])
            return
        give_up_ms = self._clock.now_ms() + self._remote.deadline_ms + _GRACE_MS
        while not self._pool.available and self._in_flight() and self._clock.now_ms() < give_up_ms:
            swap_out.wait_finished(_POLL_MS)
            self._reap()

    def _is_held_once(self, block_id: int) -> bool:
        return self._pool.holders(block_id) == 1

    def _in_flight(self) -> bool:
        return bool(self._quarantine) or (self._swap_out is not None and self._swap_out.pending > 0)

    def _reap(self) -> None:
        """Releases the blocks of transfers that are over."""
        if self._swap_out is not None:
            self._pool.release(self._swap_out.take_finished())
        for transfer in [transfer for transfer in self._quarantine if transfer.done]:
            self._quarantine.remove(transfer)
            self._pool.release(transfer.block_ids)
