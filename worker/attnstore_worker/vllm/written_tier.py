"""The worker's store tier, which remembers the pages that the store has taken until they are reported to the scheduler.

Owns: these names; at most `_WRITTEN_MAX` of them, the latest.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Final

from attnstore.clock import Clock
from attnstore.core.hashing import BlockHash, Namespace
from attnstore.core.layout import PageLayout
from attnstore.types import WriteResult
from attnstore_worker.cache.store.base import PageStore
from attnstore_worker.cache.store.remote import RemoteTier
from attnstore_worker.cache.store.transfer import TransferObserver

_WRITTEN_MAX: Final = 1 << 14


class WrittenTier(RemoteTier):
    """See the module."""

    def __init__(
        self,
        store: PageStore,
        namespace: Namespace,
        layout: PageLayout,
        *,
        deadline_ms: float,
        clock: Clock,
        observer: TransferObserver | None = None,
    ) -> None:
        super().__init__(store, namespace, layout, deadline_ms=deadline_ms, clock=clock, observer=observer)
        self._written: deque[BlockHash] = deque(maxlen=_WRITTEN_MAX)

    def write(self, hashes: Sequence[BlockHash], pages: Sequence[memoryview], *, deadline_ms: float | None = None) -> WriteResult:
        """See `RemoteTier.write`."""
        result = super().write(hashes, pages, deadline_ms=deadline_ms)
        self._written.extend(name for name, verdict in zip(hashes, result.verdicts, strict=True) if verdict.is_kept)
        return result

    def take_written(self) -> tuple[BlockHash, ...]:
        """Returns the pages that the store has taken since the last call."""
        return tuple(self._written.popleft() for _ in range(len(self._written)))
