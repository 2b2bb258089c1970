"""The page table of a store node: which pages it holds, who pins them, and which are evicted when space is needed.

Owns: every page of the node for its whole life (`attnstore.core.page` has the state table), and the composition of the parts: slots
(where a page lies), residency (which extents are idle), leases and pins (who holds a page), room (eviction), events
(notifications), tombstones (deleted pages that must not return).
Invariants, asserted by `check` together with those of the parts: free, arriving, sealed and corrupt slots add up to all slots; the
capacity is never exceeded; a page is evictable exactly while it is sealed and unpinned.

No command evicts more than `WORK_PAGES_MAX` pages or releases more than `MATCH_PAGES_MAX`. A command that needs more reports that
it is not done and is called again, so that other callers get turns in between.

Pure: no I/O, no clock, no framework. Time is passed as `now_ms`, lease ids come from `new_lease_id`, and effects are returned as
values and events, so that a simulation repeats exactly from its seed. Not thread-safe: one owner calls it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Literal

from attnstore.core.events import EventLog
from attnstore.core.eviction import EvictionPolicy, LeastRecentlyUsed
from attnstore.core.lease import LeaseTable
from attnstore.core.namespaces import Namespaces
from attnstore.core.page import ArrivingPage, MatchOutcome, NamespaceRecord, Page, PageState, PageStep, PinnedPage
from attnstore.core.pins import Pins
from attnstore.core.quota import Quotas
from attnstore.core.residency import Residency
from attnstore.core.room import Room, RoomMaker
from attnstore.core.slots import SlotPool
from attnstore.core.statistics import PageTableStatistics
from attnstore.core.tombstones import Tombstones
from attnstore.limits import HASH_BYTES, LEASE_MS_MAX, PAGE_AGE_MS_MAX
from attnstore.types import PageEvent, PageEventKind, PageStatus, Space

__all__ = ["ArrivingPage", "MatchOutcome", "PageTable", "PinnedPage", "Room"]


class PageTable:
    """See the module. Methods that take a space raise `NamespaceUnknown` if the space is not registered.

    `namespaces` registers spaces, `pins` renews and ends leases, and `quotas` limits tenants.

    The constructor raises `InvalidArgument` if capacity and extent size give no extent. The limits are shared among `tenants`
    tenants. `new_lease_id` must return 16 bytes that are unique and unpredictable, because anyone who knows a lease id can renew
    and release the lease.
    """

    def __init__(
        self,
        *,
        capacity_bytes: int,
        extent_bytes: int,
        policy: Callable[[], EvictionPolicy[Page]] = LeastRecentlyUsed,
        new_lease_id: Callable[[], bytes],
        tenants: int = 1,
    ) -> None:
        self._slots = SlotPool(capacity_bytes, extent_bytes)
        self._residency = Residency(self._slots.extents, tenants)
        self._leases = LeaseTable(new_lease_id, tenants)
        self._events = EventLog()
        self.quotas = Quotas()
        self._tombstones = Tombstones()
        self.pins = Pins(self._residency, self._leases, self._free_corrupt)
        self._room = RoomMaker(self._slots, self._residency, self.quotas, self.pins, policy, self._evict)
        self.namespaces = Namespaces(self._slots, self._room, tenants)
        self._used_bytes = 0
        self._sealed = 0
        self._arriving = 0
        self._hit = 0
        self._missed = 0
        self._stored = 0
        self._stored_bytes = 0
        self._verified = 0
        self._corrupt = 0

    @property
    def extents(self) -> int:
        """The number of extents of the arena."""
        return self._slots.extents

    def pages_in(self, extent: int) -> list[Page]:
        """Returns the records of all pages of an extent, including arriving ones, in order of arrival."""
        return list(self._residency.pages_of(extent))

    def match(
        self,
        space: Space,
        prefixes: Sequence[Sequence[bytes]],
        lease_ms: int,
        now_ms: float,
        lease_id: bytes | None = None,
    ) -> MatchOutcome:
        """Counts the leading sealed pages of each prefix and, with `lease_ms > 0`, takes one lease over all of them.

        If `lease_id` is given, the pages are added to that lease, which must have been granted for the beginning of the same
        prefixes.

        A lease is granted for at most `LEASE_MS_MAX`. The pages count as used, the first page of a prefix most recently, so that a
        chain is evicted from its tail. O(1) per hash, independent of the size of the table.
        Raises `Overloaded` if the lease would exceed the tenant's share; nothing has changed then.
        """
        record = self.namespaces.find(space)
        hits, found = record.leading(prefixes)
        granted_ms = 0
        if found and lease_ms > 0:
            granted_ms = min(lease_ms, LEASE_MS_MAX)
            lease_id = self.pins.lease(record, found, granted_ms, now_ms, lease_id)
        else:
            self.pins.touch(record, found[::-1])
        self._count(prefixes, found)
        return MatchOutcome(hits, lease_id, granted_ms)

    def find(self, space: Space, prefixes: Sequence[Sequence[bytes]]) -> tuple[tuple[int, ...], list[Page]]:
        """Counts as `match` does, without a lease and without a use. Returns the counts, and the pages for `Pins.touch`."""
        hits, found = self.namespaces.find(space).leading(prefixes)
        self._count(prefixes, found)
        return hits, found

    def _count(self, prefixes: Sequence[Sequence[bytes]], found: Sequence[Page]) -> None:
        self._hit += len(found)
        self._missed += sum(map(len, prefixes)) - len(found)

    def missed(self, pages: int) -> None:
        """Counts the hashes of a prefix that `match` was not asked for, because an earlier one was missing."""
        self._missed += pages

    def pin(self, space: Space, page_hash: bytes, lease_id: bytes | None, now_ms: float) -> PinnedPage | PageStatus:
        """Keeps a sealed page in place for a running read. Returns MISSING, or LEASE_EXPIRED if a lease is named, on failure.

        A lease of another space counts as expired. The lease need not cover the page. Raises `Overloaded` if the tenant already
        keeps its share of the memory in place.
        """
        record = self.namespaces.find(space)
        page = record.sealed.get(page_hash)
        status = PageStatus.OK if page is not None else PageStatus.MISSING
        if lease_id is not None:
            lease = self._leases.find(lease_id, now_ms)
            if lease is None or lease.namespace is not record:
                status = PageStatus.LEASE_EXPIRED
        if page is None or status is not PageStatus.OK:
            return status
        if not page.extent.busy and not self.pins.may_busy(space.tenant, now_ms):
            self._residency.require_room(space.tenant, (page,))
        page.readers += 1
        self.pins.hold(record, (page,))
        return PinnedPage(page)

    def use(
        self, space: Space, page_hashes: Sequence[bytes], lease_id: bytes | None, now_ms: float
    ) -> list[PinnedPage | PageStatus]:
        """Returns what `pin` returns for each hash, in order, without keeping a pin: the caller must finish with the pages before
        the next command.
        """
        record = self.namespaces.find(space)
        if lease_id is not None:
            lease = self._leases.find(lease_id, now_ms)
            if lease is None or lease.namespace is not record:
                return [PageStatus.LEASE_EXPIRED] * len(page_hashes)
        pages = [record.sealed.get(page_hash) for page_hash in page_hashes]
        found = [page for page in pages if page is not None]
        self.pins.touch(record, found)
        return [PageStatus.MISSING if page is None else PinnedPage(page) for page in pages]

    def unpin(self, page: PinnedPage) -> None:
        """Ends a `pin`. The page counts as used at this moment."""
        record = page.record
        assert record.readers > 0, "the page is unpinned more often than it was pinned"
        record.readers -= 1
        self.pins.let_go(record.namespace, (record,))

    def prepare(
        self, space: Space, page_hash: bytes, checksum: int, now_ms: float, age_ms: int = 0
    ) -> ArrivingPage | PageStatus | Literal[Room.MAKING]:
        """Allocates a slot for a page that a writer announces, or returns ALREADY_PRESENT, ARRIVING or NO_SPACE.

        May evict up to `WORK_PAGES_MAX` unpinned pages. `Room.MAKING` means that those were not enough and that the caller must ask
        again. The page stays invisible until `complete`.

        `age_ms > 0` means that another node hands the page over, `age_ms` after a client wrote it. Nothing is evicted for such a
        page, because the pages that clients use here are worth as much. Returns DELETED if the page was deleted here and is not
        known to have been written later.
        """
        assert len(page_hash) == HASH_BYTES, f"a hash has {HASH_BYTES} bytes"
        record = self.namespaces.find(space)
        present = record.sealed.get(page_hash)
        if present is not None:
            self.pins.touch(record, (present,))
            return PageStatus.ALREADY_PRESENT
        if page_hash in record.arriving:
            return PageStatus.ARRIVING
        if age_ms and self._tombstones.cover(space, page_hash, now_ms - age_ms, now_ms):
            return PageStatus.DELETED
        slot = self._room.free_slot(record) if age_ms else self._room.slot_for(record, now_ms)
        if slot is Room.MAKING:
            return Room.MAKING
        if slot is Room.NONE:
            return PageStatus.NO_SPACE
        page = Page(record, page_hash, checksum, slot, self._residency.extent_of(slot))
        if age_ms:
            page.written_ms = now_ms - min(age_ms, PAGE_AGE_MS_MAX)
            page.is_handed_over = True
        page.advance(PageStep.PREPARE)
        if not (record.sealed or record.arriving):
            self.namespaces.filled(record)
        record.arriving[page_hash] = page
        self._residency.arrived(page)
        self._arriving += 1
        self._used_bytes += slot.size_bytes
        self.quotas.took(record.space.tenant, slot.size_bytes)
        return ArrivingPage(page)

    def complete(self, page: ArrivingPage, now_ms: float, layers: bytes = b"") -> PageStatus:
        """Seals a page whose bytes have all arrived and have the announced checksum: lookups find it from now on. Returns STORED.

        `layers` are the `layer_checksums` of those bytes; without them no single layer of the page can be checked.

        A handed-over page that was deleted while it was in transit is aborted: DELETED. A page written by a client is new, even if
        a page with that hash was deleted before.
        """
        record, arrived = page.record.namespace, page.record
        if not arrived.is_handed_over:
            self._tombstones.remove(record.space, arrived.hash)
            arrived.written_ms = now_ms
        elif self._tombstones.cover(record.space, arrived.hash, arrived.written_ms, now_ms):
            self.abort(page)
            return PageStatus.DELETED
        arrived.advance(PageStep.COMPLETE)
        arrived.layers = layers
        del record.arriving[arrived.hash]
        record.sealed[arrived.hash] = arrived
        self._arriving -= 1
        self._sealed += 1
        self._stored += 1
        arrived.number = self._stored
        self._stored_bytes += arrived.slot.size_bytes
        self._residency.settled((arrived,))
        record.policy.admitted(arrived)
        self._events.append(record.space, PageEventKind.SEALED, arrived.hash)
        return PageStatus.STORED

    def abort(self, page: ArrivingPage) -> None:
        """Frees the slot of a page that will not complete, because its writer failed, disconnected or was too slow."""
        abandoned = page.record
        abandoned.advance(PageStep.ABORT)
        del abandoned.namespace.arriving[abandoned.hash]
        self._arriving -= 1
        self._residency.abandoned(abandoned)
        self.namespaces.lost_page(abandoned.namespace)
        self._free(abandoned)

    def holds(self, space: Space, lease_id: bytes, now_ms: float) -> bool:
        """Returns whether the lease is alive and belongs to this space."""
        lease = self._leases.find(lease_id, now_ms)
        return lease is not None and lease.namespace is self.namespaces.find(space)

    def delete(self, space: Space, page_hashes: Sequence[bytes], now_ms: float) -> list[PageStatus]:
        """Removes sealed pages. Returns for each page OK, MISSING, or PINNED if a lease or a reader holds it.

        An expired lease holds its pages until `expire` has released them. For `TOMBSTONE_MS_MAX`, other nodes cannot hand over
        (`prepare`) the pages that were not PINNED.
        """
        self.pins.settle(now_ms)
        record = self.namespaces.find(space)
        return [self._delete(record, page_hash, now_ms) for page_hash in page_hashes]

    def _delete(self, record: NamespaceRecord, page_hash: bytes, now_ms: float) -> PageStatus:
        page = record.sealed.get(page_hash)
        if page is not None and page.pins:
            return PageStatus.PINNED
        self._tombstones.add(record.space, page_hash, now_ms, now_ms)
        if page is None:
            return PageStatus.MISSING
        self._drop(page, PageStep.DELETE, PageEventKind.DELETED)
        return PageStatus.OK

    def deleted_elsewhere(self, space: Space, page_hash: bytes, deleted_ms: float, now_ms: float) -> None:
        """Records that another node deleted the page at `deleted_ms`. Removes it unless it was written later or is pinned."""
        page = self.namespaces.sealed_in(space).get(page_hash)
        if page is not None and page.written_ms >= deleted_ms:
            return
        self._tombstones.add(space, page_hash, deleted_ms, now_ms)
        if page is not None and not page.pins:
            self._drop(page, PageStep.DELETE, PageEventKind.DELETED)

    def peek(self, space: Space, page_hash: bytes) -> PinnedPage | None:
        """Returns a sealed page for `verified` without pinning or using it: its slot may be given to another page at any time."""
        page = self.namespaces.find(space).sealed.get(page_hash)
        return None if page is None else PinnedPage(page)

    def verified(self, page: PinnedPage, now_ms: float, *, intact: bool) -> bool:
        """Records the result of hashing a page again, pinned or not. Returns True if the page was condemned.

        A page that is not intact is no longer found, and its slot is freed with its last pin. Nothing happens to a page that is
        already gone, because its slot may have held another page meanwhile.
        """
        record = page.record
        self._verified += 1
        if record.state is not PageState.SEALED:
            return False
        if intact:
            record.verified_ms = now_ms
            return False
        self._corrupt += 1
        self._vanish(record, PageStep.CONDEMN, PageEventKind.EVICTED)
        record.namespace.corrupt.add(record)
        if not record.pins:
            self._free_corrupt(record)
        return True

    def trim(self) -> bool:
        """Evicts up to `WORK_PAGES_MAX` pages of tenants that exceed their quotas. Returns True if there is more to evict."""
        return self._room.trim()

    def take_events(self) -> list[tuple[Space, PageEvent]]:
        """Returns `(space, event)` for each page sealed, evicted or deleted since the last call, in order."""
        return self._events.take()

    def statistics(self) -> PageTableStatistics:
        """Returns a snapshot. O(1)."""
        return PageTableStatistics(
            capacity_bytes=self._slots.capacity_bytes,
            used_bytes=self._used_bytes,
            pages_sealed=self._sealed,
            pages_arriving=self._arriving,
            pages_pinned=self.pins.pages,
            leases=len(self._leases),
            hit_pages=self._hit,
            missed_pages=self._missed,
            stored_pages=self._stored,
            evicted_pages=self._room.evicted_pages,
            verified_pages=self._verified,
            corrupt_pages=self._corrupt,
            stored_bytes=self._stored_bytes,
        )

    def check(self) -> None:
        """Asserts the module's invariants. O(pages); for tests and simulations."""
        arriving = [page for record in self.namespaces for page in record.arriving.values()]
        sealed = [page for record in self.namespaces for page in record.sealed.values()]
        corrupt = [page for record in self.namespaces for page in record.corrupt]
        pages = arriving + sealed + corrupt
        self._slots.check([page.slot for page in pages])
        self._residency.check()
        self.namespaces.check()
        self._tombstones.check()
        assert {page.state for page in arriving} <= {PageState.ARRIVING}
        assert {page.state for page in sealed} <= {PageState.SEALED}
        assert {page.state for page in corrupt} <= {PageState.CORRUPT}
        assert (self._arriving, self._sealed) == (len(arriving), len(sealed))
        assert self._used_bytes == sum(page.slot.size_bytes for page in pages) <= self._slots.capacity_bytes
        of_tenant: Counter[str] = Counter()
        for page in pages:
            of_tenant[page.namespace.space.tenant] += page.slot.size_bytes
        self.quotas.check(of_tenant)
        self.pins.check(sealed, corrupt)
        self._room.check(len(sealed) + len(corrupt) - self.pins.pages)

    def _evict(self, page: Page) -> None:
        self._drop(page, PageStep.EVICT, PageEventKind.EVICTED)

    def _drop(self, page: Page, step: PageStep, kind: PageEventKind) -> None:
        """Ends the life of a sealed, unpinned page."""
        assert not page.pins, "a pinned page is neither evicted nor deleted"
        self._vanish(page, step, kind)
        self._leave(page)

    def _vanish(self, page: Page, step: PageStep, kind: PageEventKind) -> None:
        """Makes a sealed page unfindable."""
        page.advance(step)
        record = page.namespace
        del record.sealed[page.hash]
        self._sealed -= 1
        self._events.append(record.space, kind, page.hash)

    def _free_corrupt(self, page: Page) -> None:
        """Ends the life of a corrupt, unpinned page."""
        page.namespace.corrupt.remove(page)
        page.advance(PageStep.FREE)
        self._leave(page)

    def _leave(self, page: Page) -> None:
        """Frees the slot of an unpinned page."""
        page.namespace.policy.removed(page)
        self._residency.left(page)
        self._free(page)
        self.namespaces.lost_page(page.namespace)

    def _free(self, page: Page) -> None:
        self._used_bytes -= page.slot.size_bytes
        self.quotas.gave_back(page.namespace.space.tenant, page.slot.size_bytes)
        self._slots.give_back(page.slot)
