"""Look-ahead prefetch: the pages of the first waiting sequences are fetched before their turn comes, and those of a sequence that
attends to them in the store while it goes on.

Owns: the loads of sequences that do not wait for them. Each has a table of its own, which holds blocks for the pages on their way.
Pages that arrive are sealed; when the load is over the table is released, and the pages stay in the pool like any cached page.
Invariant: prefetching takes only blocks that no running sequence needs. It gives way before a sequence is preempted or kept
waiting. Where it fails, pages are fetched later.

The blocks fetched this way were announced to the eviction policy, so a policy that looks ahead keeps them until they are used.
CachedAttention (Gao et al., USENIX ATC 2024) calls it scheduler-aware fetching.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from collections.abc import Sequence as Items

from attnstore.core.hashing import BlockHash
from attnstore_worker.cache import CacheManager, Load
from attnstore_worker.cache.pool.block_table import BlockTable
from attnstore_worker.engine.sequence import Sequence

_LOG = logging.getLogger(__name__)


class LookAheadPrefetch:
    """For the first `sequences_max` sequences in the queue, and those of `bring`: each once per time that it waits, and per time
    that it runs.
    """

    def __init__(self, cache: CacheManager, sequences_max: int) -> None:
        self._cache = cache
        self._sequences_max = sequences_max
        self._running: dict[Sequence, tuple[BlockTable, Load]] = {}
        self._tried: set[Sequence] = set()

    @property
    def blocks(self) -> int:
        """The blocks held for pages in flight, and for those before them."""
        return sum(len(table.block_ids) for table, _ in self._running.values())

    def advance(self, waiting: Iterable[Sequence], spare_blocks: int) -> None:
        """Takes arrived pages, and begins loads for the next sequences as far as `spare_blocks` allow."""
        for sequence, (table, load) in list(self._running.items()):
            try:
                self._cache.loads.advance(table, load, table.sealed * table.block_tokens)
            except Exception:
                _LOG.exception("sequence %d: what was fetched ahead is given up", sequence.sequence_id)
                self.drop(sequence)
            if not load.running:
                self.drop(sequence)
        for sequence in list(waiting)[: self._sequences_max]:
            if sequence not in self._tried:
                self._tried.add(sequence)
                spare_blocks -= self._begin(sequence, spare_blocks)

    def bring(self, sequence: Sequence, spare_blocks: int) -> bool:
        """Begins to fetch the blocks that a running sequence attends to. Returns False if there is nothing to wait for."""
        if sequence not in self._tried:
            self._tried.add(sequence)
            self._begin(sequence, spare_blocks)
        return sequence in self._running

    def has_brought(self, sequence: Sequence) -> bool:
        """Returns whether a fetch that `bring` began has ended, however it ended."""
        return sequence in self._tried and sequence not in self._running

    def drop(self, sequence: Sequence) -> None:
        """Ends the load of a sequence; arrived pages stay in the pool."""
        if sequence in self._running:
            table, load = self._running.pop(sequence)
            try:
                self._cache.loads.abandon(table, load)
            except Exception:
                _LOG.exception("sequence %d: a prefetch did not end in order", sequence.sequence_id)
            self._cache.release(table)

    def forget(self, sequence: Sequence) -> None:
        """Forgets a sequence that is admitted or has ended."""
        self.drop(sequence)
        self._tried.discard(sequence)

    def give_way(self) -> bool:
        """Ends the newest prefetch. Returns False if there is none."""
        if not self._running:
            return False
        self.drop(next(reversed(self._running)))
        return True

    def _begin(self, sequence: Sequence, spare_blocks: int) -> int:
        """Begins a prefetch if there is something to fetch. Returns how many blocks it takes."""
        try:
            begun = self._cache.prefetch(*fetchable(sequence), spare_blocks, sequence.extra_keys)
        except Exception:
            _LOG.exception("sequence %d: nothing is fetched ahead", sequence.sequence_id)
            return 0
        if begun is None:
            return 0
        self._running[sequence] = begun
        return len(begun[0].block_ids)


def fetchable(sequence: Sequence) -> tuple[Items[int], list[BlockHash]]:
    """Returns the tokens of the blocks that a sequence lacks here, and one more, and the known names of these blocks: all of them
    while it waits, those in the store while it attends.
    """
    table = sequence.table
    if table is None:
        return sequence.token_ids, sequence.hashes
    return sequence.token_ids[: table.remote_tokens + 1], table.hashes[: table.remote_blocks]
