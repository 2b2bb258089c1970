"""The worker's KV manager: which tier a sequence's blocks come from and where they go when they are sealed.

Owns: the block pool with its pages, the HOST tier below it, and the transfers between the pool and the store.
Invariant: a block that a transfer reads or writes is held until that transfer is over, and only pages that came whole and
verified are ever given to a sequence. One thread (the engine's) calls everything here.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

from attnstore.clock import Clock
from attnstore.core.eviction import EvictionPolicy
from attnstore.core.hashing import BlockHash, Namespace, block_hash, block_hashes
from attnstore.errors import Overloaded
from attnstore_worker.cache.moving.loading import Loading
from attnstore_worker.cache.moving.swap_in import SwapIn
from attnstore_worker.cache.moving.writers import create_writer
from attnstore_worker.cache.planning.load_plan import FetchAhead, FetchAll, Planner, Prompt
from attnstore_worker.cache.planning.observation import Load, LoadEnd, Observer, Unobserved
from attnstore_worker.cache.pool.block_pool import BlockPoolStatistics
from attnstore_worker.cache.pool.block_table import BlockTable
from attnstore_worker.cache.pool.host_tier import HostTier
from attnstore_worker.cache.pool.pages import PagePool
from attnstore_worker.cache.pool.resident import ResidentTiers
from attnstore_worker.cache.pool.tier import Tier, TierCounter, TierStatistics
from attnstore_worker.cache.store.base import Lender
from attnstore_worker.cache.store.remote import RemoteStatistics, RemoteTier

_LOG = logging.getLogger(__name__)

_GRACE_MS = 250.0
"""How much longer than a store's own deadline the engine waits for a block before it gives a transfer up."""
_LOAD_GRACE_MS = 50.0
"""How much longer than its deadline a load may take: the read ends at the deadline, and its verdict is then on its way."""
_POLL_MS = 5.0


@dataclass(frozen=True, slots=True)
class CacheStatistics:
    """A snapshot of the manager. `swap_out_dropped`: sealed blocks that were never sent, for lack of queue or of blocks."""

    tiers: Mapping[Tier, TierStatistics]
    pool: BlockPoolStatistics
    remote: RemoteStatistics
    swap_out_pending: int
    swap_out_dropped: int
    quarantined: int


