"""The REMOTE tier: a store whose every failure is a miss.

Owns: registration of the namespace, and the pause after a failure that keeps a dead store from taxing each request.
Invariant: no method raises because of the store; what went wrong is counted, logged once per pause and kept in `last_error`.
"""

from __future__ import annotations

import logging
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, TypeVar

from attnstore.client.base import OnLayer
from attnstore.client.cluster.breaker import had_fair_time
from attnstore.clock import Clock
from attnstore.core.hashing import BlockHash, Namespace
from attnstore.core.layout import PageLayout
from attnstore.errors import DeadlineExceeded, NamespaceUnknown
from attnstore.types import Lease, MatchResult, PageStatus, ReadResult, WriteResult
from attnstore_worker.cache.planning.observation import Observer, Transfer, TransferKind, Unobserved
from attnstore_worker.cache.store.base import PageStore

_LOG = logging.getLogger(__name__)
_T = TypeVar("_T")

LEASE_MARGIN_MS: Final = 5_000
"""A lease outlives the read it protects by this much, for the time between match and read."""
PAUSE_MS: Final = 1_000
"""After a failure the store is left alone for this long."""


@dataclass(frozen=True, slots=True)
class RemoteStatistics:
    """Counts since the start. `failures`: calls that failed as a whole; `skipped`: calls not made during a pause."""

    pages_read: int = 0
    pages_missed: int = 0
    pages_written: int = 0
    pages_refused: int = 0
    bytes_read: int = 0
    bytes_written: int = 0
    failures: int = 0
    skipped: int = 0
    last_error: str | None = None


