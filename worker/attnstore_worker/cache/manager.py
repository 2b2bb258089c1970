"""The worker's block tables: which blocks a sequence has, from which tier they come, and where they go when they are sealed.

Owns: the block pool with its pages, the tiers beside it, and the life of a table from `admit` to `release`.
Invariant: a block that a transfer reads or writes is held until the transfer is over. Only the engine's thread calls it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

from attnstore.clock import Clock
from attnstore.core.eviction import EvictionPolicy
from attnstore.core.hashing import BlockHash, Namespace, block_hash, block_hashes
from attnstore.errors import Overloaded
from attnstore_worker.cache.loads import Loads
from attnstore_worker.cache.moving.load import Load, Planner, Prompt
from attnstore_worker.cache.moving.mover import Mover
from attnstore_worker.cache.moving.staged_reads import StagedReads
from attnstore_worker.cache.moving.staging import Staging
from attnstore_worker.cache.moving.writers import create_writer
from attnstore_worker.cache.planning.fixed_planners import FetchAhead, FetchAll
from attnstore_worker.cache.planning.observation import Observer, Unobserved
from attnstore_worker.cache.pool.block_pool import BlockPoolStatistics
from attnstore_worker.cache.pool.block_table import BlockTable
from attnstore_worker.cache.pool.device_blocks import DeviceBlocks
from attnstore_worker.cache.pool.host_tier import HostTier, PinnedHostTier
from attnstore_worker.cache.pool.local_tiers import LocalTiers
from attnstore_worker.cache.pool.tier import Tier, TierCounter, TierStatistics
from attnstore_worker.cache.store.base import Lender
from attnstore_worker.cache.store.remote import RemoteStatistics, RemoteTier
from attnstore_worker.cache.store.shared_copies import SharedCopies
from attnstore_worker.device.pages import PagePool

_GRACE_MS = 250.0
"""How much longer than the store's own deadline a caller waits for a block that a transfer holds."""
_POLL_MS = 5.0


@dataclass(frozen=True, slots=True)
class CacheStatistics:
    """A snapshot. `swap_out_dropped`: sealed blocks that were never sent, for lack of queue or of blocks."""

    tiers: Mapping[Tier, TierStatistics]
    pool: BlockPoolStatistics
    remote: RemoteStatistics
    swap_out_pending: int
    swap_out_dropped: int
    quarantined: int


