"""Which namespaces the node knows, whose they are and what their pages look like.

Owns: the map from a space, a tenant's namespace, to its layout and pages. A page is reachable through its own space only, because
each has its own maps of hashes; two tenants that serve one model have equal digests and nothing in common.
Invariant: a space never changes its layout; there are at most `NAMESPACES_MAX`.
"""

from __future__ import annotations

from collections.abc import Iterator

from attnstore.core.layout import PageLayout
from attnstore.core.page import NamespaceRecord
from attnstore.errors import LayoutMismatch, NamespaceUnknown, Overloaded
from attnstore.limits import HASH_BYTES, NAMESPACES_MAX
from attnstore.types import Space


class Namespaces:
    """The registry of namespaces."""

    def __init__(self) -> None:
        self._records: dict[Space, NamespaceRecord] = {}

    def __iter__(self) -> Iterator[NamespaceRecord]:
        return iter(self._records.values())

    def find(self, space: Space) -> NamespaceRecord:
        """Raises `NamespaceUnknown`, also where the namespace is another tenant's alone."""
        record = self._records.get(space)
        if record is None:
            raise NamespaceUnknown(f"namespace {space.namespace.hex()} is not registered on this node; call RegisterLayout first")
        return record

    def known(self, space: Space, layout: PageLayout) -> NamespaceRecord | None:
        """The record where it agrees, None where the space may be added.

        Raises `LayoutMismatch`, or `Overloaded` where no more namespaces fit.
        """
        record = self._records.get(space)
        if record is None:
            if len(self._records) >= NAMESPACES_MAX:
                raise Overloaded(f"the node knows {NAMESPACES_MAX} namespaces, its maximum; use another node")
            return None
        if record.layout != layout:
            raise LayoutMismatch(f"namespace {space.namespace.hex()} is registered with {record.layout}, not with {layout}")
        return record

    def add(self, record: NamespaceRecord) -> None:
        """Adds a space for which `known` said None."""
        assert len(record.space.namespace) == HASH_BYTES, f"a namespace has {HASH_BYTES} bytes"
        assert record.space not in self._records
        self._records[record.space] = record
