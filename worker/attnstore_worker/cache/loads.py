"""The loads of admitted and of waiting sequences, as the engine uses them: arrived pages go into tables and the pool.

Owns: the steps between a `Load` and the table that it fills. Invariant: a block that a load may still write is held, and only
complete and verified pages are sealed. Only the engine's thread calls it.
"""

from __future__ import annotations

import logging

from attnstore.clock import Clock
from attnstore_worker.cache.moving.load import Load, LoadEnd, Planner, Prompt
from attnstore_worker.cache.moving.mover import LoadJob, Mover
from attnstore_worker.cache.moving.staged_reads import StagedReads
from attnstore_worker.cache.moving.writers import Writer
from attnstore_worker.cache.planning.observation import Observer
from attnstore_worker.cache.pool.block_pool import BlockPool
from attnstore_worker.cache.pool.block_table import BlockTable
from attnstore_worker.cache.pool.tier import Admission, Tier, TierCounter
from attnstore_worker.cache.store.base import Lender, PageSource
from attnstore_worker.device.pages import PagePool

_LOG = logging.getLogger(__name__)

_LATE_MS: float = 50.0
"""How much longer than its deadline a load may take: a read ends at the deadline, and its result arrives a little later."""


class Loads:
    """Loads from `source` into blocks of `pool`, in place or through staging as `pages` says. Without a source no load is started.
    `lender` lets pages be used in place.
    """

    def __init__(
        self,
        pool: BlockPool,
        pages: PagePool | StagedReads,
        mover: Mover,
        source: PageSource | None,
        lender: Lender | None,
        writer: Writer,
        tiers: TierCounter,
        observer: Observer,
        clock: Clock,
    ) -> None:
        self._pool = pool
        self._pages = pages
        self._source = source
        self._lender = lender
        self._writer = writer
        self._tiers = tiers
        self._observer = observer
        self._clock = clock
        self._mover = mover

    def prepare(self, table: BlockTable, prompt: Prompt, planner: Planner, *, observed: bool = True) -> tuple[Load, LoadJob | None]:
        """Returns a load for the blocks of a table that are not resident, and its job for the mover. If there is nothing to load,
        or the planner wants nothing, the load has ended and there is no job.
        """
        now_ms = self._clock.now_ms()
        wanted = range(prompt.resident_blocks, prompt.usable_blocks)
        if self._source is None or not wanted:
            return Load(prompt, None, now_ms, observed=False), None
        try:
            search = planner.search(prompt)
        except Exception:
            _LOG.exception("a load could not be planned; the prompt is computed")
            search = None
        load = Load(prompt, search, now_ms, observed=observed)
        if search is None:
            return load, None
        for tier in (Tier.SHARED, Tier.REMOTE):
            self._tiers.queried(tier, len(wanted))
        block_ids = table.block_ids[wanted.start : wanted.stop]
        hashes = table.hashes[wanted.start : wanted.stop]
        if isinstance(self._pages, StagedReads):
            staged = self._pages.into(load, block_ids)
            return load, LoadJob(load, planner, self._source, hashes, (), self._lender, staged)
        buffers = [self._pages.page(block_id) for block_id in block_ids]
        return load, LoadJob(load, planner, self._source, hashes, buffers, self._lender)

    def advance(self, table: BlockTable, load: Load, computed_tokens: int) -> int:
        """Takes arrived blocks, ends a load that is finished or late, and returns how many tokens are computed or loaded.

        Blocks of an abandoned load stay in quarantine. If no other blocks are available for them, the table is cut there: call
        `CacheManager.grow` before computing on.
        """
        if load.running:
            self._take(table, load)
            if load.running and computed_tokens >= load.prompt.usable_blocks * table.block_tokens:
                self._cancel(table, load, LoadEnd.MET)
            elif load.running and self.is_late(load):
                self._replace(table, load, self._cancel(table, load, LoadEnd.LATE))
        if (block := computed_tokens // table.block_tokens) in load.ready:
            table.sealed = load.pass_ready(block)
            return table.sealed * table.block_tokens
        return computed_tokens

    def claim(self, load: Load, end_tokens: int) -> int:
        """Claims blocks for computing up to `end_tokens`. Returns the token up to which the engine may compute now."""
        block_tokens = load.prompt.block_tokens
        return min(end_tokens, self._mover.claim(load, -(-end_tokens // block_tokens)) * block_tokens)

    def is_late(self, load: Load) -> bool:
        """Returns whether the deadline has passed, or the planner gives the load up: `advance` will end it."""
        if self._clock.now_ms() > load.due_ms + _LATE_MS:
            return True
        try:
            return not self._mover.replan(load)
        except Exception:
            _LOG.exception("a load could not be planned again; the blocks that have not arrived are computed")
            return True

    def abandon(self, table: BlockTable, load: Load, end: LoadEnd = LoadEnd.RELEASED) -> None:
        """Ends a load that a sequence does not need any more, or whose table is about to be released."""
        self._cancel(table, load, end)

    def wait_layer(self, load: Load, layer: int | None) -> None:
        """As `Mover.wait_layer`, until the load is late."""
        self._mover.wait_layer(load, layer, lambda: self.is_late(load))

    def wait(self, timeout_ms: float) -> None:
        """Waits until a load has progressed, `wake` was called, or the time is up."""
        self._mover.wait(timeout_ms)

    def wake(self) -> None:
        """Ends a running `wait`, or the next one. From any thread."""
        self._mover.wake()

    @property
    def quarantined(self) -> int:
        """Blocks of abandoned loads that may still be written."""
        return self._mover.quarantined

    def reap(self) -> None:
        """Releases the quarantined blocks that nothing writes any more."""
        self._pool.release(self._mover.take_released())

    def _take(self, table: BlockTable, load: Load) -> None:
        arrived, lent = self._mover.take(load)
        if lent is not None:
            table.lent = lent
            for block in arrived:
                self._pool.release([table.block_ids[block]])
                table.block_ids[block] = lent.block_ids[block - load.prompt.resident_blocks]
            self._tiers.used_in_place(Tier.SHARED, len(arrived))
        else:
            for block in arrived:
                if self._pool.seal(table.block_ids[block], table.hashes[block]):
                    self._writer.arrived(table.hashes[block])
            shared = len(load.shared.intersection(arrived))
            self._tiers.copied(Tier.SHARED, shared)
            self._tiers.copied(Tier.REMOTE, len(arrived) - shared)
        if not load.running and load.observed:
            self._observer.loaded(load)

    def _cancel(self, table: BlockTable, load: Load, end: LoadEnd) -> range:
        """Cancels a load. The blocks that may still be written go into quarantine and are returned."""
        if not load.running:
            return range(0)
        in_flight = self._mover.cancel(load, end)
        if in_flight:  # first, so that a later failure cannot give them to others
            block_ids = [table.block_ids[block] for block in in_flight]
            for block_id in block_ids:
                self._pool.hold(block_id)
            self._mover.quarantine(load, block_ids)
        self._take(table, load)
        return in_flight

    def _replace(self, table: BlockTable, load: Load, blocks: range) -> None:
        """Replaces quarantined blocks of the table by others, or cuts the table there."""
        for block in blocks:
            if not self._pool.available and not self._writer.reclaim():
                load.cut(block)
                self._pool.release(reversed(table.block_ids[block:]))
                del table.block_ids[block:]
                return
            self._pool.release([table.block_ids[block]])
            table.block_ids[block] = self._pool.allocate()


def admission_of(load: Load) -> Admission:
    """Returns the result of a load so far."""
    block_tokens, resident = load.prompt.block_tokens, load.prompt.resident_blocks
    local_tokens, host_tokens = resident * block_tokens, load.prompt.host_blocks * block_tokens
    if load.search is None:
        return Admission(local_tokens, host_tokens=host_tokens)
    return Admission(
        local_tokens=local_tokens,
        remote_tokens=load.used_blocks * block_tokens,
        bytes_read=load.bytes_read,
        match_ms=load.search_ms if load.hit_end > resident else load.ended_ms - load.started_ms,
        read_ms=load.ended_ms - load.planned_ms if load.plan is not None else 0.0,
        host_tokens=host_tokens,
        shared_tokens=load.shared_blocks * block_tokens,
    )