class CacheManager:
    """Block tables for sequences; `loads` fills them from the store. `pages` are blocks in host memory, or those of a device.

    `policy` orders the pool's evictions (default: least recently used), which go down to `host`. `remote` is the store, `lender`
    lets its pages be used in place, `shared` copies them from a node's memory to the blocks of a device. Without these the pool is
    the only tier. `planner` decides about loads (default: fetch all), `observer` is told of them.
    """

    def __init__(
        self,
        pages: PagePool | DeviceBlocks,
        namespace: Namespace,
        *,
        remote: RemoteTier | None,
        clock: Clock,
        policy: EvictionPolicy[BlockHash] | None = None,
        host: HostTier | PinnedHostTier | None = None,
        lender: Lender | None = None,
        shared: SharedCopies | None = None,
        planner: Planner | None = None,
        observer: Observer | None = None,
        write_policy: str = "write-behind",
    ) -> None:
        self.pages = pages
        self._namespace = namespace
        self._clock = clock
        self._tiers = TierCounter(pages.layout.block_tokens, pages.layout.page_bytes)
        self._local = LocalTiers(pages, policy, host, self._tiers, self._leaving)
        self._pool = self._local.pool
        self._lender = lender
        self._remote = remote
        self._staging = Staging(pages.device, pages.layout, pages.capacity) if isinstance(pages, DeviceBlocks) else None
        self._writer = create_writer(write_policy, self._pool, pages, remote)
        if host is not None and self._writer.writes_evicted:
            host.on_evict = self._writer.evicted
        self._planner = planner or FetchAll(remote.deadline_ms if remote is not None else 0.0)
        self._mover = Mover(clock)
        observer = observer or Unobserved()
        self.before_step: Callable[[], None] = _no_copies
        """Called before every step of the model, which waits for the copies that concern it."""
        places: PagePool | StagedReads
        if isinstance(pages, DeviceBlocks):
            assert self._staging is not None
            self.before_step = pages.before_step
            places = StagedReads(pages, self._staging, clock, shared)
        else:
            places = pages
        self.loads = Loads(self._pool, places, self._mover, remote, lender, self._writer, self._tiers, observer, clock)
        self._admissions = 0

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
        """Blocks available without waiting, including those held only by the queue to the store."""
        self._reap()
        return self._pool.available + self._writer.reclaimable

    def connect(self) -> None:
        """Prepares the store connection, if there is a store, ahead of the first request."""
        if self._remote is not None:
            self._remote.connect()

    def announce(self, token_ids: Sequence[int], hashes: list[BlockHash], extra_keys: Sequence[bytes] = ()) -> list[BlockHash]:
        """Announces to the eviction policy a prompt that waits behind all others. Returns the blocks to pass to `settle`.

        `hashes` are the known names of the sequence's first blocks; missing ones are appended. `extra_keys` are part of the names
        of all its blocks: sequences with different keys share none.
        """
        self._name_blocks(token_ids, hashes, extra_keys)
        announced = hashes[: self._usable_blocks(token_ids)]
        self._local.announce(announced)
        return announced

    def settle(self, announced: Sequence[BlockHash]) -> None:
        """Ends an announcement: the prompt is about to be admitted, or was cancelled."""
        self._local.settle(announced)

    def admit(self, token_ids: Sequence[int], hashes: list[BlockHash], extra_keys: Sequence[bytes] = ()) -> tuple[BlockTable, Load]:
        """Returns a table with blocks for all tokens, filled with the longest prefix in HBM and HOST, and a load for more, which
        may be running.

        At most all tokens but the last are taken from a cache: the last one is computed for its logits. `hashes`, `extra_keys` as
        in `announce`. Raises `Overloaded`, with nothing held, if transfers and other sequences hold the blocks.
        """
        table, usable, host_blocks = self._resident_table(token_ids, hashes, extra_keys)
        with self._unless_raised(table):
            self.grow(table, len(token_ids))
            prompt = self._new_prompt(len(token_ids), table.sealed, usable, host_blocks)
            load, job = self.loads.prepare(table, prompt, self._planner)
            if job is not None:
                self._mover.start(job)
            return table, load

    def prefetch(
        self, token_ids: Sequence[int], hashes: list[BlockHash], spare_blocks: int, extra_keys: Sequence[bytes] = ()
    ) -> tuple[BlockTable, Load] | None:
        """Returns a table and a load for a waiting sequence. Returns None if the planner wants none, if more than `spare_blocks`
        are needed, or if pages are used in place and need no fetching.

        `Loads.advance` takes its pages into the pool; call `Loads.abandon` and `release` when it is over or its blocks are needed.
        """
        usable = self._usable_blocks(token_ids)
        if self._remote is None or self._lender is not None or usable > min(spare_blocks, self._pool.available):
            return None
        table, usable, host_blocks = self._resident_table(token_ids, hashes, extra_keys)
        with self._unless_raised(table):
            prompt = self._new_prompt(len(token_ids), table.sealed, usable, host_blocks)
            if table.sealed < usable and self._planner.prefetches(prompt):
                self.grow(table, usable * self.block_tokens)
                load, job = self.loads.prepare(table, prompt, FetchAhead(self._remote.deadline_ms), observed=False)
                if job is not None:
                    self._mover.start(job)
                    return table, load
        self.release(table)
        return None

    def prompt(
        self,
        token_ids: Sequence[int],
        hashes: list[BlockHash],
        extra_keys: Sequence[bytes] = (),
        *,
        resident_blocks: int | None = None,
    ) -> Prompt:
        """Returns the facts for a decision about these tokens, with the blocks that are here now or `resident_blocks` of them, as
        if the store had all others. `hashes`, `extra_keys` as in `announce`.
        """
        self._name_blocks(token_ids, hashes, extra_keys)
        usable, host_blocks = self._usable_blocks(token_ids), 0
        if resident_blocks is None:
            resident_blocks, host_blocks = self._local.prefix_blocks(hashes[:usable])
        return self._new_prompt(len(token_ids), resident_blocks, usable, host_blocks)

    def grow(self, table: BlockTable, tokens: int) -> None:
        """Gives the table blocks for `tokens` tokens. Raises `Overloaded` if others hold all blocks."""
        missing = -(-tokens // self.block_tokens) - table.blocks
        table.block_ids += self._allocate(missing)

    def seal(self, table: BlockTable, token_ids: Sequence[int], computed_tokens: int) -> None:
        """Seals the blocks that `computed_tokens` completed, makes them findable and starts writing them to the store."""
        for index in range(table.sealed, computed_tokens // self.block_tokens):
            if index == len(table.hashes):
                parent = table.hashes[-1] if table.hashes else self._namespace
                block = token_ids[index * self.block_tokens : (index + 1) * self.block_tokens]
                table.hashes.append(block_hash(parent, block, table.extra_keys))
            block_id = table.block_ids[index - table.remote_blocks]
            if self._pool.seal(block_id, table.hashes[index]):
                self._writer.sealed(table.hashes[index], block_id)
            table.sealed = index + 1

    def end_step(self) -> None:
        """Called when all blocks that a step completed are sealed: waits for their writes, if the write policy says so."""
        self._writer.end_step()

    def release(self, table: BlockTable) -> None:
        """Releases a sequence's blocks. Its tail is evicted before its head, because a prefix needs its head."""
        self._pool.release(reversed(table.own_block_ids))
        table.block_ids.clear()
        if table.lent is not None:
            table.lent.release()
            table.lent = None
        table.remote_blocks = 0
        self._reap()

    def let_stay(self, table: BlockTable, remote_blocks: int) -> None:
        """Leaves the first `remote_blocks` blocks to be attended to in the store: releases those that are here."""
        own = set(table.own_block_ids)
        given_up = table.block_ids[: remote_blocks - table.remote_blocks]
        del table.block_ids[: len(given_up)]
        table.remote_blocks = remote_blocks
        table.sealed = max(table.sealed, remote_blocks)
        self._pool.release(block_id for block_id in reversed(given_up) if block_id in own)

    def offer_again(self, table: BlockTable, blocks: range) -> None:
        """Writes sealed blocks to the store again, which refused or lost them."""
        for block in blocks:
            self._writer.sealed(table.hashes[block], table.block_ids[block - table.remote_blocks])

    def drop_cached(self) -> None:
        """Evicts every block that no sequence and no transfer holds; a tier below the pool receives them as usual."""
        self._reap()
        self._pool.drop_evictable()

    def flush(self, timeout_ms: float) -> bool:
        """Waits until every page on its way to the store is written or refused. Returns False if time ran out."""
        flushed = self._writer.flush(timeout_ms)
        self._reap()
        return flushed

    def close(self) -> None:
        """Stops writing; queued pages are not written."""
        with ExitStack() as closing:
            closing.callback(self._reap)
            if self._lender is not None:
                closing.callback(self._lender.close)
            closing.callback(self._writer.close)

    def statistics(self) -> CacheStatistics:
        """A snapshot."""
        return CacheStatistics(
            tiers=self._tiers.statistics(self._local.evicted_blocks()),
            pool=self._pool.statistics(),
            remote=self._remote.statistics() if self._remote is not None else RemoteStatistics(),
            swap_out_pending=self._writer.pending,
            swap_out_dropped=self._writer.dropped,
            quarantined=self.loads.quarantined,
        )

    def check(self) -> None:
        """Asserts the conservation of blocks, and of the slots of staging."""
        self._local.check()
        if self._staging is not None:
            self._staging.check()

    @contextmanager
    def _unless_raised(self, table: BlockTable) -> Iterator[None]:
        try:
            yield
        except BaseException:
            self.release(table)
            raise

    def _resident_table(
        self, token_ids: Sequence[int], hashes: list[BlockHash], extra_keys: Sequence[bytes]
    ) -> tuple[BlockTable, int, int]:
        """Returns a table with the longest prefix in HBM and HOST, how many blocks may come from a cache, and how many came from
        HOST.
        """
        self._name_blocks(token_ids, hashes, extra_keys)
        usable = self._usable_blocks(token_ids)
        found = self._local.hold_prefix(hashes[:usable], self._allocate)
        table = BlockTable(self.block_tokens, found.block_ids, hashes, extra_keys)
        table.sealed = len(table.block_ids)
        return table, usable, found.from_host

    def _usable_blocks(self, token_ids: Sequence[int]) -> int:
        return (len(token_ids) - 1) // self.block_tokens

    def _name_blocks(self, token_ids: Sequence[int], hashes: list[BlockHash], extra_keys: Sequence[bytes]) -> None:
        parent = hashes[-1] if hashes else self._namespace
        hashes += block_hashes(parent, token_ids[len(hashes) * self.block_tokens :], self.block_tokens, extra_keys)

    def _new_prompt(self, tokens: int, resident: int, usable: int, host: int) -> Prompt:
        layout = self.pages.layout
        self._admissions += 1
        return Prompt(self._admissions, tokens, self.block_tokens, layout.page_bytes, layout.layers, resident, usable, host)

    def _leaving(self, block_hash: BlockHash, block_id: int) -> None:
        self._writer.evicted_block(block_hash, block_id)

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
        """Gets a block back from transfers: one that is only queued for the store, else the first that ends in time."""
        if self._remote is None or self._writer.reclaim():
            return
        give_up_ms = self._clock.now_ms() + self._remote.deadline_ms + _GRACE_MS
        while not self._pool.available and (self.loads.quarantined or self._writer.held) and self._clock.now_ms() < give_up_ms:
            self._writer.wait_finished(_POLL_MS)
            self._reap()
        self._reap()  # ended between the last check and the end of the loop

    def _reap(self) -> None:
        """Releases the blocks of transfers that are over."""
        self._writer.reap()
        self.loads.reap()


def _no_copies() -> None:
    """Blocks in host memory have no copies that a step could meet."""
