"""The page table with its arena, its clock and one lock: the object that every transport of a node works on.

Owns: `Store`. Invariants: the page table is accessed only under the lock. The lock is never held while the bytes of a page move or
while waiting for a peer, so that metadata stays fast while other threads move pages. Under one hold of the lock, at most
`WORK_PAGES_MAX` pages are changed and `MATCH_PAGES_MAX` are matched: longer operations are `Sliced` for callers on the event loop,
each with a blocking twin for callers on threads.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Literal, TypeVar

from attnstore.arena import Arena
from attnstore.clock import Clock
from attnstore.copying import Checksums, checksums, copy
from attnstore.core.hashing import page_checksum, range_checksum
from attnstore.core.heat import SegmentHeat
from attnstore.core.layout import PageLayout
from attnstore.core.matching import SlicedMatch
from attnstore.core.page import PageState
from attnstore.core.page_table import ArrivingPage, MatchOutcome, PageTable, PinnedPage, Room
from attnstore.core.statistics import PageTableStatistics, SpaceStatistics
from attnstore.limits import MATCH_PAGES_MAX, WORK_PAGES_MAX
from attnstore.logs import get_logger
from attnstore.server.pinned_views import Arrival, PageView, Reading, ReadingAll
from attnstore.server.slices import TURN_S, Sliced, finish, in_slices
from attnstore.types import PageEvent, PageStatus, Space

_log = get_logger(__name__)

T = TypeVar("T")
_ROOM_TRIES_MAX = 4_096
"""After so many tries other writers take the space as fast as it is freed, so the answer is NO_SPACE. Emptying an extent of two
million pages takes no more tries than this.
"""
Publish = Callable[[Iterable[tuple[Space, PageEvent]]], None]


class Store:
    """Page table and arena together, usable from any thread. `publish` receives the page events on the thread that caused them.

    `heat` counts how often segments are used; without it nothing is counted.
    """

    def __init__(self, table: PageTable, arena: Arena, clock: Clock, publish: Publish, heat: SegmentHeat | None = None) -> None:
        self._table = table
        self._arena = arena
        self._clock = clock
        self._held_pages = 0
        self._publish = publish
        self._heat = heat or SegmentHeat(0)
        self._lock = threading.Lock()

    @property
    def page_bytes_max(self) -> int:
        """The size of the largest page that fits."""
        return self._arena.extent_bytes

    def now_ms(self) -> float:
        """Returns the time of the clock that leases use."""
        return self._clock.now_ms()

    def register(self, space: Space, layout: PageLayout) -> int:
        """`PageTable.register`."""
        with self._lock:
            return self._table.register(space, layout)

    def layout_of(self, space: Space) -> PageLayout:
        """`PageTable.layout_of`. Also checks that the tenant has registered the namespace."""
        with self._lock:
            return self._table.layout_of(space)

    def limit_tenants(self, quota_bytes: Mapping[str, int]) -> None:
        """`PageTable.limit_tenants`."""
        with self._lock:
            self._table.limit_tenants(quota_bytes)

    @property
    def stored_pages(self) -> int:
        """`PageTable.stored_pages`."""
        with self._lock:
            return self._table.stored_pages

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
        """`PageTable.leased_pages`."""
        with self._lock:
            return self._table.leased_pages

    def sealed(self, after: int = 0) -> Iterator[list[tuple[Space, bytes]]]:
        """Yields the readable pages that were sealed after the first `after` pages stored here, a part of one extent at a time.

        Pages that come or go during the iteration may be included or not.
        """
        for extent in range(self._table.extents):
            with self._lock:
                pages = self._table.pages_in(extent)
            for part in in_slices(pages, WORK_PAGES_MAX):
                yield [(page.namespace.space, page.hash) for page in part if page.state is PageState.SEALED and page.number > after]

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
            if lease_ms > 0 and self._table.has_due(now_ms):
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
        """Calls `PageTable.expire` until every ended lease has released its pages."""
        while True:
            with self._lock:
                now_ms = self._clock.now_ms()
                next_ms = self._table.expire(now_ms) if self._table.has_due(now_ms) else None
            if next_ms is None or next_ms > now_ms:
                return
            yield

    def hot_segments(self) -> frozenset[bytes]:
        """`SegmentHeat.hot`."""
        with self._lock:
            return self._heat.hot(self._clock.now_ms())

    def reading(self, space: Space, page_hash: bytes, lease_id: bytes | None) -> Reading:
        """Keeps a sealed page in place for the `with` block, or yields the status that says why it cannot."""
        return Reading(self, space, page_hash, lease_id)

    def reading_all(self, space: Space, page_hashes: Sequence[bytes], lease_id: bytes | None) -> ReadingAll:
        """`reading` of several pages."""
        return ReadingAll(self, space, page_hashes, lease_id)

    def pin(self, space: Space, page_hash: bytes, lease_id: bytes | None) -> PageView | PageStatus:
        """`PageTable.pin`. Pass the page to `unpin`."""
        [page] = self.pin_all(space, (page_hash,), lease_id)
        return page

    def pin_all(self, space: Space, page_hashes: Sequence[bytes], lease_id: bytes | None) -> list[PageView | PageStatus]:
        """`PageTable.pin` of each page under one hold of the lock. Pass the pages to `unpin`."""
        pages: list[PinnedPage | PageStatus] = []
        try:
            with self._lock:
                now_ms = self._clock.now_ms()
                for page_hash in page_hashes:
                    pages.append(self._table.pin(space, page_hash, lease_id, now_ms))
            return [page if isinstance(page, PageStatus) else PageView(self._arena.view(page.slot), page) for page in pages]
        except BaseException:
            with self._lock:
                for page in pages:
                    if isinstance(page, PinnedPage):
                        self._table.unpin(page)
            raise

    def unpin(self, *views: PageView) -> None:
        """`PageTable.unpin` of each page."""
        with self._lock:
            for view in views:
                self._table.unpin(view.page)

    def locate(
        self, space: Space, page_hashes: Sequence[bytes], lease_id: bytes | None, place: Callable[[PinnedPage], T]
    ) -> list[T | PageStatus]:
        """Returns `place(page)` of each sealed page, called while the page cannot be evicted, or the status that says why not.

        The table is locked meanwhile: ask for few pages at once.
        """
        with self._lock:
            pages = self._table.use(space, page_hashes, lease_id, self._clock.now_ms())
            return [page if isinstance(page, PageStatus) else place(page) for page in pages]

    def prepare(self, space: Space, page_hash: bytes, checksum: int, age_ms: int = 0) -> Arrival | PageStatus:
        """Repeats `PageTable.prepare` until it has a slot or fails. Pass the page to `seal` or `abort`."""
        for _ in range(_ROOM_TRIES_MAX):
            page = self.try_prepare(space, page_hash, checksum, age_ms)
            if page is not Room.MAKING:
                return page
            time.sleep(TURN_S)
        return PageStatus.NO_SPACE

    def try_prepare(
        self, space: Space, page_hash: bytes, checksum: int, age_ms: int = 0
    ) -> Arrival | PageStatus | Literal[Room.MAKING]:
        """`PageTable.prepare`."""
        with self._lock:
            page = self._table.prepare(space, page_hash, checksum, self._clock.now_ms(), age_ms)
            try:
                # The first view of an extent of a new tenant wipes it, so no other writer may be in it.
                outcome = Arrival(self._arena.view(page.slot), page) if isinstance(page, ArrivingPage) else page
                self._tell()
            except BaseException:
                if isinstance(page, ArrivingPage):
                    self._table.abort(page)
                raise
        return outcome

    def seal(self, arrival: Arrival) -> PageStatus:
        """Ends the arrival of a page whose bytes are complete. Returns STORED, or DELETED (see `PageTable.complete`) or
        CHECKSUM_MISMATCH; the slot is free again then.
        """
        try:
            made = checksums(arrival.data, arrival.page.layer_bytes)
        except BaseException:
            self.abort(arrival)
            raise
        return self._end(arrival, made)

    def fill(self, arrival: Arrival, source: int) -> PageStatus:
        """Copies a whole page from the address `source` and ends its arrival as `seal` does."""
        try:
            made = copy(arrival.data, source, arrival.page.layer_bytes)
        except BaseException:
            self.abort(arrival)
            raise
        return self._end(arrival, made)

    def _end(self, arrival: Arrival, made: Checksums) -> PageStatus:
        whole, layers = made
        if whole != arrival.page.checksum:
            self.abort(arrival)
            return PageStatus.CHECKSUM_MISMATCH
        with self._lock:
            verdict = self._table.complete(arrival.page, self._clock.now_ms(), layers)
            self._tell()
        return verdict

    def _tell(self) -> None:
        """Publishes the events under the lock, so that they keep their order."""
        events = self._table.take_events()
        if events:
            self._publish(events)

    def abort(self, arrival: Arrival) -> None:
        """`PageTable.abort`."""
        with self._lock:
            self._table.abort(arrival.page)

    def peek(self, space: Space, page_hash: bytes) -> PageView | None:
        """`PageTable.peek`, for `is_intact`."""
        with self._lock:
            page = self._table.peek(space, page_hash)
            return None if page is None else PageView(self._arena.view(page.slot), page)

    def hashed_slice(self, view: PageView, begin: int, end: int) -> tuple[memoryview, int] | PageStatus:
        """`PageView.slice` with the `page_checksum` of the bytes, for a reader that does not check guards. MISSING if the bytes
        changed since they were sealed; the page is removed then.

        The checksum of a part is computed before the part's layers are compared with their sealed checksums, so that it never
        matches bytes that change in between or later.
        """
        part, guard = view.slice(begin, end)
        if len(part) == len(view.data):
            return part, guard
        checksum = page_checksum(part)
        if range_checksum(checksums(part, view.page.layer_bytes)[1]) != guard:
            self.is_intact(view)
            return PageStatus.MISSING
        return part, checksum

    def is_intact(self, view: PageView, within_ms: float = 0.0) -> bool:
        """Hashes a page in place, pinned or not, and returns whether it is what was sealed. Skips pages hashed less than
        `within_ms` ago.

        A page that differs is removed for all who look it up or use it in place, so that it can be written again. Also returns
        False for a page that was evicted meanwhile.
        """
        page = view.page
        if self._clock.now_ms() - page.verified_ms < within_ms:
            return True
        intact = checksums(view.data, page.layer_bytes) == (page.checksum, page.layers)
        with self._lock:
            if self._table.verified(page, self._clock.now_ms(), intact=intact):
                self._arena.withdraw(page.slot)
                _log.error(
                    "page no longer matched its checksums and was removed", extent=page.slot.extent, at=page.slot.offset_bytes
                )
            self._tell()
        return intact

    def holds(self, space: Space, lease_id: bytes) -> bool:
        """`PageTable.holds`."""
        with self._lock:
            return self._table.holds(space, lease_id, self._clock.now_ms())

    def renew(self, tenant: str, lease_id: bytes, lease_ms: int) -> int:
        """`PageTable.renew`."""
        with self._lock:
            return self._table.renew(tenant, lease_id, lease_ms, self._clock.now_ms())

    def release(self, tenant: str, lease_id: bytes) -> bool:
        """`PageTable.release`, until all pages of the lease are released."""
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
            return self._table.release(tenant, lease_id, now_ms), not self._table.has_due(now_ms)

    def delete(self, space: Space, page_hashes: Sequence[bytes]) -> list[PageStatus]:
        """`PageTable.delete` of all pages."""
        return finish(self.deleting(space, page_hashes))

    def deleting(self, space: Space, page_hashes: Sequence[bytes]) -> Sliced[list[PageStatus]]:
        """`delete` in slices."""
        yield from self.settling()
        statuses: list[PageStatus] = []
        for hashes in in_slices(page_hashes, WORK_PAGES_MAX):
            if statuses:
                yield
            with self._lock:
                statuses += self._table.delete(space, hashes, self._clock.now_ms())
                self._tell()
        return statuses

    def deleted_elsewhere(self, space: Space, page_hashes: Sequence[bytes], age_ms: float) -> None:
        """`PageTable.deleted_elsewhere` of each page, all deleted `age_ms` ago."""
        died_ms = self._clock.now_ms() - age_ms
        for hashes in in_slices(page_hashes, WORK_PAGES_MAX):
            with self._lock:
                for page_hash in hashes:
                    self._table.deleted_elsewhere(space, page_hash, died_ms, self._clock.now_ms())
                self._tell()

    def sweeping(self) -> Sliced[None]:
        """Frees what nobody may hold any more: pages of ended leases, pages beyond quotas, and namespaces that have been empty for
        long.
        """
        with self._lock:
            self._table.forget_empty(self._clock.now_ms())
        yield from self.settling()
        while True:
            with self._lock:
                has_more = self._table.trim()
                self._tell()
            if not has_more:
                return
            yield

    def expire(self) -> None:
        """`sweeping`, for a caller on a thread."""
        finish(self.sweeping())

    def namespaces(self, tenant: str | None = None) -> Sliced[list[SpaceStatistics]]:
        """`PageTable.space_statistics` of the tenant's spaces, or of all spaces."""
        with self._lock:
            spaces = self._table.spaces()
        if tenant is not None:
            spaces = [space for space in spaces if space.tenant == tenant]
        statistics: list[SpaceStatistics] = []
        for part in in_slices(spaces, WORK_PAGES_MAX):
            if statistics:
                yield
            with self._lock:
                statistics += self._table.space_statistics(part)
        return statistics

    def statistics(self) -> PageTableStatistics:
        """`PageTable.statistics`."""
        with self._lock:
            return self._table.statistics()
