"""The REMOTE tier: a store whose every failure is a miss.

Owns: the registration of the namespace before its first use, and the pause after a failure, during which no call is made, so that a
dead store does not cost every request a deadline. The client registers the namespace again with a restarted node.
Invariant: no method raises because of the store. A failure is counted, logged once per pause and kept in `last_error`.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Final, TypeVar

from attnstore.client.base import OnLayer
from attnstore.client.cluster.breaker import had_fair_time
from attnstore.clock import Clock, Deadline
from attnstore.core.hashing import BlockHash, Namespace
from attnstore.core.layout import PageLayout
from attnstore.errors import DeadlineExceeded, Unavailable
from attnstore.types import Lease, MatchResult, PageStatus, ReadResult, WriteResult
from attnstore_worker.cache.pool.tier import Tier
from attnstore_worker.cache.store.base import PageStore
from attnstore_worker.cache.store.transfer import Transfer, TransferKind, TransferObserver

_LOG = logging.getLogger(__name__)
_T = TypeVar("_T")

LEASE_MARGIN_MS: Final = 5_000
"""A lease outlives the read that it protects by this much, for the time between match and read."""
PAUSE_MS: Final = 1_000
"""No call is made for this long after a failure."""


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
    """Pages of one namespace in a store: a `PageSource`. Thread-safe. `observer` is told of every match, read and write.

    `deadline_ms` bounds each call without another deadline, including the registration of the namespace.
    """

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
        self._store = store
        self._namespace = namespace
        self._layout = layout
        self.deadline_ms = deadline_ms
        self._clock = clock
        self._observer = observer
        self._lock = threading.Lock()
        self._registered = False
        self._failing = False
        self._paused_until_ms = float("-inf")
        self._statistics = RemoteStatistics()

    @property
    def is_failing(self) -> bool:
        """True if a call has failed, and none has succeeded since."""
        return self._failing

    @property
    def is_paused(self) -> bool:
        """True if no call is made now, because one has just failed."""
        return self._clock.now_ms() < self._paused_until_ms

    def now_ms(self) -> float:
        """The time by the clock of the tier."""
        return self._clock.now_ms()

    def connect(self) -> bool:
        """Registers the namespace before the first request, so that no request pays for it. Returns False if that failed."""
        return self._attempt("register", self.deadline_ms, 0, lambda **_: True) is not None

    def match(self, hashes: Sequence[BlockHash]) -> MatchResult:
        """Returns how many leading pages are stored, with a lease that covers reads until `deadline_ms` from now."""
        return self._match([hashes], int(self.deadline_ms) + LEASE_MARGIN_MS)

    def look_up(self, prefixes: Sequence[Sequence[BlockHash]]) -> MatchResult:
        """Returns how many leading pages of each prefix are stored, without a lease: each may be evicted at any time. `error` is
        set if the store did not answer, or answered in part.
        """
        return self._match(prefixes, 0)

    def read(
        self,
        hashes: Sequence[BlockHash],
        buffers: Sequence[memoryview],
        lease: Lease | None,
        *,
        deadline_ms: float,
        on_layer: OnLayer | None = None,
    ) -> ReadResult:
        """Fills one buffer per page. Pages that are not complete and verified are misses. `on_layer` as in `PageStore.read`."""
        started_ms = self._clock.now_ms()
        first_ms: list[float] = []

        def tell(layer: int, pages: int) -> None:
            if not first_ms:
                first_ms.append(self._clock.now_ms())
            if on_layer is not None:
                on_layer(layer, pages)

        result = self._attempt(
            "read",
            deadline_ms,
            len(hashes) * self._layout.page_bytes,
            partial(self._store.read, self._namespace, hashes, buffers, lease=lease, on_layer=None if on_layer is None else tell),
        )
        failed = result is None or result.error is not None
        if result is None:
            result = ReadResult(statuses=(PageStatus.INCOMPLETE,) * len(hashes), bytes_read=0)
        self.note_read(started_ms, result, failed=failed, first_byte_ms=first_ms[0] if first_ms else None)
        return result

    def note_read(
        self,
        started_ms: float,
        result: ReadResult,
        *,
        failed: bool = False,
        first_byte_ms: float | None = None,
        tier: Tier = Tier.REMOTE,
        ended_ms: float | None = None,
    ) -> None:
        """Counts a read that has ended, and tells the observer of it: as one of `tier`, until `ended_ms` (default: now)."""
        hits = sum(status.is_hit for status in result.statuses)
        asked = len(result.statuses)
        with self._lock:
            counted = self._statistics
            self._statistics = replace(
                counted,
                pages_read=counted.pages_read + hits,
                pages_missed=counted.pages_missed + asked - hits,
                bytes_read=counted.bytes_read + result.bytes_read,
            )
        self._observe(
            TransferKind.READ,
            started_ms,
            asked,
            hits,
            result.bytes_read,
            failed=failed,
            first_byte_ms=first_byte_ms,
            tier=tier,
            ended_ms=ended_ms,
        )

    def release(self, lease: Lease | None) -> None:
        """Ends a lease, if there is one."""
        if lease is not None:
            self._attempt("release", self.deadline_ms, 0, lambda **_: self._store.release(lease))

    def write(self, hashes: Sequence[BlockHash], pages: Sequence[memoryview], *, deadline_ms: float | None = None) -> WriteResult:
        """Stores pages. Returns one verdict per page, INCOMPLETE for all if the call failed."""
        started_ms = self._clock.now_ms()
        given_ms = self.deadline_ms if deadline_ms is None else deadline_ms
        result = self._attempt(
            "write",
            given_ms,
            len(hashes) * self._layout.page_bytes,
            partial(self._store.write, self._namespace, hashes, pages),
        )
        failed = result is None
        if result is None:
            result = WriteResult(verdicts=(PageStatus.INCOMPLETE,) * len(hashes), bytes_written=0)
        kept = sum(verdict.is_kept for verdict in result.verdicts)
        with self._lock:
            counted = self._statistics
            self._statistics = replace(
                counted,
                pages_written=counted.pages_written + kept,
                pages_refused=counted.pages_refused + len(hashes) - kept,
                bytes_written=counted.bytes_written + result.bytes_written,
            )
        self._observe(TransferKind.WRITE, started_ms, len(hashes), kept, result.bytes_written, failed=failed)
        return result

    def statistics(self) -> RemoteStatistics:
        """A snapshot."""
        return self._statistics

    def _match(self, prefixes: Sequence[Sequence[BlockHash]], lease_ms: int) -> MatchResult:
        started_ms = self._clock.now_ms()
        result = self._attempt(
            "match",
            self.deadline_ms,
            0,
            partial(self._store.match, self._namespace, prefixes, lease_ms=lease_ms),
        )
        found = result or MatchResult((0,) * len(prefixes), None, Unavailable("the store failed, or is left alone"))
        asked, pages = sum(map(len, prefixes)), sum(found.hits)
        self._observe(TransferKind.MATCH, started_ms, asked, pages, 0, failed=found.error is not None)
        return found

    def _attempt(self, verb: str, deadline_ms: float, size_bytes: int, call: Callable[..., _T]) -> _T | None:
        """Returns the result of `call(deadline_ms=...)`, or None if it failed or was not made. It moves `size_bytes`."""
        if self.is_paused:
            with self._lock:
                self._statistics = replace(self._statistics, skipped=self._statistics.skipped + 1)
            return None
        deadline = Deadline(self._clock, deadline_ms)
        try:
            if not self._registered:  # two threads may do it at once, which is harmless
                self._store.register_layout(self._namespace, self._layout, deadline_ms=deadline.left_ms())
                self._registered = True
            result = call(deadline_ms=deadline.left_ms())
        except Exception as raised:  # whatever a store does, the worker recomputes
            self._fail(verb, raised, deadline_ms, size_bytes)
            return None
        error = result.error if isinstance(result, MatchResult | ReadResult) else None
        if error is None:
            self._failing = False
        else:
            self._fail(verb, error, deadline_ms, size_bytes)
        return result

    def _fail(self, verb: str, error: Exception, deadline_ms: float, size_bytes: int) -> None:
        """Counts a failure, unless the call only exceeded a deadline that a planner had shortened, which is no sign of a dead
        store.
        """
        fair = had_fair_time(deadline_ms, size_bytes) or deadline_ms >= self.deadline_ms / 2
        if isinstance(error, DeadlineExceeded) and not fair:
            return
        last_error = f"{verb}: {type(error).__name__}: {error}"
        with self._lock:
            self._statistics = replace(self._statistics, failures=self._statistics.failures + 1, last_error=last_error)
            self._failing = True
            self._paused_until_ms = self._clock.now_ms() + PAUSE_MS
        _LOG.warning("the store failed and is left alone for %d ms: %s", PAUSE_MS, last_error)

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
        tier: Tier = Tier.REMOTE,
        ended_ms: float | None = None,
    ) -> None:
        if ended_ms is None:
            ended_ms = self._clock.now_ms()
        if self._observer is not None:
            transfer = Transfer(tier, kind, started_ms, ended_ms, asked, pages, size_bytes, failed, first_byte_ms)
            self._observer.transferred(transfer)
