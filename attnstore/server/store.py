"""The pure core with its arena, its clock and one lock: what every transport of a node works on.

Owns: `Store`. Invariant: the page table is touched under the lock only, and the lock is never held while a page's bytes move or
a peer is waited for, so that metadata stays quick while pages flow on other threads.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TypeVar

from attnstore.arena import Arena
from attnstore.clock import Clock
from attnstore.copying import Checksums, checksums, copy
from attnstore.core.hashing import page_checksum, range_checksum
from attnstore.core.heat import SegmentHeat
from attnstore.core.layout import PageLayout
from attnstore.core.page_table import ArrivingPage, MatchOutcome, PageTable, PageTableStatistics, PinnedPage
from attnstore.logs import get_logger
from attnstore.types import PageEvent, PageStatus, Space

_log = get_logger(__name__)

T = TypeVar("T")
_PINS_PER_LOCK = 64
"""Metadata calls wait for the page table no longer than this many pins take."""
Publish = Callable[[Iterable[tuple[Space, PageEvent]]], None]


class Store:
    """Page table and arena together, safe from any thread. `publish` gets the page events, on the thread that caused them.

    `heat` counts how often segments are used; without one nothing is counted.
    """

    def __init__(self, table: PageTable, arena: Arena, clock: Clock, publish: Publish, heat: SegmentHeat | None = None) -> None:
        self._table = table
        self._arena = arena
        self._clock = clock
        self._publish = publish
        self._heat = heat or SegmentHeat(0)
        self._lock = threading.Lock()

    @property
    def page_bytes_max(self) -> int:
        """The largest page that fits."""
        return self._arena.extent_bytes

    def now_ms(self) -> float:
        """The clock that leases run by."""
        return self._clock.now_ms()

    def register(self, space: Space, layout: PageLayout) -> int:
        """`PageTable.register`."""
        with self._lock:
            return self._table.register(space, layout)

    def layout_of(self, space: Space) -> PageLayout:
        """`PageTable.layout_of`: also the check that the tenant has registered the namespace."""
        with self._lock:
            return self._table.layout_of(space)

    def limit_tenants(self, quota_bytes: Mapping[str, int]) -> None:
        """`PageTable.limit_tenants`."""
        with self._lock:
            self._table.limit_tenants(quota_bytes)

    def sealed_hashes(self, space: Space) -> list[bytes]:
        """`PageTable.sealed_hashes`."""
        with self._lock:
            return self._table.sealed_hashes(space)

    def match(self, space: Space, prefixes: Sequence[Sequence[bytes]], lease_ms: int) -> MatchOutcome:
        """`PageTable.match`. One that takes a lease is a use of the segments that it finds."""
        with self._lock:
            found = self._table.match(space, prefixes, lease_ms, self._clock.now_ms())
            if found.lease_id is not None:
                self._heat.used(space.tenant, [prefix[:hits] for prefix, hits in zip(prefixes, found.hits, strict=True)])
        return found

    def hot_segments(self) -> frozenset[bytes]:
        """`SegmentHeat.hot`."""
        with self._lock:
            return self._heat.hot(self._clock.now_ms())

    def reading(self, space: Space, page_hash: bytes, lease_id: bytes | None) -> Reading:
        """A sealed page, kept in place for the `with` block; or the status that says why not."""
        return Reading(self, space, page_hash, lease_id)

    def reading_all(self, space: Space, page_hashes: Sequence[bytes], lease_id: bytes | None) -> ReadingAll:
        """`reading` of each of the pages."""
        return ReadingAll(self, space, page_hashes, lease_id)

    def pin(self, space: Space, page_hash: bytes, lease_id: bytes | None) -> PageView | PageStatus:
        """`PageTable.pin`; hand the page to `unpin`."""
        [page] = self.pin_all(space, (page_hash,), lease_id)
        return page

    def pin_all(self, space: Space, page_hashes: Sequence[bytes], lease_id: bytes | None) -> list[PageView | PageStatus]:
        """`PageTable.pin` of each; the table is locked meanwhile. Hand the pages to `unpin`."""
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
        """`PageTable.unpin` of each."""
        with self._lock:
            for view in views:
                self._table.unpin(view.page)

    def locate(
        self, space: Space, page_hashes: Sequence[bytes], lease_id: bytes | None, place: Callable[[PinnedPage], T]
    ) -> list[T | PageStatus]:
        """`place` of each sealed page, called while the page cannot be recycled; or the status that says why not.

        The table is locked meanwhile: ask for few pages at once.
        """
        with self._lock:
            pages = self._table.use(space, page_hashes, lease_id, self._clock.now_ms())
            return [page if isinstance(page, PageStatus) else place(page) for page in pages]

    def prepare(self, space: Space, page_hash: bytes, checksum: int) -> ArrivingPage | PageStatus:
        """`PageTable.prepare`; hand the page to `seal` or `abort`."""
        with self._lock:
            page = self._table.prepare(space, page_hash, checksum, self._clock.now_ms())
            try:
                if isinstance(page, ArrivingPage):
                    # The first look at an extent of a new tenancy wipes it, so it must not happen beside another writer's.
                    self._arena.view(page.slot)
                self._publish(self._table.take_events())
            except BaseException:
                if isinstance(page, ArrivingPage):
                    self._table.abort(page)
                raise
        return page

    def view(self, page: ArrivingPage) -> memoryview:
        """The bytes of a page that is arriving, writable."""
        return self._arena.view(page.slot)

    def seal(self, page: ArrivingPage) -> PageStatus:
        """Ends the arrival of a page whose bytes are all there: STORED, or CHECKSUM_MISMATCH and its slot is free again."""
        return self._end(page, lambda: checksums(self._arena.view(page.slot), page.layer_bytes))

    def fill(self, page: ArrivingPage, source: int) -> PageStatus:
        """Copies a whole page from address `source` on and ends its arrival, as `seal` does."""
        return self._end(page, lambda: copy(self._arena.view(page.slot), source, page.layer_bytes))

    def _end(self, page: ArrivingPage, checksums_of: Callable[[], Checksums]) -> PageStatus:
        try:
            made = checksums_of()
        except BaseException:
            self.abort(page)
            raise
        if made.whole != page.checksum:
            self.abort(page)
            return PageStatus.CHECKSUM_MISMATCH
        with self._lock:
            self._table.complete(page, self._clock.now_ms(), made.layers)
            self._publish(self._table.take_events())
        return PageStatus.STORED

    def abort(self, page: ArrivingPage) -> None:
        """`PageTable.abort`."""
        with self._lock:
            self._table.abort(page)

    def peek(self, space: Space, page_hash: bytes) -> PageView | None:
        """`PageTable.peek`, for `is_intact`."""
        with self._lock:
            page = self._table.peek(space, page_hash)
            return None if page is None else PageView(self._arena.view(page.slot), page)

    def hashed_slice(self, view: PageView, begin: int, end: int) -> tuple[memoryview, int] | PageStatus:
        """`PageView.slice` for a reader that knows no guards: with the `page_checksum` of the bytes. MISSING where they are not
        what was sealed; the page is gone then.

        For a part of a page it is made before its layers are compared with what they were sealed with: bytes that change in
        between, or later, do not have it.
        """
        part, guard = view.slice(begin, end)
        if len(part) == len(view.data):
            return part, guard
        checksum = page_checksum(part)
        if range_checksum(checksums(part, view.page.layer_bytes).layers) != guard:
            self.is_intact(view)
            return PageStatus.MISSING
        return part, checksum

    def is_intact(self, view: PageView, within_ms: float = 0.0) -> bool:
        """Hashes a page where it lies, pinned or not, unless that was done within so many milliseconds: is it what was sealed?

        One that is not is gone from now on, for all who find it or use it in place, so that it can be written anew. False also
        for a page that was evicted meanwhile.
        """
        page = view.page
        if self._clock.now_ms() - page.verified_ms < within_ms:
            return True
        intact = checksums(view.data, page.layer_bytes) == (page.checksum, page.layers)
        with self._lock:
            if self._table.verified(page, self._clock.now_ms(), intact=intact):
                self._arena.withdraw(page.slot)
                _log.error("page was not what was sealed any more, and is gone", extent=page.slot.extent, at=page.slot.offset_bytes)
            self._publish(self._table.take_events())
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
        """`PageTable.release`."""
        with self._lock:
            return self._table.release(tenant, lease_id, self._clock.now_ms())

    def delete(self, space: Space, page_hashes: Iterable[bytes]) -> list[PageStatus]:
        """`PageTable.delete` of each."""
        with self._lock:
            now_ms = self._clock.now_ms()
            statuses = [self._table.delete(space, page_hash, now_ms) for page_hash in page_hashes]
            self._publish(self._table.take_events())
        return statuses

    def expire(self) -> None:
        """`PageTable.expire`: gives the pages of silent lease holders back in time; and `forget_empty`."""
        with self._lock:
            now_ms = self._clock.now_ms()
            self._table.expire(now_ms)
            self._table.forget_empty(now_ms)

    def statistics(self) -> PageTableStatistics:
        """`PageTable.statistics`."""
        with self._lock:
            return self._table.statistics()


class PageView:
    """A pinned page's bytes and the checksums they were sealed with."""

    __slots__ = ("data", "page")

    def __init__(self, data: memoryview, page: PinnedPage) -> None:
        self.data = data
        self.page = page

    def slice(self, begin: int, end: int) -> tuple[memoryview, int]:
        """Bytes `[begin, end)`, whole layers, and what a reader checks them with: see `PinnedPage.guard`."""
        return self.data[begin:end], self.page.guard(begin, end)


