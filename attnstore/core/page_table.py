"""The page table of a store node: which pages are here, who holds them, and which go when there is no room.

Owns: every page of the node, through its whole life (`attnstore.core.page` draws it as a table), and the composition of the
parts: slots (where), residency (which extents are idle), leases and pins (who holds), room (what goes first), events (who is told),
tombstones (what does not come back).
Invariants, asserted by `check` with those of the parts: free + arriving + sealed + corrupt slots are all the slots; the capacity is
never passed; a page is evictable exactly while it is sealed and unpinned.

No command evicts more than `WORK_PAGES_MAX` pages, or lets more than `MATCH_PAGES_MAX` go: what takes more says that it is not
done, and is asked again, so that whoever shares the table gets turns between.

Pure: no I/O, no clock, no framework. Time comes in as `now_ms`, identifiers through `new_lease_id`, effects go out as return
values and events, so that a simulation from a seed repeats exactly. Not thread-safe: one owner calls it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from attnstore.core.events import EventLog
from attnstore.core.eviction import EvictionPolicy, LeastRecentlyUsed
from attnstore.core.layout import PageLayout
from attnstore.core.lease import LeaseTable
from attnstore.core.namespaces import Namespaces
from attnstore.core.page import ArrivingPage, NamespaceRecord, Page, PageState, PageStep, PinnedPage
from attnstore.core.pins import Pins
from attnstore.core.quota import Quotas
from attnstore.core.residency import Residency
from attnstore.core.room import Room, RoomMaker
from attnstore.core.slots import SlotPool
from attnstore.core.statistics import NamespaceStatistics, PageTableStatistics
from attnstore.core.tombstones import Tombstones
from attnstore.limits import HASH_BYTES, LEASE_MS_MAX, PAGE_AGE_MS_MAX, TOMBSTONE_MARGIN_MS
from attnstore.types import PageEvent, PageEventKind, PageStatus, Space

__all__ = ["ArrivingPage", "MatchOutcome", "PageTable", "PinnedPage", "Room"]


@dataclass(frozen=True, slots=True)
class MatchOutcome:
    """`hits[i]`: leading sealed pages of prefix i. `lease_id` is None, and `lease_ms` 0, where no lease was asked for or
    nothing hit.
    """

    hits: tuple[int, ...]
    lease_id: bytes | None
    lease_ms: int


class PageTable:
    """See the module. Methods that take a space raise `NamespaceUnknown` where it was not registered.

    Raises `InvalidArgument` for a capacity or extent size that makes no extent. What its limits allow is shared among `tenants`
    tenants. `new_lease_id` returns 16 bytes, never twice the same and not to be guessed, because whoever knows a lease id may renew
    and release it.
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
        self._namespaces = Namespaces(tenants)
        self._leases = LeaseTable(new_lease_id, tenants)
        self._events = EventLog()
        self._quotas = Quotas()
        self._tombstones = Tombstones()
        self._pins = Pins(self._residency, self._leases, self._bury)
        self._room = RoomMaker(self._slots, self._residency, self._quotas, self._pins, policy, self._evict)
        self._used_bytes = 0
        self._sealed = 0
        self._arriving = 0
        self._hit = 0
        self._missed = 0
        self._stored = 0
        self._stored_bytes = 0
        self._verified = 0
        self._corrupt = 0

    def register(self, space: Space, layout: PageLayout) -> int:
        """Makes a tenant's namespace known, idempotently, and returns how many of its pages the whole arena could hold.

        Raises `LayoutMismatch`, `InvalidArgument` (the page is larger than an extent) or `Overloaded` (the tenant has its share of
        namespaces, and all have pages).
        """
        record = self._namespaces.known(space, layout)
        if record is None:
            while (spare := self._namespaces.spare(space.tenant)) is not None:
                self._forget(spare)
            slot_class = self._slots.slot_class(space.tenant, layout.page_bytes)
            record = NamespaceRecord(space, layout, slot_class, self._room.policy_of(slot_class))
            self._namespaces.add(record)
        return self._slots.extents * record.slot_class.slots_per_extent

    def limit_tenants(self, quota_bytes: Mapping[str, int]) -> None:
        """Bytes that tenants' pages may take here; who is not named may take all there is. See `Quotas.limit`."""
        self._quotas.limit(quota_bytes)

    def layout_of(self, space: Space) -> PageLayout:
        """The layout of a space."""
        return self._namespaces.find(space).layout

    @property
    def extents(self) -> int:
        """How many there are."""
        return self._slots.extents

    @property
    def stored_pages(self) -> int:
        """How many pages were sealed since the start."""
        return self._stored

    @property
    def leased_pages(self) -> int:
        """How many pages were leased since the start, one counted once for each lease."""
        return self._leases.leased_pages

    def pages_in(self, extent: int) -> list[Page]:
        """The records of all pages of an extent, arriving ones too, in the order in which they came."""
        return list(self._residency.pages_of(extent))

    def match(
        self,
        space: Space,
        prefixes: Sequence[Sequence[bytes]],
        lease_ms: int,
        now_ms: float,
        lease_id: bytes | None = None,
    ) -> MatchOutcome:
        """How many leading hashes of each prefix are sealed, and with `lease_ms > 0` one lease over all of those pages.

        The pages go into the lease `lease_id` where one is named, which was granted for the beginning of the same prefixes.

        A lease longer than `LEASE_MS_MAX` is granted that. The pages count as used, the first of a prefix as the most recent,
        so that a chain loses its tail before its head. O(1) for each hash, whatever the size of the table.
        Raises `Overloaded` where a lease is asked for that would pass the tenant's share; nothing has changed then.
        """
        record = self._namespaces.find(space)
        found: list[Page] = []
        hits = []
        asked = 0
        lookup = record.sealed.get
        for prefix in prefixes:
            asked += len(prefix)
            before = len(found)
            for page_hash in prefix:
                page = lookup(page_hash)
                if page is None:
                    break
                found.append(page)
            hits.append(len(found) - before)
        granted_ms = 0
        if found and lease_ms > 0:
            granted_ms = min(lease_ms, LEASE_MS_MAX)
            lease_id = self._pins.lease(record, found, granted_ms, now_ms, lease_id)
        else:
            self._pins.touch(record, found[::-1])
        self._hit += len(found)
        self._missed += asked - len(found)
        return MatchOutcome(tuple(hits), lease_id, granted_ms)

    def missed(self, pages: int) -> None:
        """Counts pages of a `match` behind the first of their prefix that was not found."""
        self._missed += pages

    def pin(self, space: Space, page_hash: bytes, lease_id: bytes | None, now_ms: float) -> PinnedPage | PageStatus:
        """Keeps a sealed page in place for a running read, or says MISSING or, where a lease is named, LEASE_EXPIRED.

        A lease of another space counts as expired. The page need not be one that the lease covers. Raises `Overloaded` where the
        tenant keeps its share of the memory in place already.
        """
        record = self._namespaces.find(space)
        page = record.sealed.get(page_hash)
        status = PageStatus.OK if page is not None else PageStatus.MISSING
        if lease_id is not None:
            lease = self._leases.find(lease_id, now_ms)
            if lease is None or lease.namespace is not record:
                status = PageStatus.LEASE_EXPIRED
        if page is None or status is not PageStatus.OK:
            return status
        if not page.extent.busy and not self._pins.may_busy(space.tenant, now_ms):
            self._residency.require_room(space.tenant, (page,))
        page.readers += 1
        self._pins.hold(record, (page,))
        return PinnedPage(page)

    def use(
        self, space: Space, page_hashes: Sequence[bytes], lease_id: bytes | None, now_ms: float
    ) -> list[PinnedPage | PageStatus]:
        """`pin` and `unpin` of each, in order, for a caller that is done with the pages before the table is used again."""
        record = self._namespaces.find(space)
        if lease_id is not None:
            lease = self._leases.find(lease_id, now_ms)
            if lease is None or lease.namespace is not record:
                return [PageStatus.LEASE_EXPIRED] * len(page_hashes)
        pages = [record.sealed.get(page_hash) for page_hash in page_hashes]
        found = [page for page in pages if page is not None]
        self._pins.touch(record, found)
        return [PageStatus.MISSING if page is None else PinnedPage(page) for page in pages]

    def unpin(self, page: PinnedPage) -> None:
        """Ends a `pin`. The page counts as used until now."""
        record = page.record
        assert record.readers > 0, "the page is unpinned more often than it was pinned"
        record.readers -= 1
        self._pins.let_go(record.namespace, (record,))

    def prepare(
        self, space: Space, page_hash: bytes, checksum: int, now_ms: float, age_ms: int = 0
    ) -> ArrivingPage | PageStatus | Literal[Room.MAKING]:
        """A slot for a page that a writer announces, or ALREADY_PRESENT, ARRIVING or NO_SPACE.

        May evict unpinned pages, at most `WORK_PAGES_MAX`: `Room.MAKING` says to ask again, because those were not enough. The page
        stays invisible until `complete`.

        With `age_ms` another node hands the page over, so long after a client has written it. Then nothing is evicted: what clients
        use here is worth as much. DELETED where the page was deleted here and is not known to have been written later.
        """
        assert len(page_hash) == HASH_BYTES, f"a hash has {HASH_BYTES} bytes"
        record = self._namespaces.find(space)
        present = record.sealed.get(page_hash)
        if present is not None:
            self._pins.touch(record, (present,))
            return PageStatus.ALREADY_PRESENT
        if page_hash in record.arriving:
            return PageStatus.ARRIVING
        if age_ms and self._is_deleted(space, page_hash, now_ms - age_ms, now_ms):
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
            self._namespaces.filled(record)
        record.arriving[page_hash] = page
        self._residency.arrived(page)
        self._arriving += 1
        self._used_bytes += slot.size_bytes
        self._quotas.took(record.space.tenant, slot.size_bytes)
        return ArrivingPage(page)

    def complete(self, page: ArrivingPage, now_ms: float, layers: bytes = b"") -> PageStatus:
        """Seals a page whose bytes are all there and have the announced checksum: from now on it is found. STORED.

        `layers` are the `layer_checksums` of the bytes that had it, without which no layer of the page can be checked.

        A page that is handed over and was deleted on its way is aborted: DELETED. One that a client writes is new, though one of
        that hash was deleted before.
        """
        record, arrived = page.record.namespace, page.record
        if not arrived.is_handed_over:
            self._tombstones.lift(record.space, arrived.hash)
            arrived.written_ms = now_ms
        elif self._is_deleted(record.space, arrived.hash, arrived.written_ms, now_ms):
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
        """Takes the slot of a page back that will not be complete: its writer failed, vanished or was too slow."""
        abandoned = page.record
        abandoned.advance(PageStep.ABORT)
        del abandoned.namespace.arriving[abandoned.hash]
        self._arriving -= 1
        self._residency.abandoned(abandoned)
        self._namespaces.lost_page(abandoned.namespace)
        self._free(abandoned)

    def holds(self, space: Space, lease_id: bytes, now_ms: float) -> bool:
        """The lease is alive and of this space."""
        lease = self._leases.find(lease_id, now_ms)
        return lease is not None and lease.namespace is self._namespaces.find(space)

    def renew(self, tenant: str, lease_id: bytes, lease_ms: int, now_ms: float) -> int:
        """Extends a tenant's lease to at least `lease_ms` (at most `LEASE_MS_MAX`) from now; returns the milliseconds it has now.

        Raises `LeaseExpired`.
        """
        return self._leases.renew(tenant, lease_id, lease_ms, now_ms)

    def release(self, tenant: str, lease_id: bytes, now_ms: float) -> bool:
        """Ends a tenant's lease; False where it had expired or never existed. Lets pages go, its own or as `expire` does."""
        return self._pins.release(tenant, lease_id, now_ms)

    def delete(self, space: Space, page_hashes: Sequence[bytes], now_ms: float) -> list[PageStatus]:
        """Removes sealed pages: of each OK, MISSING, or PINNED where a lease or a reader holds it.

        A lease that has ended holds its pages until `expire` has let them go. Those that are not PINNED cannot be handed over by
        other nodes from now on (`prepare`), for `TOMBSTONE_MS_MAX`.
        """
        self._pins.settle(now_ms)
        record = self._namespaces.find(space)
        return [self._delete(record, page_hash, now_ms) for page_hash in page_hashes]

    def _delete(self, record: NamespaceRecord, page_hash: bytes, now_ms: float) -> PageStatus:
        page = record.sealed.get(page_hash)
        if page is not None and page.pins:
            return PageStatus.PINNED
        self._tombstones.bury(record.space, page_hash, now_ms, now_ms)
        if page is None:
            return PageStatus.MISSING
        self._drop(page, PageStep.DELETE, PageEventKind.DELETED)
        return PageStatus.OK

    def deleted_elsewhere(self, space: Space, page_hash: bytes, died_ms: float, now_ms: float) -> None:
        """Takes note that the page was deleted elsewhere at `died_ms`, and removes it unless it was written later or is pinned."""
        page = self._namespaces.sealed_in(space).get(page_hash)
        if page is not None and page.written_ms >= died_ms:
            return
        self._tombstones.bury(space, page_hash, died_ms, now_ms)
        if page is not None and not page.pins:
            self._drop(page, PageStep.DELETE, PageEventKind.DELETED)

    def peek(self, space: Space, page_hash: bytes) -> PinnedPage | None:
        """A sealed page, for `verified`: neither pinned, so that its slot may be another page's any time, nor used."""
        page = self._namespaces.find(space).sealed.get(page_hash)
        return None if page is None else PinnedPage(page)

    def verified(self, page: PinnedPage, now_ms: float, *, intact: bool) -> bool:
        """A page was hashed again, pinned or not. One that is not intact is gone from now on, and its slot with its last pin: True.

        Nothing happens to a page that is gone already: its slot may have had another's bytes meanwhile.
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
            self._bury(record)
        return True

    def has_due(self, now_ms: float) -> bool:
        """Whether `expire` is worth a call: False where it would find nothing to let go."""
        return self._pins.has_due(now_ms)

    def expire(self, now_ms: float) -> float | None:
        """Ends the leases that have expired and lets the pages of ended ones go: see `Pins.expire`."""
        return self._pins.expire(now_ms)

    def trim(self) -> bool:
        """Evicts pages of tenants that are over their quotas, at most `WORK_PAGES_MAX`. True: there is more to evict."""
        return self._room.trim()

    def forget_empty(self, now_ms: float) -> None:
        """Forgets namespaces that have had no page for `NAMESPACE_EMPTY_MS_MAX`. O(namespaces without pages)."""
        for record in self._namespaces.long_empty(now_ms):
            self._forget(record)

    def take_events(self) -> list[tuple[Space, PageEvent]]:
        """`(space, event)` for each page sealed, evicted or deleted since the last call, in order."""
        return self._events.take()

    def statistics(self) -> PageTableStatistics:
        """A snapshot. O(1)."""
        return PageTableStatistics(
            capacity_bytes=self._slots.capacity_bytes,
            used_bytes=self._used_bytes,
            pages_sealed=self._sealed,
            pages_arriving=self._arriving,
            pages_pinned=self._pins.pages,
            leases=len(self._leases),
            hit_pages=self._hit,
            missed_pages=self._missed,
            stored_pages=self._stored,
            evicted_pages=self._room.evicted_pages,
            verified_pages=self._verified,
            corrupt_pages=self._corrupt,
            stored_bytes=self._stored_bytes,
        )

    def spaces(self) -> list[Space]:
        """All that are known."""
        return [record.space for record in self._namespaces]

    def space_statistics(self, spaces: Sequence[Space]) -> list[NamespaceStatistics]:
        """A snapshot of each that is known, in order."""
        records = [record for space in spaces if (record := self._namespaces.get(space)) is not None]
        return [NamespaceStatistics(record.space, record.layout, len(record.sealed), len(record.arriving)) for record in records]

    def check(self) -> None:
        """Asserts the module's invariants. O(pages); for tests and simulations."""
        arriving = [page for record in self._namespaces for page in record.arriving.values()]
        sealed = [page for record in self._namespaces for page in record.sealed.values()]
        corrupt = [page for record in self._namespaces for page in record.corrupt]
        pages = arriving + sealed + corrupt
        self._slots.check([page.slot for page in pages])
        self._residency.check()
        self._namespaces.check()
        self._tombstones.check()
        assert {page.state for page in arriving} <= {PageState.ARRIVING}
        assert {page.state for page in sealed} <= {PageState.SEALED}
        assert {page.state for page in corrupt} <= {PageState.CORRUPT}
        assert (self._arriving, self._sealed) == (len(arriving), len(sealed))
        assert self._used_bytes == sum(page.slot.size_bytes for page in pages) <= self._slots.capacity_bytes
        of_tenant: Counter[str] = Counter()
        for page in pages:
            of_tenant[page.namespace.space.tenant] += page.slot.size_bytes
        self._quotas.check(of_tenant)
        self._pins.check(sealed, corrupt)
        self._room.check(len(sealed) + len(corrupt) - self._pins.pages)

    def _is_deleted(self, space: Space, page_hash: bytes, written_ms: float, now_ms: float) -> bool:
        died_ms = self._tombstones.died_ms(space, page_hash, now_ms)
        return died_ms is not None and written_ms < died_ms + TOMBSTONE_MARGIN_MS

    def _forget(self, record: NamespaceRecord) -> None:
        if self._namespaces.forget(record):
            self._room.forget(record.slot_class)

    def _evict(self, page: Page) -> None:
        self._drop(page, PageStep.EVICT, PageEventKind.EVICTED)

    def _drop(self, page: Page, step: PageStep, kind: PageEventKind) -> None:
        """Ends the life of a sealed page that nobody pins."""
        assert not page.pins, "a pinned page is neither evicted nor deleted"
        self._vanish(page, step, kind)
        self._leave(page)

    def _vanish(self, page: Page, step: PageStep, kind: PageEventKind) -> None:
        """A sealed page is found no more."""
        page.advance(step)
        record = page.namespace
        del record.sealed[page.hash]
        self._sealed -= 1
        self._events.append(record.space, kind, page.hash)

    def _bury(self, page: Page) -> None:
        """Ends the life of a corrupt page that nobody pins any more."""
        page.namespace.corrupt.remove(page)
        page.advance(PageStep.FREE)
        self._leave(page)

    def _leave(self, page: Page) -> None:
        """Gives an idle page's slot back."""
        page.namespace.policy.removed(page)
        self._residency.left(page)
        self._free(page)
        self._namespaces.lost_page(page.namespace)

    def _free(self, page: Page) -> None:
        self._used_bytes -= page.slot.size_bytes
        self._quotas.gave_back(page.namespace.space.tenant, page.slot.size_bytes)
        self._slots.give_back(page.slot)
