"""Look-ahead prefetch: the first waiting sequences' pages are fetched before their turn comes.

Owns: the swap-ins of sequences that do not run yet. Each has a table of its own that holds blocks for the pages on their way; what
has arrived is sealed, and when the swap-in is over the table is released: the pages stay in the pool, as anything cached does.
Invariant: prefetching takes only blocks that nobody who runs needs: it gives way before anyone is preempted or kept waiting.
Where it fails, pages are fetched later.

What is fetched this way was announced to the eviction policy, so a policy that looks ahead keeps it until it is used.
CachedAttention (Gao et al., USENIX ATC 2024) calls it scheduler-aware fetching.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable

from attnstore_worker.cache import CacheManager, Loading
from attnstore_worker.engine.sequence import Sequence

_LOG = logging.getLogger(__name__)


class LookAheadPrefetch:
    """For the first `sequences_max` sequences in the queue, each once for every time that it waits."""

    def __init__(self, cache: CacheManager, sequences_max: int) -> None:
        self._cache = cache
        self._sequences_max = sequences_max
        self._running: dict[Sequence, Loading] = {}
        self._tried: set[Sequence] = set()

    @property
    def blocks(self) -> int:
        """Blocks that are held for pages on their way, and for those before them."""
        return sum(len(loading.table.block_ids) for loading in self._running.values())

    def advance(self, waiting: Iterable[Sequence], spare_blocks: int) -> None:
        """Takes what has arrived, and begins with the next sequences as far as `spare_blocks` reach."""
        for sequence, loading in list(self._running.items()):
            try:
                self._cache.advance(loading, loading.table.sealed * loading.table.block_tokens)
            except Exception:
                _LOG.exception("sequence %d: what was fetched ahead is given up", sequence.sequence_id)
                self.drop(sequence)
            if loading.running is None:
                self.drop(sequence)
        for sequence in list(waiting)[: self._sequences_max]:
            if sequence not in self._tried:
                self._tried.add(sequence)
                spare_blocks -= self._begin(sequence, spare_blocks)

    def drop(self, sequence: Sequence) -> None:
        """Ends what runs for a sequence; what has arrived stays in the pool."""
        loading = self._running.pop(sequence, None)
        if loading is not None:
            try:
                self._cache.abandon(loading)
            except Exception:
                _LOG.exception("sequence %d: a prefetch did not end in order", sequence.sequence_id)
            self._cache.release(loading.table)

    def forget(self, sequence: Sequence) -> None:
        """The sequence's turn has come, or it has ended."""
        self.drop(sequence)
        self._tried.discard(sequence)

    def give_way(self) -> bool:
        """Ends the newest prefetch. False where there is none."""
        if not self._running:
            return False
        self.drop(next(reversed(self._running)))
        return True

    def _begin(self, sequence: Sequence, spare_blocks: int) -> int:
        """Begins where there is something to fetch. How many blocks it takes."""
        try:
            begun = self._cache.prefetch(sequence.token_ids, sequence.hashes, spare_blocks, sequence.extra_keys)
        except Exception:
            _LOG.exception("sequence %d: nothing is fetched ahead", sequence.sequence_id)
            return 0
        if begun is None:
            return 0
        self._running[sequence] = begun
        return len(begun.table.block_ids)
