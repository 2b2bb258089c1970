"""The page table with its arena, its clock and one lock: the object that every transport of a node works on.

Owns: `Store`: reading, writing and verifying pages here, look-ups and leases in `Store.leases`, namespaces and the removal of pages
in `Store.spaces`. Invariants: the page table is accessed only under the lock. The lock is never held while the bytes of a page move
or while waiting for a peer, so that metadata stays fast while other threads move pages. Under one hold of the lock, at most
`WORK_PAGES_MAX` pages are changed and `MATCH_PAGES_MAX` are matched.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Literal, TypeVar

from attnstore.arena import Arena
from attnstore.clock import Clock
from attnstore.copying import Checksums, checksums, copy
from attnstore.core.hashing import page_checksum, range_checksum
from attnstore.core.heat import SegmentHeat
from attnstore.core.layout import PageLayout
from attnstore.core.page_table import ArrivingPage, PageTable, PinnedPage, Room
from attnstore.core.statistics import PageTableStatistics
from attnstore.logs import get_logger
from attnstore.server.pinned_views import Arrival, PageView, ReadingAll
from attnstore.server.slices import TURN_S
from attnstore.server.store_leases import StoreLeases
from attnstore.server.store_spaces import StoreSpaces
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
        self._publish = publish
        self._lock = threading.Lock()
        self.leases = StoreLeases(table, clock, self._lock, heat or SegmentHeat(0))
        self.spaces = StoreSpaces(table, clock, self._lock, self.leases, self._tell)

    @property
    def page_bytes_max(self) -> int:
        """The size of the largest page that fits."""
        return self._arena.extent_bytes

    def now_ms(self) -> float:
        """Returns the time of the clock that leases use."""
        return self._clock.now_ms()

    def layout_of(self, space: Space) -> PageLayout:
        """`Namespaces.find`. Also checks that the tenant has registered the namespace."""
        with self._lock:
            return self._table.namespaces.find(space).layout

    @property
    def stored_pages(self) -> int:
        """The number of pages sealed since the start."""
        with self._lock:
            return self._table.statistics().stored_pages

    def reading_all(self, space: Space, page_hashes: Sequence[bytes], lease_id: bytes | None) -> ReadingAll:
        """Keeps sealed pages in place for the `with` block. Yields for each page its view, or the status that says why not."""
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

    def statistics(self) -> PageTableStatistics:
        """`PageTable.statistics`."""
        with self._lock:
            return self._table.statistics()
