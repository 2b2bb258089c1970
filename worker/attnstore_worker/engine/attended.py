"""Sequences some of whose blocks stay in the store: which, how many of their blocks are here, and what becomes of a loss.

Owns: the remote contexts of sequences; whether one attends is `AttendChoice`'s decision. The engine calls it between steps.
Invariant: a sequence that attends has at most `resident_blocks_max` blocks here when a step begins, and the blocks before them, all
of them, in one context that is not lost; so contexts of any length run in a pool of any size that holds a few chunks.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from attnstore_worker.cache import CacheManager
from attnstore_worker.cache.attending.contexts import AttendedPrefix, RemoteAttention
from attnstore_worker.engine.attend_policy import AttendChoice
from attnstore_worker.engine.sequence import Sequence

LOSSES_MAX: Final = 3
"""After so many losses a sequence attends no more."""


class AttendedBlocks:
    """`flush_ms`: how long to wait for blocks on their way to the store before one that is needed there is given up."""

    def __init__(
        self, remote: RemoteAttention, cache: CacheManager, choice: AttendChoice, *, chunk_tokens: int, flush_ms: float
    ) -> None:
        self.remote = remote
        self._cache = cache
        self._choice = choice
        self._chunk_tokens = chunk_tokens
        self._flush_ms = flush_ms
        pool_blocks = cache.pages.capacity
        self.resident_blocks_max = max(pool_blocks // 2, min(pool_blocks, chunk_tokens // cache.block_tokens + 2))

    def wants(self, sequence: Sequence) -> bool:
        """A waiting sequence is to attend from its admission on."""
        return sequence.remote_losses <= LOSSES_MAX and self._choice.wants(sequence)

    def must(self, sequence: Sequence) -> bool:
        """A running one is to attend from now on, having grown too long to go on without for example."""
        return sequence.remote_losses <= LOSSES_MAX and self._choice.must(sequence)

    def admit(self, sequence: Sequence) -> bool:
        """Gives a waiting sequence a table that begins with all the blocks that the store has of it.

        False, with nothing done, where those are none or too few to be worth it, and the sequence fits into the pool.
        """
        usable = (len(sequence.token_ids) - 1) // self._cache.block_tokens
        sequence.remote = context = self.remote.open(sequence.hashes[:usable])
        if not self._choice.takes(sequence, context.blocks if context is not None else 0):
            self.release(sequence)
            return False
        self._choice.began(sequence)
        table = self._cache.empty_table(sequence.hashes, sequence.extra_keys)
        if context is not None:
            self._cache.let_stay(table, context.blocks)
        sequence.table = table
        sequence.computed_tokens = table.remote_tokens
        return True

    def make_room(self, sequence: Sequence) -> bool:
        """Leaves the oldest blocks to the store where the next step would need more blocks here than allowed.

        False where the store does not have them: the sequence cannot go on like this.
        """
        table = sequence.table
        assert table is not None
        needed = -(-sequence.room_tokens(self._chunk_tokens) // self._cache.block_tokens)
        if needed - table.remote_blocks <= self.resident_blocks_max:
            return True
        leaving = min(table.sealed, needed - self.resident_blocks_max // 2)
        context = self._open_all(sequence, leaving)
        if context is None:
            sequence.remote_losses = LOSSES_MAX + 1
            return False
        self.release(sequence)
        sequence.remote = context
        self._cache.let_stay(table, context.blocks)
        return needed - table.remote_blocks <= self._cache.pages.capacity

    def recover(self, sequence: Sequence) -> bool:
        """After a loss: the same blocks once more, from whoever has them now. False where they are not to be had."""
        table = sequence.table
        assert table is not None
        sequence.remote_losses += 1
        self.release(sequence)
        if sequence.remote_losses > LOSSES_MAX:
            return False
        sequence.remote = self.remote.open(table.hashes[: table.remote_blocks])
        return sequence.remote is not None and sequence.remote.blocks == table.remote_blocks

    def may_go_on(self, sequence: Sequence) -> bool:
        """A sequence that was lost too often goes on without the store, where it fits into the pool."""
        return sequence.remote_losses <= LOSSES_MAX or self._choice.fits(sequence)

    def moves(self, sequence: Sequence, spare_blocks: int) -> bool:
        """A sequence that attends is better off with its blocks here from now on: to be admitted anew, for which room is left."""
        if not sequence.attends or not self._choice.moves(sequence, spare_blocks):
            return False
        sequence.keeps_here, sequence.attends = True, False
        return True

    def leave_for(self, victim: Sequence, running: Iterable[Sequence]) -> bool:
        """Has a running sequence, the one with the most blocks here, attend from now on, where that costs less than to preempt
        `victim`. False where there is none.
        """
        for sequence in sorted(running, key=lambda each: each.table.sealed if each.table is not None else 0, reverse=True):
            table = sequence.table
            if table is None or table.lent is not None or sequence.attends or sequence.loading is not None or not table.sealed:
                continue
            if sequence.remote_losses > LOSSES_MAX or not self._choice.leaves(sequence, victim):
                continue
            context = self.remote.open(table.hashes[: table.sealed])
            if context is not None:
                sequence.attends, sequence.remote = True, context
                self._choice.began(sequence)
                self._cache.let_stay(table, context.blocks)
                return True
        return False

    def ended(self, sequence: Sequence) -> None:
        """The sequence is over."""
        try:
            self.release(sequence)
        finally:
            self._choice.ended(sequence)

    def release(self, sequence: Sequence) -> None:
        """The sequence needs its remote blocks no more."""
        context, sequence.remote = sequence.remote, None
        if context is not None:
            self.remote.close(context)

    def _open_all(self, sequence: Sequence, blocks: int) -> AttendedPrefix | None:
        """A context of exactly so many blocks; those that the store lacks are sent once more."""
        table = sequence.table
        assert table is not None
        context = self.remote.open(table.hashes[:blocks])
        if context is not None and context.blocks == blocks:
            return context
        there = table.remote_blocks
        if context is not None:
            there = max(there, context.blocks)
            self.remote.close(context)
        if self._cache.flush(self._flush_ms):
            self._cache.offer_again(table, range(there, blocks))
            self._cache.flush(self._flush_ms)
        context = self.remote.open(table.hashes[:blocks])
        if context is None or context.blocks == blocks:
            return context
        self.remote.close(context)
        return None