class Reading:
    """The `with` block of `Store.reading`: a class, because a generator's costs a page more than the look-up itself."""

    __slots__ = ("_asked", "_found", "_store")

    def __init__(self, store: Store, space: Space, page_hash: bytes, lease_id: bytes | None) -> None:
        self._store = store
        self._asked = (space, page_hash, lease_id)
        self._found: PageView | PageStatus = PageStatus.MISSING

    def __enter__(self) -> PageView | PageStatus:
        self._found = self._store.pin(*self._asked)
        return self._found

    def __exit__(self, *_: object) -> None:
        if isinstance(self._found, PageView):
            self._store.unpin(self._found)


class ReadingAll:
    """The `with` block of `Store.reading_all`."""

    __slots__ = ("_asked", "_pinned", "_store")

    def __init__(self, store: Store, space: Space, page_hashes: Sequence[bytes], lease_id: bytes | None) -> None:
        self._store = store
        self._asked = (space, page_hashes, lease_id)
        self._pinned: list[PageView] = []

    def __enter__(self) -> list[PageView | PageStatus]:
        space, page_hashes, lease_id = self._asked
        found: list[PageView | PageStatus] = []
        try:
            for at in range(0, len(page_hashes), _PINS_PER_LOCK):
                pages = self._store.pin_all(space, page_hashes[at : at + _PINS_PER_LOCK], lease_id)
                self._pinned += [page for page in pages if isinstance(page, PageView)]
                found += pages
        except BaseException:
            self.__exit__()
            raise
        return found

    def __exit__(self, *_: object) -> None:
        for at in range(0, len(self._pinned), _PINS_PER_LOCK):
            self._store.unpin(*self._pinned[at : at + _PINS_PER_LOCK])
