"""Which namespaces the node knows, whose they are and what their pages look like.

Owns: the map from a space, a tenant's namespace, to its layout and pages. A page is reachable through its own space only, because
each has its own maps of hashes; two tenants that serve one model have equal digests and nothing in common.
Invariants: a space never changes its layout; there are at most `NAMESPACES_MAX`, shared among tenants; `_empty` has those without
pages, the one that lost its last page, or was added, longest ago at the head.

A space without pages is worth no more than its registration, which a client repeats by itself. So it is forgotten when another
needs its place, or after `NAMESPACE_EMPTY_MS_MAX`; a node that lives for years does not fill up with models of the past.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping

from attnstore.core.fair_share import FairShares
from attnstore.core.layout import PageLayout
from attnstore.core.page import NamespaceRecord, Page
from attnstore.core.slots import SlotClass
from attnstore.errors import LayoutMismatch, NamespaceUnknown
from attnstore.limits import HASH_BYTES, NAMESPACE_EMPTY_MS_MAX, NAMESPACES_MAX
from attnstore.types import Space


class Namespaces:
    """The registry of namespaces of `tenants` tenants."""

    def __init__(self, tenants: int = 1) -> None:
        self._records: dict[Space, NamespaceRecord] = {}
        self._empty: dict[Space, float | None] = {}  # since when, as far as a sweep has seen it
        self._of_class: Counter[SlotClass] = Counter()
        self._shares = FairShares(NAMESPACES_MAX, "namespaces with pages", "delete some, or use another node", tenants=tenants)

    def __iter__(self) -> Iterator[NamespaceRecord]:
        return iter(self._records.values())

    def get(self, space: Space) -> NamespaceRecord | None:
        """None where the space is not known."""
        return self._records.get(space)

    def find(self, space: Space) -> NamespaceRecord:
        """Raises `NamespaceUnknown`, also where the namespace is another tenant's alone."""
        record = self._records.get(space)
        if record is None:
            raise NamespaceUnknown(f"namespace {space.namespace.hex()} is not registered on this node; call RegisterLayout first")
        return record

    def sealed_in(self, space: Space) -> Mapping[bytes, Page]:
        """The sealed pages of a space; none where it is not registered."""
        record = self._records.get(space)
        return {} if record is None else record.sealed

    def known(self, space: Space, layout: PageLayout) -> NamespaceRecord | None:
        """The record where it agrees, None where there is none. Raises `LayoutMismatch`."""
        record = self._records.get(space)
        if record is not None and record.layout != layout:
            raise LayoutMismatch(f"namespace {space.namespace.hex()} is registered with {record.layout}, not with {layout}")
        return record

    def spare(self, tenant: str) -> NamespaceRecord | None:
        """What has to be forgotten before the tenant may add another space: an empty space, of its own if it has one.

        None where there is room. Raises `Overloaded` where neither is.
        """
        if self._shares.fits(tenant):
            return None
        own = next((space for space in self._empty if space.tenant == tenant), None)
        oldest = own or next(iter(self._empty), None)
        if oldest is None:
            self._shares.require(tenant)
            return None
        return self._records[oldest]

    def add(self, record: NamespaceRecord) -> None:
        """Adds a space for which `known` and `spare` said None."""
        assert len(record.space.namespace) == HASH_BYTES, f"a namespace has {HASH_BYTES} bytes"
        assert record.space not in self._records
        self._shares.take(record.space.tenant)
        self._records[record.space] = record
        self._of_class[record.slot_class] += 1
        self._empty[record.space] = None

    def filled(self, record: NamespaceRecord) -> None:
        """The space gets a page."""
        self._empty.pop(record.space, None)

    def lost_page(self, record: NamespaceRecord) -> None:
        """The space has one page less."""
        if not record.has_pages:
            self._empty[record.space] = None

    def long_empty(self, now_ms: float) -> list[NamespaceRecord]:
        """Those without pages for `NAMESPACE_EMPTY_MS_MAX`, as far as earlier calls have seen them so. O(empty spaces)."""
        found = []
        for space, since_ms in self._empty.items():
            if since_ms is None:
                self._empty[space] = now_ms
            elif now_ms - since_ms >= NAMESPACE_EMPTY_MS_MAX:
                found.append(self._records[space])
        return found

    def forget(self, record: NamespaceRecord) -> bool:
        """Takes an empty space out. Whether no other has its class."""
        del self._empty[record.space]
        del self._records[record.space]
        self._shares.give_back(record.space.tenant)
        self._of_class[record.slot_class] -= 1
        if self._of_class[record.slot_class]:
            return False
        del self._of_class[record.slot_class]
        return True

    def check(self) -> None:
        """Asserts the module's invariants. O(spaces); for tests."""
        assert set(self._empty) == {record.space for record in self if not record.has_pages}
        assert self._shares.held == Counter(space.tenant for space in self._records)
        assert self._of_class == Counter(record.slot_class for record in self)
