"""The blocks of sequences: admission, loading, growing, preemption, the end.

Owns: every change of a sequence's table between steps, and the one place where a sequence ends (`end`). The scheduler decides which
sequence is next, the cache manager where pages lie. Invariant: a waiting or finished sequence holds no block, and a running one has
a table. A failure of one sequence ends that sequence.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager

from attnstore.clock import Clock
from attnstore.core.hashing import BlockHash
from attnstore.errors import AttnStoreError, Overloaded
from attnstore_worker.cache import Admission, CacheManager, Load, LoadEnd, admission_of
from attnstore_worker.engine.attended import AttendedBlocks
from attnstore_worker.engine.prefetch import LookAheadPrefetch, fetchable
from attnstore_worker.engine.scheduler import Scheduler
from attnstore_worker.engine.sequence import Chunk, FinishReason, Sequence, next_chunk
from attnstore_worker.errors import DeviceLost, SequenceFailed, StepFailed

_LOG = logging.getLogger(__name__)

_IDLE_MS = 50.0
"""A step that can only wait for pages checks for changes at least this often."""


class Residency:
    """Blocks for the sequences of `scheduler`, of which at most `chunk_tokens` each are computed at a time. `attend` is None if no
    block stays in the store. `preemptions` and `failures` (sequences that ended as FAILED) count since the start.
    """

    def __init__(
        self,
        cache: CacheManager,
        scheduler: Scheduler,
        attend: AttendedBlocks | None,
        clock: Clock,
        *,
        chunk_tokens: int,
        prefetch_sequences: int,
    ) -> None:
        self._cache = cache
        self._scheduler = scheduler
        self._attend = attend
        self._clock = clock
        self._chunk_tokens = chunk_tokens
        self._prefetch = LookAheadPrefetch(cache, prefetch_sequences)
        self._announced: dict[Sequence, list[BlockHash]] = {}
        self.preemptions = 0
        self.failures = 0

    def enqueue(self, sequence: Sequence) -> None:
        """Queues a new sequence. Raises `Overloaded` if the queue is full."""
        self._scheduler.enqueue(sequence)
        try:
            self._announce(sequence)
        except BaseException:
            self._scheduler.remove(sequence)
            raise

    def end(self, sequence: Sequence, reason: FinishReason, error: AttnStoreError | None = None) -> None:
        """Ends a sequence in any state; its computed blocks stay in the cache.

        Never raises, because an error here must not affect other sequences.
        """
        sequence.finish_reason, sequence.error = reason, error
        sequence.finished_ms = self._clock.now_ms()
        self.failures += reason is FinishReason.FAILED
        try:
            with ExitStack() as ending:  # from the last one up, each even if another fails
                ending.callback(self._announced.pop, sequence, None)
                ending.callback(self._release_table, sequence)
                if self._attend is not None:
                    ending.callback(self._attend.ended, sequence)
                ending.callback(self.end_load, sequence)
                ending.callback(self._prefetch.forget, sequence)
                ending.callback(self._scheduler.remove, sequence)
                ending.callback(self._settle, sequence)
        except Exception:
            _LOG.exception("sequence %d: the end did not release everything that it held", sequence.sequence_id)

    def fail(self, sequence: Sequence, cause: Exception) -> None:
        """Ends a sequence because of an error that concerns only this sequence. Raises `DeviceLost`, which concerns all."""
        unforeseen = None if isinstance(cause, SequenceFailed) else cause
        _LOG.error("sequence %d failed: %s", sequence.sequence_id, cause, exc_info=unforeseen)
        if sequence.finish_reason is None:
            error = cause if isinstance(cause, SequenceFailed) else SequenceFailed("the sequence failed; the worker's log says why")
            self.end(sequence, FinishReason.FAILED, error)
        if isinstance(cause, DeviceLost):  # concerns every other sequence too
            raise cause

    @contextmanager
    def failing(self, chunks: Iterable[Chunk]) -> Iterator[None]:
        """Ends the sequences of a step that raises, because it is unknown how far the step got with each of them."""
        try:
            yield
        except BaseException:
            for chunk in chunks:
                if chunk.sequence.finish_reason is None:
                    error = StepFailed("the step failed that computed this sequence; the worker's log says why")
                    self.end(chunk.sequence, FinishReason.FAILED, error)
            raise

    def admit(self) -> None:
        """Starts as many waiting sequences as there is room for."""
        while (sequence := self._admissible()) is not None:
            try:
                self._settle(sequence)
                self._start(sequence)
            except Overloaded:
                # The blocks of a transfer that hangs are unavailable for now. If other sequences run, they will release theirs.
                if not self._scheduler.running and not self._prefetch.give_way():
                    self.end(sequence, FinishReason.OVERLOADED)
                    continue
                self._announce(sequence)
                if self._scheduler.running:
                    return
            except Exception as error:
                self.fail(sequence, error)

    def advance(self) -> None:
        """Gives each loading sequence its arrived pages, and claims what it computes next."""
        for sequence in self._scheduler.running:
            if sequence.load is not None:
                try:
                    self._advance(sequence, sequence.load)
                except Exception as error:
                    self.fail(sequence, error)

    def end_load(self, sequence: Sequence, end: LoadEnd = LoadEnd.RELEASED) -> None:
        """Ends the load of a sequence."""
        if sequence.load is not None:
            assert sequence.table is not None
            self._cache.loads.abandon(sequence.table, sequence.load, end)
            sequence.admission = sequence.admission or admission_of(sequence.load)
            sequence.load = None
            sequence.computable_tokens = None

    def behind_layers(self) -> tuple[Sequence, Load] | None:
        """Returns a running sequence that can compute after pages still arriving layer by layer, and their load."""
        for sequence in self._scheduler.running:
            load = sequence.load
            if load is not None and load.may_compute_behind(sequence.computed_tokens):
                return sequence, load
        return None

    def wait(self) -> None:
        """Waits for pages, until the first load is due at most."""
        due_ms = min((s.load.due_ms for s in self._scheduler.running if s.load is not None), default=math.inf)
        self._cache.loads.wait(min(_IDLE_MS, max(1.0, due_ms - self._clock.now_ms())))

    def make_room(self) -> None:
        """Gives each running sequence the blocks for all its tokens; if blocks are short, the last sequences return to waiting.
        Uses the remaining blocks for prefetching.
        """
        for sequence in self._scheduler.running:
            try:
                self._leave_behind(sequence)
            except Exception as error:
                self.fail(sequence, error)
        while (victim := self._scheduler.victim(self._cache.available_blocks)) is not None:
            if not self._prefetch.give_way() and not self._leave_for(victim):
                self._preempt(victim)
        for sequence in self._scheduler.running:
            assert sequence.table is not None
            try:
                self._cache.grow(sequence.table, sequence.room_tokens(self._chunk_tokens))
            except Overloaded:  # a transfer kept a block for longer than its deadline
                if len(self._scheduler.running) > 1:
                    self._preempt(sequence)
                else:
                    self.end(sequence, FinishReason.OVERLOADED)
            except Exception as error:
                self.fail(sequence, error)
        self._prefetch.advance(self._scheduler.waiting, self._spare_blocks)

    def drop_recycled(self, sequences: Iterable[Sequence]) -> None:
        """Returns sequences to waiting whose pages in a node's memory were recycled."""
        for sequence in sequences:
            try:
                if sequence.table is not None and not sequence.table.is_intact():
                    self._preempt(sequence)
            except Exception as error:
                self.fail(sequence, error)

    def recover(self) -> None:
        """Opens the blocks that running sequences lost at the store again, or returns the sequences to waiting, to be fetched or
        computed.
        """
        assert self._attend is not None
        for sequence in self._scheduler.running:
            try:
                prefix = sequence.attend.prefix
                if prefix is not None and prefix.lost and not self._attend.recover(sequence):
                    self._give_up_remote(self._attend, sequence)
            except Exception as error:
                self.fail(sequence, error)

    @property
    def _spare_blocks(self) -> int:
        """Returns the blocks that no running sequence needs, if each of them grows by one."""
        return self._cache.available_blocks - len(self._scheduler.running)

    def _announce(self, sequence: Sequence) -> None:
        self._announced[sequence] = self._cache.announce(sequence.token_ids, sequence.hashes, sequence.extra_keys)

    def _settle(self, sequence: Sequence) -> None:
        self._cache.settle(self._announced.get(sequence, []))
        self._announced.pop(sequence, None)

    def _admissible(self) -> Sequence | None:
        """Returns the next sequence to admit; prefetching gives way to it."""
        while True:
            available = self._cache.available_blocks
            sequence = self._scheduler.admissible(available)
            if sequence is not None or self._scheduler.admissible(available + self._prefetch.blocks) is None:
                return sequence
            self._prefetch.give_way()

    def _advance(self, sequence: Sequence, load: Load) -> None:
        assert sequence.table is not None
        sequence.computed_tokens = self._cache.loads.advance(sequence.table, load, sequence.computed_tokens)
        sequence.computable_tokens = None
        if load.over:
            self.end_load(sequence)
        else:
            sequence.computable_tokens = self._cache.loads.claim(load, next_chunk(sequence, self._chunk_tokens).end)

    def _start(self, sequence: Sequence) -> None:
        sequence.admitted_ms = self._clock.now_ms()
        self._prefetch.forget(sequence)
        if self._attend is not None and self._attend.wants(sequence) and self._attend.admit(sequence):
            sequence.admission = sequence.admission or Admission(remote_tokens=sequence.computed_tokens)
            self._scheduler.start(sequence)
            return
        sequence.attend.load()
        sequence.table, sequence.load = self._cache.admit(sequence.token_ids, sequence.hashes, sequence.extra_keys)
        sequence.prompt = sequence.load.prompt if sequence.load.observed else None
        sequence.computed_tokens = sequence.table.sealed * self._cache.block_tokens
        self._scheduler.start(sequence)

    def _leave_behind(self, sequence: Sequence) -> None:
        """Leaves blocks to the store if a sequence attends, or has become too long to continue without."""
        if self._attend is None or sequence.load is not None:
            return
        if self._moves(self._attend, sequence):
            self._attend.move(sequence)
            self._send_back(sequence)
        elif not self._attend.make_room(sequence):
            self._give_up_remote(self._attend, sequence)

    def _moves(self, attend: AttendedBlocks, sequence: Sequence) -> bool:
        """Returns whether an attending sequence should be admitted again, with its blocks here. They are fetched beforehand, while
        it goes on attending; if not all of them have come, it attends to the end.
        """
        if self._prefetch.has_brought(sequence):
            tokens, hashes = fetchable(sequence)
            prompt = self._cache.prompt(tokens, hashes, sequence.extra_keys)
            return sequence.attend.attends and prompt.resident_blocks == prompt.usable_blocks
        spare_blocks = 0 if self._scheduler.waiting else self._spare_blocks
        return attend.moves(sequence, spare_blocks) and not self._prefetch.bring(sequence, spare_blocks)

    def _leave_for(self, victim: Sequence) -> bool:
        if self._attend is None:
            return False
        try:
            return self._attend.leave_for(victim, self._scheduler.running)
        except Exception:  # of any of those that run; to preempt one goes without
            _LOG.exception("no running sequence could leave its blocks to the store")
            return False

    def _give_up_remote(self, attend: AttendedBlocks, sequence: Sequence) -> None:
        """Restarts a sequence that lost its blocks at the store, or ends it if it cannot continue."""
        if attend.may_go_on(sequence):
            self._preempt(sequence)
        else:
            self.end(sequence, FinishReason.REMOTE_LOST)

    def _preempt(self, sequence: Sequence) -> None:
        """Takes a sequence's blocks for others."""
        self._send_back(sequence)
        sequence.preemptions += 1
        self.preemptions += 1

    def _send_back(self, sequence: Sequence) -> None:
        """Returns a sequence to waiting, without a block. Sealed blocks can still be found here and in the store, so only its tail
        is computed again.
        """
        self._scheduler.preempt(sequence)
        self.end_load(sequence)
        if self._attend is not None:
            self._attend.release(sequence)
        self._release_table(sequence)
        sequence.drafts = ()
        sequence.computed_tokens = 0
        self._announce(sequence)

    def _release_table(self, sequence: Sequence) -> None:
        if sequence.table is not None:
            sequence.blocks_used = len(sequence.table.own_block_ids)
            self._cache.release(sequence.table)
            sequence.table = None