class CacheManager:
    """Block tables for sequences. `policy` orders the pool's evictions (default: least recently used), which go down to `host`;
    `remote` is the store, and `lender` lets its pages be used in place. Without the three the pool is the only tier.
    `planner` decides about loads (default: fetch all hits), `observer` is told of them.
    """

    def __init__(
        self,
        pages: PagePool,
        namespace: Namespace,
        *,
        remote: RemoteTier | None,
        clock: Clock,
        policy: EvictionPolicy[BlockHash] | None = None,
        host: HostTier | None = None,
        lender: Lender | None = None,
        planner: Planner | None = None,
        observer: Observer | None = None,
        write_policy: str = "write-behind",
    ) -> None:
        self.pages = pages
        self._namespace = namespace
        self._clock = clock
        self._tiers = TierCounter(pages.layout.block_tokens, pages.layout.page_bytes)
        self._resident = ResidentTiers(pages, policy, host, self._tiers, self._leaving)
        self._pool = self._resident.pool
        self._lender = lender
        self._remote = remote
        self._writer = create_writer(write_policy, self._pool, pages, remote)
        self._planner = planner or FetchAll(remote.deadline_ms if remote is not None else 0.0)
        self._observer = observer or Unobserved()
        self._changed = threading.Event()
        self._quarantine: list[_Quarantined] = []
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
        """Blocks that could be given out without waiting, among them those that are held only by the queue to the store."""
        self._reap()
        return self._pool.available + self._writer.reclaimable

    def connect(self) -> None:
        """Prepares the store connection, if there is a store, ahead of the first request."""
        if self._remote is not None:
            self._remote.connect()

    def announce(self, token_ids: Sequence[int], hashes: list[BlockHash], extra_keys: Sequence[bytes] = ()) -> list[BlockHash]:
        """Tells the eviction policy that a prompt waits behind all others; returns the blocks that `settle` takes back.

        `hashes` are the names of the sequence's first blocks, as far as they are known; the missing ones are appended. `extra_keys`
        are in the names of all its blocks: sequences of different ones share none.
        """
        self._name_blocks(token_ids, hashes, extra_keys)
        announced = hashes[: self._usable_blocks(token_ids)]
        self._resident.announce(announced)
        return announced

    def settle(self, announced: Sequence[BlockHash]) -> None:
        """An announced prompt waits no longer: it is about to be admitted, or was cancelled."""
        self._resident.settle(announced)

    def admit(self, token_ids: Sequence[int], hashes: list[BlockHash], extra_keys: Sequence[bytes] = ()) -> Loading:
        """A table with blocks for all tokens, of which the longest prefix in HBM and HOST is there, and more may be on the way.

        At most all tokens but the last are taken from a cache: that one must be computed to have logits. `hashes`,
        `extra_keys` as in `announce`. Raises `Overloaded`, with nothing held, where transfers and others hold the blocks.
        """
        self._name_blocks(token_ids, hashes, extra_keys)
        usable = self._usable_blocks(token_ids)
        found = self._resident.hold_prefix(hashes[:usable], self._allocate)
        table = BlockTable(self.block_tokens, found.block_ids, hashes, extra_keys)
        table.sealed = resident = len(table.block_ids)
        with self._unless_raised(table):
            self.grow(table, len(token_ids))
            prompt = self._prompt(table, len(token_ids), usable)
            swap_in = self._start_swap_in(table, prompt) if prompt is not None else None
            return Loading(table, resident, prompt, swap_in, host_blocks=found.from_host)

    def prefetch(
        self, token_ids: Sequence[int], hashes: list[BlockHash], spare_blocks: int, extra_keys: Sequence[bytes] = ()
    ) -> Loading | None:
        """A load for a sequence that waits, where the planner wants one and it needs no more than `spare_blocks`, else None: also
        where pages are used in place, which need no fetching.

        `advance` takes its pages into the pool; `abandon` and `release` it when it is over or its blocks are needed.
        """
        self._name_blocks(token_ids, hashes, extra_keys)
        usable = self._usable_blocks(token_ids)
        if self._remote is None or self._lender is not None or usable > min(spare_blocks, self._pool.available):
            return None
        found = self._resident.hold_prefix(hashes[:usable], self._allocate)
        table = BlockTable(self.block_tokens, found.block_ids, hashes, extra_keys)
        table.sealed = resident = len(table.block_ids)
        with self._unless_raised(table):
            prompt = self._prompt(table, len(token_ids), usable)
            if prompt is not None and self._planner.prefetches(prompt):
                self.grow(table, usable * self.block_tokens)
                swap_in = self._swap_in(self._remote, FetchAhead(self._remote.deadline_ms), prompt, table)
                return Loading(table, resident, None, swap_in)
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
        """What there would be to decide about these tokens, with the blocks that are here now or `resident_blocks` of them, if all
        others were in the store. `hashes`, `extra_keys` as in `announce`.
        """
        self._name_blocks(token_ids, hashes, extra_keys)
        usable = self._usable_blocks(token_ids)
        if resident_blocks is None:
            resident_blocks = self._resident.prefix_blocks(hashes[:usable])
        return self._new_prompt(len(token_ids), resident_blocks, usable)

    def empty_table(self, hashes: list[BlockHash] | None = None, extra_keys: Sequence[bytes] = ()) -> BlockTable:
        """A table without blocks; without `hashes` that of a sequence whose content matters to nobody."""
        return BlockTable(self.block_tokens, hashes=[] if hashes is None else hashes, extra_keys=extra_keys)

    def advance(self, loading: Loading, computed_tokens: int) -> int:
        """Takes what has arrived, ends what is over or late, and returns how many tokens need no computing any more.

        Blocks of a transfer that was given up stay in quarantine. Where no others can be had for them the table is cut there:
        `grow` it before computing on.
        """
        if (swap_in := loading.running) is not None:
            over = swap_in.over  # looked at first: what arrived before it ended is taken below
            self._take_arrived(loading, swap_in)
            if over:
                self._end(loading, swap_in, _natural_end(swap_in))
            elif computed_tokens >= swap_in.prompt.usable_blocks * self.block_tokens:
                self._give_up(loading, swap_in, LoadEnd.MET)
            elif self._is_late(swap_in):
                self._replace(loading, self._give_up(loading, swap_in, LoadEnd.LATE))
        return max(computed_tokens, loading.pass_ready(computed_tokens // self.block_tokens) * self.block_tokens)

    def is_late(self, loading: Loading) -> bool:
        """A load whose deadline passed or that the planner gives up: `advance` will end it."""
        return loading.running is not None and self._is_late(loading.running)

    def abandon(self, loading: Loading, end: LoadEnd = LoadEnd.RELEASED) -> None:
        """Ends what runs for a sequence that needs no more of it, or whose table is about to be released."""
        if (swap_in := loading.running) is not None:
            self._give_up(loading, swap_in, end)

    def wait(self, timeout_ms: float) -> None:
        """Waits until a load has got on, `wake` was called, or the time is up."""
        self._changed.wait(timeout_ms / 1e3)
        self._changed.clear()

    def wake(self) -> None:
        """Ends a `wait` that runs, or the next one. From any thread."""
        self._changed.set()

    def grow(self, table: BlockTable, tokens: int) -> None:
        """Gives the table blocks for `tokens` tokens. Raises `Overloaded` where others hold all blocks."""
        missing = -(-tokens // self.block_tokens) - table.blocks
        table.block_ids += self._allocate(missing)

    def seal(self, table: BlockTable, token_ids: Sequence[int], computed_tokens: int) -> None:
        """Seals the blocks that `computed_tokens` completed, makes them findable and starts their way to the store."""
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
        """All blocks that a step completed are sealed: waits for their writes, where the write policy says so."""
        self._writer.end_step()

    def release(self, table: BlockTable) -> None:
        """Ends a sequence's hold. Its tail is evicted before its head, because a prefix needs its head."""
        self._pool.release(reversed(table.own_block_ids))
        table.block_ids.clear()
        if table.lent is not None:
            table.lent.release()
            table.lent = None
        table.remote_blocks = 0
        self._reap()

    def is_intact(self, table: BlockTable) -> bool:
        """Whether blocks that lie in a node's memory still hold their pages. To be asked after a step that used them."""
        return table.lent is None or table.lent.intact()

    def let_stay(self, table: BlockTable, remote_blocks: int) -> None:
        """The first `remote_blocks` blocks are attended to in the store from now on: those that are here are given up."""
        own = set(table.own_block_ids)
        given_up = table.block_ids[: remote_blocks - table.remote_blocks]
        del table.block_ids[: len(given_up)]
        table.remote_blocks = remote_blocks
        table.sealed = max(table.sealed, remote_blocks)
        self._pool.release(block_id for block_id in reversed(given_up) if block_id in own)

    def offer_again(self, table: BlockTable, blocks: range) -> None:
        """Starts sealed blocks on their way to the store once more: it refused or lost them."""
        for block in blocks:
            self._writer.sealed(table.hashes[block], table.block_ids[block - table.remote_blocks])

    def drop_cached(self) -> None:
        """Evicts every block that no sequence and no transfer holds; a tier below the pool gets them as it does any other."""
        self._reap()
        self._pool.drop_evictable()

    def flush(self, timeout_ms: float) -> bool:
        """Waits until every page that is on its way to the store is written or refused. False when time ran out."""
        flushed = self._writer.flush(timeout_ms)
        self._reap()
        return flushed

    def close(self) -> None:
        """Ends writing; what is still queued is not written."""
        with ExitStack() as closing:
            closing.callback(self._reap)
            if self._lender is not None:
                closing.callback(self._lender.close)
            closing.callback(self._writer.close)

    def statistics(self) -> CacheStatistics:
        """A snapshot."""
        return CacheStatistics(
            tiers=self._tiers.statistics(self._resident.evicted_blocks()),
            pool=self._pool.statistics(),
            remote=self._remote.statistics() if self._remote is not None else RemoteStatistics(),
            swap_out_pending=self._writer.pending,
            swap_out_dropped=self._writer.dropped,
            quarantined=sum(len(transfer.block_ids) for transfer in self._quarantine),
        )

    def check(self) -> None:
        """Asserts the conservation of blocks."""
        self._resident.check()

    @contextmanager
    def _unless_raised(self, table: BlockTable) -> Iterator[None]:
        try:
            yield
        except BaseException:
            self.release(table)
            raise

    def _usable_blocks(self, token_ids: Sequence[int]) -> int:
        return (len(token_ids) - 1) // self.block_tokens

    def _name_blocks(self, token_ids: Sequence[int], hashes: list[BlockHash], extra_keys: Sequence[bytes]) -> None:
        parent = hashes[-1] if hashes else self._namespace
        hashes += block_hashes(parent, token_ids[len(hashes) * self.block_tokens :], self.block_tokens, extra_keys)

    def _prompt(self, table: BlockTable, tokens: int, usable: int) -> Prompt | None:
        """What there is to decide about; None where no lower tier could help."""
        if self._remote is None or table.sealed == usable:
            return None
        return self._new_prompt(tokens, table.sealed, usable)

    def _new_prompt(self, tokens: int, resident: int, usable: int) -> Prompt:
        layout = self.pages.layout
        self._admissions += 1
        return Prompt(self._admissions, tokens, self.block_tokens, layout.page_bytes, layout.layers, resident, usable)

    def _start_swap_in(self, table: BlockTable, prompt: Prompt) -> SwapIn | None:
        if self._remote is None:
            return None
        try:
            return self._swap_in(self._remote, self._planner, prompt, table)
        except Exception:  # a planner's mistake, or no thread is left: a miss, as in `SwapIn`
            _LOG.exception("a swap-in could not be begun; the prompt is computed")
            return None

    def _swap_in(self, remote: RemoteTier, planner: Planner, prompt: Prompt, table: BlockTable) -> SwapIn | None:
        search = planner.search(prompt)
        if search is None:
            return None
        for tier in (Tier.SHARED, Tier.REMOTE):
            self._tiers.queried(tier, prompt.usable_blocks - prompt.resident_blocks)
        wanted = slice(prompt.resident_blocks, prompt.usable_blocks)
        buffers = [self.pages.page(block_id) for block_id in table.block_ids[wanted]]
        return SwapIn(
            remote,
            planner,
            prompt,
            search,
            table.hashes[wanted],
            buffers,
            clock=self._clock,
            changed=self._changed,
            lender=self._lender,
        )

    def _take_arrived(self, loading: Loading, swap_in: SwapIn) -> None:
        table = loading.table
        arrived = swap_in.take_arrived()
        if swap_in.lent is not None and table.lent is None:
            table.lent = swap_in.lent
            for block in arrived:
                self._pool.release([table.block_ids[block]])
                table.block_ids[block] = table.lent.block_ids[block - swap_in.prompt.resident_blocks]
            self._tiers.used_in_place(Tier.SHARED, len(arrived))
        else:
            for block in arrived:
                if self._pool.seal(table.block_ids[block], table.hashes[block]):
                    self._writer.arrived(table.hashes[block])
            shared = len(swap_in.shared.intersection(arrived))
            self._tiers.copied(Tier.SHARED, shared)
            self._tiers.copied(Tier.REMOTE, len(arrived) - shared)
        loading.ready.update(arrived)
        loading.arrived_blocks += len(arrived)

    def _is_late(self, swap_in: SwapIn) -> bool:
        if self._clock.now_ms() > swap_in.due_ms + _LOAD_GRACE_MS:
            return True
        try:
            return not swap_in.replan()
        except Exception:
            _LOG.exception("a load could not be planned again; what has not arrived is recomputed")
            return True

    def _give_up(self, loading: Loading, swap_in: SwapIn, end: LoadEnd) -> range:
        """Lets nothing arrive any more. The blocks that may still be written go into quarantine and are returned."""
        in_flight = swap_in.cancel()
        if in_flight:  # first of all, so that nothing that fails below gives them to others
            block_ids = [loading.table.block_ids[block] for block in in_flight]
            for block_id in block_ids:
                self._pool.hold(block_id)
            self._quarantine.append(_Quarantined(swap_in, block_ids))
        self._take_arrived(loading, swap_in)
        self._end(loading, swap_in, end)
        return in_flight

    def _end(self, loading: Loading, swap_in: SwapIn, end: LoadEnd) -> None:
        loading.end = end
        loading.ended_ms = self._clock.now_ms()
        if loading.prompt is None:  # nobody's load yet
            return
        self._observer.loaded(
            Load(
                loading.prompt,
                swap_in.search,
                swap_in.found,
                swap_in.plan,
                end,
                swap_in.started_ms,
                loading.ended_ms,
                loading.arrived_blocks,
                swap_in.bytes_read,
            )
        )

    def _replace(self, loading: Loading, blocks: range) -> None:
        """Gives the table other blocks in the place of quarantined ones, or cuts it there."""
        block_ids = loading.table.block_ids
        for block in blocks:
            if not self._pool.available and not self._writer.reclaim():
                loading.ready = {ready for ready in loading.ready if ready < block}
                self._pool.release(reversed(block_ids[block:]))
                del block_ids[block:]
                return
            self._pool.release([block_ids[block]])
            block_ids[block] = self._pool.allocate()

    def _leaving(self, block_hash: BlockHash, page: memoryview) -> None:
        self._writer.evicted(block_hash, page)

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
        if self._remote is None or self._writer.reclaim():
            return
        give_up_ms = self._clock.now_ms() + self._remote.deadline_ms + _GRACE_MS
        while not self._pool.available and self._in_flight() and self._clock.now_ms() < give_up_ms:
            self._writer.wait_finished(_POLL_MS)
            self._reap()
        self._reap()  # what ended between the last look and the end of the loop

    def _in_flight(self) -> bool:
        return bool(self._quarantine) or self._writer.held > 0

    def _reap(self) -> None:
        """Releases the blocks of transfers that are over."""
        self._writer.reap()
        for transfer in [transfer for transfer in self._quarantine if transfer.swap_in.done]:
            self._quarantine.remove(transfer)
            self._pool.release(transfer.block_ids)


@dataclass(frozen=True, slots=True, eq=False)
class _Quarantined:
    """Blocks that a swap-in which was given up may still write."""

    swap_in: SwapIn
    block_ids: list[int]


def _natural_end(swap_in: SwapIn) -> LoadEnd:
    if swap_in.lent is not None:
        return LoadEnd.LENT
    if swap_in.found is None:
        return LoadEnd.NOT_FOUND
    if swap_in.plan is None:
        return LoadEnd.DECLINED
    return LoadEnd.MET if swap_in.met else LoadEnd.COMPLETE