class RemoteTier:
    """Pages of one namespace in a store: a `PageSource`. Thread-safe. `observer` is told of every match, read and write."""

    def __init__(
        self,
        store: PageStore,
        namespace: Namespace,
        layout: PageLayout,
        *,
        deadline_ms: int,
        clock: Clock,
        observer: Observer | None = None,
    ) -> None:
        self._store = store
        self._namespace = namespace
        self._layout = layout
        self.deadline_ms = deadline_ms
        self._clock = clock
        self._observer = observer or Unobserved()
        self._lock = threading.Lock()
        self._registered = False
        self._paused_until_ms = float("-inf")
        self._counts: Counter[str] = Counter()
        self._last_error: str | None = None

    def connect(self) -> bool:
        """Registers the namespace ahead of the first request, so that no request pays for it. False where that failed."""
        return self._attempt("register", lambda: True) is not None

    def match(self, hashes: Sequence[BlockHash]) -> MatchResult:
        """How many leading pages are there, with a lease that covers reads until `deadline_ms` from now."""
        lease_ms = self.deadline_ms + LEASE_MARGIN_MS
        started_ms = self._clock.now_ms()
        result = self._attempt("match", lambda: self._store.match(self._namespace, [hashes], lease_ms=lease_ms))
        if result is not None and result.error is not None:
            self._fail("match", result.error)
        found = result or MatchResult(hits=(0,), lease=None)
        failed = result is None or result.error is not None
        self._observe(TransferKind.MATCH, started_ms, len(hashes), found.hits[0], 0, failed=failed)
        return found

    def read(
        self,
        hashes: Sequence[BlockHash],
        buffers: Sequence[memoryview],
        lease: Lease | None,
        *,
        deadline_ms: float,
        on_layer: OnLayer | None = None,
    ) -> ReadResult:
        """Fills one buffer per page. Pages that did not come whole and verified are misses. `on_layer` as in `PageStore.read`."""
        started_ms = self._clock.now_ms()
        first_ms: list[float] = []

        def tell(layer: int, pages: int) -> None:
            if not first_ms:
                first_ms.append(self._clock.now_ms())
            if on_layer is not None:
                on_layer(layer, pages)

        result = self._attempt(
            "read",
            lambda: self._store.read(
                self._namespace,
                hashes,
                buffers,
                lease=lease,
                deadline_ms=deadline_ms,
                on_layer=None if on_layer is None else tell,
            ),
        )
        failed = result is None or result.error is not None
        if result is None:
            result = ReadResult(statuses=(PageStatus.INCOMPLETE,) * len(hashes), bytes_read=0)
        hits = sum(status.is_hit for status in result.statuses)
        self._count(pages_read=hits, pages_missed=len(hashes) - hits, bytes_read=result.bytes_read)
        if result.error is not None and not self._was_hurried(result.error, deadline_ms, len(hashes)):
            self._fail("read", result.error)
        first_byte_ms = first_ms[0] if first_ms else None
        self._observe(
            TransferKind.READ, started_ms, len(hashes), hits, result.bytes_read, failed=failed, first_byte_ms=first_byte_ms
        )
        return result

    def release(self, lease: Lease | None) -> None:
        """Ends a lease, if there is one."""
        if lease is not None:
            self._attempt("release", lambda: self._store.release(lease))

    def write(self, hashes: Sequence[BlockHash], pages: Sequence[memoryview]) -> None:
        """Stores pages. A page that the store refuses is only counted."""
        started_ms = self._clock.now_ms()
        result = self._attempt("write", lambda: self._store.write(self._namespace, hashes, pages, deadline_ms=self.deadline_ms))
        failed = result is None
        if result is None:
            result = WriteResult(verdicts=(PageStatus.INCOMPLETE,) * len(hashes), bytes_written=0)
        kept = sum(verdict.is_kept for verdict in result.verdicts)
        self._count(pages_written=kept, pages_refused=len(hashes) - kept, bytes_written=result.bytes_written)
        self._observe(TransferKind.WRITE, started_ms, len(hashes), kept, result.bytes_written, failed=failed)

    def statistics(self) -> RemoteStatistics:
        """A snapshot."""
        with self._lock:
            return RemoteStatistics(**self._counts, last_error=self._last_error)

    def _attempt(self, verb: str, call: Callable[[], _T]) -> _T | None:
        """The call's result, or None where it failed or was not made."""
        if self._clock.now_ms() < self._paused_until_ms:
            self._count(skipped=1)
            return None
        try:
            return self._registered_call(call)
        except Exception as error:  # whatever a store does, the worker recomputes
            self._fail(verb, error)
            return None

    def _registered_call(self, call: Callable[[], _T]) -> _T:
        if not self._registered:
            self._store.register_layout(self._namespace, self._layout)
            self._registered = True
        try:
            return call()
        except NamespaceUnknown:  # the node was restarted and is empty
            self._store.register_layout(self._namespace, self._layout)
            return call()

    def _fail(self, verb: str, error: Exception) -> None:
        self._count(failures=1)
        with self._lock:
            self._last_error = f"{verb}: {type(error).__name__}: {error}"
            self._paused_until_ms = self._clock.now_ms() + PAUSE_MS
        _LOG.warning("the store failed and is left alone for %d ms: %s", PAUSE_MS, self._last_error)

    def _was_hurried(self, error: Exception, deadline_ms: float, pages: int) -> bool:
        """The read ran out of a time that was short by a planner's choice, not the operator's: no sign of a dead store."""
        fair = had_fair_time(deadline_ms, pages * self._layout.page_bytes) or deadline_ms >= self.deadline_ms / 2
        return isinstance(error, DeadlineExceeded) and not fair

    def _observe(
        self,
        kind: TransferKind,
        started_ms: float,
        asked: int,
        pages: int,
        size_bytes: int,
        *,
        failed: bool,
        first_byte_ms: float | None = None,
    ) -> None:
        ended_ms = self._clock.now_ms()
        self._observer.transferred(Transfer("remote", kind, started_ms, ended_ms, asked, pages, size_bytes, failed, first_byte_ms))

    def _count(self, **increments: int) -> None:
        with self._lock:
            self._counts.update(increments)
