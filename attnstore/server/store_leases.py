"""Look-ups in the page table and the leases that they take, for every transport of a node.

Owns: `StoreLeases`, a part of `attnstore.server.store.Store`, whose lock it shares. Long operations are `Sliced` for callers on the
event loop, each with a blocking twin for callers on threads.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Sequence

from attnstore.clock import Clock
from attnstore.core.heat import SegmentHeat
from attnstore.core.matching import SlicedMatch
from attnstore.core.page_table import MatchOutcome, PageTable
from attnstore.limits import MATCH_PAGES_MAX
from attnstore.server.slices import Sliced, finish
from attnstore.types import Space


class StoreLeases:
    """Usable from any thread. `heat` counts how often segments are used."""

    def __init__(self, table: PageTable, clock: Clock, lock: threading.Lock, heat: SegmentHeat) -> None:
        self._table = table
        self._clock = clock
        self._lock = lock
        self._heat = heat
        self._held_pages = 0

    @property
    def held_pages(self) -> int:
        """The number of pages held for attend since the start."""
        return self._held_pages

    def counts_held(self, pages: int) -> None:
        """Adds `pages` to `held_pages`."""
        with self._lock:
            self._held_pages += pages

    @property
    def leased_pages(self) -> int:
        """`Pins.leased_pages`."""
        with self._lock:
            return self._table.pins.leased_pages

    def match(self, space: Space, prefixes: Sequence[Sequence[bytes]], lease_ms: int) -> MatchOutcome:
        """`PageTable.match`. A match that takes a lease counts as a use of the segments that it finds."""
        found = self._match_at_once(space, prefixes, lease_ms)
        return finish(self._match_in_slices(space, prefixes, lease_ms)) if found is None else found

    def matching(self, space: Space, prefixes: Sequence[Sequence[bytes]], lease_ms: int) -> Sliced[MatchOutcome]:
        """`match` in slices. Between two slices, pages that no lease holds may be evicted."""
        found = self._match_at_once(space, prefixes, lease_ms)
        return (yield from self._match_in_slices(space, prefixes, lease_ms)) if found is None else found

    def _match_at_once(self, space: Space, prefixes: Sequence[Sequence[bytes]], lease_ms: int) -> MatchOutcome | None:
        """Returns None if one slice is not enough: there are too many pages, or expired leases must release their pages first."""
        pages = len(prefixes[0]) if len(prefixes) == 1 else sum(map(len, prefixes))
        if pages > MATCH_PAGES_MAX or len(prefixes) > MATCH_PAGES_MAX:
            return None
        with self._lock:
            now_ms = self._clock.now_ms()
            if lease_ms > 0 and self._table.pins.has_due(now_ms):
                return None
            return self._used(space, prefixes, self._table.match(space, prefixes, lease_ms, now_ms))

    def _match_in_slices(self, space: Space, prefixes: Sequence[Sequence[bytes]], lease_ms: int) -> Sliced[MatchOutcome]:
        if lease_ms > 0:
            yield from self.settling()
        match = SlicedMatch(self._table, space, prefixes, lease_ms)
        try:
            while not self._advanced(match):
                yield
        except BaseException:
            if match.lease_id is not None:
                self.release(space.tenant, match.lease_id)
            raise
        with self._lock:
            return self._used(space, prefixes, match.outcome())

    def _advanced(self, match: SlicedMatch) -> bool:
        with self._lock:
            return match.advance(self._clock.now_ms())

    def _used(self, space: Space, prefixes: Sequence[Sequence[bytes]], found: MatchOutcome) -> MatchOutcome:
        if found.lease_id is not None:
            self._heat.used(space.tenant, [prefix[:hits] for prefix, hits in zip(prefixes, found.hits, strict=True)])
        return found

    def settling(self) -> Sliced[None]:
        """Calls `Pins.expire` until every ended lease has released its pages."""
        while True:
            with self._lock:
                now_ms = self._clock.now_ms()
                next_ms = self._table.pins.expire(now_ms) if self._table.pins.has_due(now_ms) else None
            if next_ms is None or next_ms > now_ms:
                return
            yield

    def hot_segments(self) -> frozenset[bytes]:
        """`SegmentHeat.hot`."""
        with self._lock:
            return self._heat.hot(self._clock.now_ms())

    def holds(self, space: Space, lease_ids: Iterable[bytes]) -> bool:
        """Returns whether `PageTable.holds` all of these leases."""
        with self._lock:
            now_ms = self._clock.now_ms()
            return all(self._table.holds(space, lease_id, now_ms) for lease_id in lease_ids)

    def renew(self, tenant: str, lease_id: bytes, lease_ms: int) -> int:
        """`Pins.renew`."""
        with self._lock:
            return self._table.pins.renew(tenant, lease_id, lease_ms, self._clock.now_ms())

    def release(self, tenant: str, lease_id: bytes) -> bool:
        """`Pins.release`, until all pages of the lease are released."""
        was_alive, is_done = self._release(tenant, lease_id)
        if not is_done:
            finish(self.settling())
        return was_alive

    def releasing(self, tenant: str, lease_id: bytes) -> Sliced[bool]:
        """`release` in slices. The lease is void after the first slice."""
        was_alive, is_done = self._release(tenant, lease_id)
        if not is_done:
            yield from self.settling()
        return was_alive

    def _release(self, tenant: str, lease_id: bytes) -> tuple[bool, bool]:
        """Returns whether the lease was alive, and whether its pages are released."""
        with self._lock:
            now_ms = self._clock.now_ms()
            return self._table.pins.release(tenant, lease_id, now_ms), not self._table.pins.has_due(now_ms)
