"""The registered namespaces of a node: their tenants, layouts and pages.

Owns: the map from a space (a tenant's namespace) to its layout and pages. A page is reachable through its own space only, because
each space has its own map of hashes: two tenants that serve one model have equal digests and share nothing.
Invariants: a space never changes its layout; there are at most `NAMESPACES_MAX`, shared among tenants; `_empty` has the spaces
without pages, ordered by when they lost their last page or were added, oldest first.

Forgetting an empty space costs one registration, which a client repeats automatically. It is therefore forgotten when another space
needs its place, or after `NAMESPACE_EMPTY_MS_MAX`, so that a long-lived node does not fill up with old models.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

from attnstore.core.fair_share import FairShares
from attnstore.core.layout import PageLayout
from attnstore.core.page import NamespaceRecord, Page
from attnstore.core.room import RoomMaker
from attnstore.core.slots import SlotClass, SlotPool
from attnstore.core.statistics import SpaceStatistics
from attnstore.errors import LayoutMismatch, NamespaceUnknown
from attnstore.limits import HASH_BYTES, NAMESPACE_EMPTY_MS_MAX, NAMESPACES_MAX
from attnstore.types import Space


class Namespaces:
    """The registry of namespaces of `tenants` tenants, whose pages lie in `slots` and make room by `room`."""

    def __init__(self, slots: SlotPool, room: RoomMaker, tenants: int = 1) -> None:
        self._slots = slots
        self._room = room
        self._records: dict[Space, NamespaceRecord] = {}
        self._empty: dict[Space, float | None] = {}  # time at which a sweep first saw it empty
        self._of_class: Counter[SlotClass] = Counter()
        self._shares = FairShares(NAMESPACES_MAX, "namespaces with pages", "delete some, or use another node", tenants=tenants)

    def __iter__(self) -> Iterator[NamespaceRecord]:
        return iter(self._records.values())

    def find(self, space: Space) -> NamespaceRecord:
        """Returns the record. Raises `NamespaceUnknown`, also if only another tenant registered the namespace."""
        record = self._records.get(space)
        if record is None:
            raise NamespaceUnknown(f"namespace {space.namespace.hex()} is not registered on this node; call RegisterLayout first")
        return record

    def sealed_in(self, space: Space) -> Mapping[bytes, Page]:
        """Returns the sealed pages of a space; empty if it is not registered."""
        record = self._records.get(space)
        return {} if record is None else record.sealed

    def register(self, space: Space, layout: PageLayout) -> int:
        """Registers a tenant's namespace, idempotently, and returns the number of its pages that would fit the whole arena.

        Raises `LayoutMismatch`, `InvalidArgument` if a page is larger than an extent, or `Overloaded` if the tenant has used its
        share of namespaces and all of them have pages.
        """
        record = self._known(space, layout)
        if record is None:
            while (spare := self._spare(space.tenant)) is not None:
                self._forget(spare)
            slot_class = self._slots.slot_class(space.tenant, layout.page_bytes)
            record = NamespaceRecord(space, layout, slot_class, self._room.policy_of(slot_class))
            self._add(record)
        return self._slots.extents * record.slot_class.slots_per_extent

    def _known(self, space: Space, layout: PageLayout) -> NamespaceRecord | None:
        """Returns the record if it has this layout, or None if there is none. Raises `LayoutMismatch`."""
        record = self._records.get(space)
        if record is not None and record.layout != layout:
            raise LayoutMismatch(f"namespace {space.namespace.hex()} is registered with {record.layout}, not with {layout}")
        return record

    def _spare(self, tenant: str) -> NamespaceRecord | None:
        """Returns the empty space that must be forgotten before the tenant may add another, preferring one of its own.

        Returns None if there is room. Raises `Overloaded` if there is neither room nor an empty space.
        """
        if self._shares.fits(tenant):
            return None
        own = next((space for space in self._empty if space.tenant == tenant), None)
        oldest = own or next(iter(self._empty), None)
        if oldest is None:
            self._shares.require(tenant)
            return None
        return self._records[oldest]

    def _add(self, record: NamespaceRecord) -> None:
        """Adds a space for which `_known` and `_spare` returned None."""
        assert len(record.space.namespace) == HASH_BYTES, f"a namespace has {HASH_BYTES} bytes"
        assert record.space not in self._records
        self._shares.take(record.space.tenant)
        self._records[record.space] = record
        self._of_class[record.slot_class] += 1
        self._empty[record.space] = None

    def filled(self, record: NamespaceRecord) -> None:
        """Records that an empty space got a page."""
        self._empty.pop(record.space, None)

    def lost_page(self, record: NamespaceRecord) -> None:
        """Records that the space lost a page."""
        if not record.has_pages:
            self._empty[record.space] = None

    def forget_empty(self, now_ms: float) -> None:
        """Forgets the spaces that earlier calls saw without pages `NAMESPACE_EMPTY_MS_MAX` ago. O(empty spaces)."""
        long_empty = []
        for space, since_ms in self._empty.items():
            if since_ms is None:
                self._empty[space] = now_ms
            elif now_ms - since_ms >= NAMESPACE_EMPTY_MS_MAX:
                long_empty.append(self._records[space])
        for record in long_empty:
            self._forget(record)

    def _forget(self, record: NamespaceRecord) -> None:
        """Removes an empty space, and its slot class if no other space uses it."""
        del self._empty[record.space]
        del self._records[record.space]
        self._shares.give_back(record.space.tenant)
        self._of_class[record.slot_class] -= 1
        if not self._of_class[record.slot_class]:
            del self._of_class[record.slot_class]
            self._room.forget(record.slot_class)

    def statistics(self, spaces: Sequence[Space]) -> list[SpaceStatistics]:
        """Returns a snapshot of each registered space, in order; unknown spaces are left out."""
        records = [record for space in spaces if (record := self._records.get(space)) is not None]
        return [SpaceStatistics(record.space, record.layout, len(record.sealed), len(record.arriving)) for record in records]

    def check(self) -> None:
        """Asserts the module's invariants. O(spaces); for tests."""
        assert set(self._empty) == {record.space for record in self if not record.has_pages}
        assert self._shares.held == Counter(space.tenant for space in self._records)
        assert self._of_class == Counter(record.slot_class for record in self)
