"""Which sequences have blocks, and which of their blocks are here: admission, loading, growing, preemption.

Owns: every change of a sequence's table between steps; who comes next is the scheduler's decision, what lies where the cache
manager's. Invariant: a sequence that waits or is over holds no block; one that runs has a table, and one that waits for pages, or
attends to some in the store, gets what it computes on from here alone. What fails for one sequence ends that one.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable
from contextlib import ExitStack

from attnstore.clock import Clock
from attnstore.errors import Overloaded
from attnstore_worker.cache import Admission, CacheManager, LayerGate, LoadEnd, Loading
from attnstore_worker.engine.attended import AttendedBlocks
from attnstore_worker.engine.prefetch import LookAheadPrefetch
from attnstore_worker.engine.scheduler import Scheduler
from attnstore_worker.engine.sequence import FinishReason, Sequence, next_chunk

_LOG = logging.getLogger(__name__)

_IDLE_MS = 50.0
"""A step that can only wait for pages looks around at least this often."""


class Residency:
    """Blocks for the sequences of `scheduler`, at most `chunk_tokens` of each computed at a time. `attend` is None where no block
    stays in the store. `end` ends a sequence that has no way to go on, `fail` one for which something raised; both call `release`.
    """

    def __init__(
        self,
        cache: CacheManager,
        scheduler: Scheduler,
        attend: AttendedBlocks | None,
        clock: Clock,
        end: Callable[[Sequence, FinishReason], None],
        fail: Callable[[Sequence, Exception], None],
        *,
        chunk_tokens: int,
        prefetch_sequences: int,
    ) -> None:
        self._cache = cache
        self._scheduler = scheduler
        self._attend = attend
        self._clock = clock
        self._end = end
        self._fail = fail
        self._chunk_tokens = chunk_tokens
        self._prefetch = LookAheadPrefetch(cache, prefetch_sequences)
        self.preemptions = 0

    def enqueue(self, sequence: Sequence) -> None:
        """A new sequence waits. Raises `Overloaded` when the queue is full."""
        self._scheduler.enqueue(sequence)
        try:
            self._announce(sequence)
        except BaseException:
            self._scheduler.remove(sequence)
            raise

    def release(self, sequence: Sequence) -> None:
        """A sequence is over, wherever it is; what it has computed stays in the cache."""
        with ExitStack() as ending:  # from the last one up, each whatever becomes of the others
            ending.callback(self._give_back, sequence)
            if self._attend is not None:
                ending.callback(self._attend.ended, sequence)
            ending.callback(self.end_loading, sequence)
            ending.callback(self._prefetch.forget, sequence)
            ending.callback(self._scheduler.remove, sequence)
            if sequence.table is None:
                ending.callback(self._cache.settle, sequence.announced)

    def admit(self) -> None:
        """Lets waiting sequences run, as many as there is room for."""
        while (sequence := self._admissible()) is not None:
            try:
                self._cache.settle(sequence.announced)
                sequence.announced = []
                self._start(sequence)
            except Overloaded:
                # The blocks of a transfer that hangs are lost for now. Where others run they will give theirs back.
                if not self._scheduler.running and not self._prefetch.give_way():
                    self._end(sequence, FinishReason.OVERLOADED)
                    continue
                self._announce(sequence)
                if self._scheduler.running:
                    return
            except Exception as error:
                self._fail(sequence, error)

    def advance(self) -> None:
        """Lets each loading sequence have what has arrived, and claims what it computes next."""
        for sequence in self._scheduler.running:
            if sequence.loading is not None:
                try:
                    self._advance(sequence, sequence.loading)
                except Exception as error:
                    self._fail(sequence, error)

    def end_loading(self, sequence: Sequence, end: LoadEnd = LoadEnd.RELEASED) -> None:
        """The sequence waits for no page any more."""
        if sequence.loading is not None:
            self._cache.abandon(sequence.loading, end)
            sequence.admission = sequence.admission or sequence.loading.admission()
            sequence.loading = None
            sequence.computable_tokens = None

    def gated(self) -> tuple[Sequence, LayerGate] | None:
        """A running sequence that can compute behind pages which still arrive layer by layer, and their gate."""
        for sequence in self._scheduler.running:
            gate = sequence.loading.gate(sequence.computed_tokens) if sequence.loading is not None else None
            if gate is not None:
                return sequence, gate
        return None

    def wait(self) -> None:
        """For pages, until the first load is due at most."""
        due_ms = min((s.loading.due_ms for s in self._scheduler.running if s.loading is not None), default=math.inf)
        self._cache.wait(min(_IDLE_MS, max(1.0, due_ms - self._clock.now_ms())))

    def make_room(self) -> None:
        """Gives each running sequence the blocks for all its tokens; for lack of blocks the last ones go back to waiting. What is
        left over is used to fetch ahead.
        """
        for sequence in self._scheduler.running:
            try:
                self._leave_behind(sequence)
            except Exception as error:
                self._fail(sequence, error)
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
                    self._end(sequence, FinishReason.OVERLOADED)
            except Exception as error:
                self._fail(sequence, error)
        self._prefetch.advance(self._scheduler.waiting, self._spare_blocks)

    def drop_recycled(self, sequences: Iterable[Sequence]) -> None:
        """Sends sequences back to waiting whose pages in a node's memory are not theirs any more."""
        for sequence in sequences:
            try:
                if sequence.table is not None and not self._cache.is_intact(sequence.table):
                    self._preempt(sequence)
            except Exception as error:
                self._fail(sequence, error)

    def recover(self) -> None:
        """Finds the blocks that running sequences lost at the store again, or has them waiting, to be fetched or computed."""
        assert self._attend is not None
        for sequence in self._scheduler.running:
            try:
                prefix = sequence.attend.prefix
                if prefix is not None and prefix.lost and not self._attend.recover(sequence):
                    self._give_up_remote(self._attend, sequence)
            except Exception as error:
                self._fail(sequence, error)

    @property
    def _spare_blocks(self) -> int:
        """Blocks that nobody who runs needs, each of them growing by one."""
        return self._cache.available_blocks - len(self._scheduler.running)

    def _announce(self, sequence: Sequence) -> None:
        sequence.announced = self._cache.announce(sequence.token_ids, sequence.hashes, sequence.extra_keys)

    def _admissible(self) -> Sequence | None:
        """The next sequence to admit; prefetching gives way to it."""
        while True:
            available = self._cache.available_blocks
            sequence = self._scheduler.admissible(available)
            if sequence is not None or self._scheduler.admissible(available + self._prefetch.blocks) is None:
                return sequence
            self._prefetch.give_way()

    def _advance(self, sequence: Sequence, loading: Loading) -> None:
        sequence.computed_tokens = self._cache.advance(loading, sequence.computed_tokens)
        sequence.computable_tokens = None
        if loading.over:
            self.end_loading(sequence)
        else:
            sequence.computable_tokens = loading.claim(next_chunk(sequence, self._chunk_tokens).end)

    def _start(self, sequence: Sequence) -> None:
        sequence.admitted_ms = self._clock.now_ms()
        self._prefetch.forget(sequence)
        if self._attend is not None and self._attend.wants(sequence) and self._attend.admit(sequence):
            sequence.admission = sequence.admission or Admission(remote_tokens=sequence.computed_tokens)
            self._scheduler.start(sequence)
            return
        sequence.attend.load()
        sequence.loading = self._cache.admit(sequence.token_ids, sequence.hashes, sequence.extra_keys)
        sequence.prompt = sequence.loading.prompt
        sequence.table = sequence.loading.table
        sequence.computed_tokens = sequence.table.sealed * self._cache.block_tokens
        self._scheduler.start(sequence)

    def _leave_behind(self, sequence: Sequence) -> None:
        """Leaves blocks to the store where a sequence attends, or has grown too long to go on without."""
        if self._attend is None or sequence.loading is not None:
            return
        if self._attend.moves(sequence, 0 if self._scheduler.waiting else self._spare_blocks):
            self._attend.move(sequence)
            self._send_back(sequence)
        elif not self._attend.make_room(sequence):
            self._give_up_remote(self._attend, sequence)

    def _leave_for(self, victim: Sequence) -> bool:
        if self._attend is None:
            return False
        try:
            return self._attend.leave_for(victim, self._scheduler.running)
        except Exception:  # of any of those that run; to preempt one goes without
            _LOG.exception("no running sequence could leave its blocks to the store")
            return False

    def _give_back(self, sequence: Sequence) -> None:
        if sequence.table is not None:
            sequence.blocks_used = len(sequence.table.own_block_ids)
            self._cache.release(sequence.table)
            sequence.table = None

    def _give_up_remote(self, attend: AttendedBlocks, sequence: Sequence) -> None:
        """Has a sequence that lost its blocks at the store begin anew, or ends it where it has no way to go on."""
        if attend.may_go_on(sequence):
            self._preempt(sequence)
        else:
            self._end(sequence, FinishReason.REMOTE_LOST)

    def _preempt(self, sequence: Sequence) -> None:
        """Takes a sequence's blocks for others."""
        self._send_back(sequence)
        sequence.preemptions += 1
        self.preemptions += 1

    def _send_back(self, sequence: Sequence) -> None:
        """To waiting, without a block. Sealed ones stay findable here and in the store, so only its tail is computed again."""
        assert sequence.table is not None
        self._scheduler.preempt(sequence)
        self.end_loading(sequence)
        if self._attend is not None:
            self._attend.release(sequence)
        self._cache.release(sequence.table)
        sequence.table = None
        sequence.drafts = ()
        sequence.computed_tokens = 0
        self._announce(sequence)
