"""Sequences that leave their first blocks in the store: how many blocks are here, and the handling of losses.

Owns: the open prefixes of sequences, and every change of an `AttendState` but `load`; `AttendChoice` decides. Called between steps.
Invariant: at the start of a step, an attending sequence has at most `resident_blocks_max` blocks here, and all blocks before them
in one prefix that is not lost; contexts of any length therefore run in any pool that holds a few chunks.
"""

from __future__ import annotations

from collections.abc import Iterable

from attnstore_worker.cache import CacheManager
from attnstore_worker.cache.attending.contexts import AttendedPrefix, RemoteAttention
from attnstore_worker.cache.pool.block_table import BlockTable
from attnstore_worker.engine.attend_policy import AttendChoice
from attnstore_worker.engine.sequence import Sequence


class AttendedBlocks:
    """`flush_ms`: how long to wait for needed blocks on their way to the store before they are given up."""

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
        """Returns whether a waiting sequence should look for blocks to attend to."""
        return sequence.attend.may_begin and self._choice.wants(sequence)

    def admit(self, sequence: Sequence) -> bool:
        """Gives a waiting sequence a table that begins with all of its blocks in the store, and makes it attend.

        Returns False, without effect, if the store has none or too few to be worth it and the sequence fits into the pool.
        """
        usable = (len(sequence.token_ids) - 1) // self._cache.block_tokens
        prefix = self.remote.open(sequence.hashes[:usable])
        try:
            taken = self._choice.takes(sequence, prefix)
        except BaseException:
            self._close(prefix)
            raise
        if taken is None:
            self._close(prefix)
            return False
        sequence.table = table = BlockTable(self._cache.block_tokens, hashes=sequence.hashes, extra_keys=sequence.extra_keys)
        self._begin(sequence, table, prefix)
        self._choice.began(sequence, taken)
        sequence.computed_tokens = table.remote_tokens
        return True

    def make_room(self, sequence: Sequence) -> bool:
        """Leaves the oldest blocks to the store if a sequence attends, or must from now on, and the next step would need more
        blocks here than allowed. Returns False if the store does not have them: the sequence cannot continue like this.
        """
        if not sequence.attend.attends and sequence.attend.may_begin and self._choice.must(sequence):
            sequence.attend.begin(len(sequence.generated))
        if not sequence.attend.attends:
            return True
        table = sequence.table
        assert table is not None
        needed = -(-sequence.room_tokens(self._chunk_tokens) // self._cache.block_tokens)
        if needed - table.remote_blocks <= self.resident_blocks_max:
            return True
        leaving = min(table.sealed, needed - self.resident_blocks_max // 2)
        prefix = self._open_all(sequence, leaving)
        self.release(sequence)
        if prefix is None:
            sequence.attend.give_up()
            return False
        sequence.attend.prefix = prefix
        self._cache.let_stay(table, prefix.blocks)
        return needed - table.remote_blocks <= self._cache.pages.capacity

    def recover(self, sequence: Sequence) -> bool:
        """Opens the blocks of a lost prefix again, at any node that has them. Returns False if that fails."""
        table = sequence.table
        assert table is not None
        self.release(sequence)
        sequence.attend.lose()
        if not sequence.attend.attends:
            return False
        sequence.attend.prefix = prefix = self.remote.open(table.hashes[: table.remote_blocks])
        return prefix is not None and prefix.blocks == table.remote_blocks

    def may_go_on(self, sequence: Sequence) -> bool:
        """Returns whether the sequence can be admitted again: it attends, or fits into the pool."""
        return sequence.attend.may_begin or self._choice.fits(sequence)

    def moves(self, sequence: Sequence, spare_blocks: int) -> bool:
        """Returns whether an attending sequence should have its blocks here, for which `spare_blocks` are left: then
        call `move`.
        """
        return sequence.attend.attends and self._choice.moves(sequence, spare_blocks)

    def move(self, sequence: Sequence) -> None:
        """Ends attending: the sequence will be admitted again, with its blocks here."""
        self.release(sequence)
        sequence.attend.move()

    def leave_for(self, victim: Sequence, running: Iterable[Sequence]) -> bool:
        """Makes a running sequence, the one with the most blocks here, attend from now on, if that costs less than preempting
        `victim`. Returns False if there is none.
        """
        for sequence in sorted(running, key=lambda each: each.table.sealed if each.table is not None else 0, reverse=True):
            table, state = sequence.table, sequence.attend
            if table is None or table.lent is not None or state.attends or sequence.load is not None or not table.sealed:
                continue
            if not state.may_begin or not self._choice.leaves(sequence, victim):
                continue
            prefix = self.remote.open(table.hashes[: table.sealed])
            if prefix is not None:
                self._begin(sequence, table, prefix)
                return True
        return False

    def ended(self, sequence: Sequence) -> None:
        """Forgets a finished sequence."""
        try:
            self.release(sequence)
        finally:
            self._choice.ended(sequence)

    def release(self, sequence: Sequence) -> None:
        """Closes the prefix of a sequence, if it has one."""
        prefix, sequence.attend.prefix = sequence.attend.prefix, None
        self._close(prefix)

    def _close(self, prefix: AttendedPrefix | None) -> None:
        if prefix is not None:
            self.remote.close(prefix)

    def _begin(self, sequence: Sequence, table: BlockTable, prefix: AttendedPrefix | None) -> None:
        sequence.attend.begin(len(sequence.generated))
        sequence.attend.prefix = prefix
        if prefix is not None:
            self._cache.let_stay(table, prefix.blocks)

    def _open_all(self, sequence: Sequence, blocks: int) -> AttendedPrefix | None:
        """Opens a prefix of exactly that many blocks; blocks that the store lacks are sent again."""
        table = sequence.table
        assert table is not None
        prefix = self.remote.open(table.hashes[:blocks])
        if prefix is not None and prefix.blocks == blocks:
            return prefix
        there = table.remote_blocks
        if prefix is not None:
            there = max(there, prefix.blocks)
            self.remote.close(prefix)
        if self._cache.flush(self._flush_ms):
            self._cache.offer_again(table, range(there, blocks))
            self._cache.flush(self._flush_ms)
        prefix = self.remote.open(table.hashes[:blocks])
        if prefix is None or prefix.blocks == blocks:
            return prefix
        self.remote.close(prefix)
        return None
