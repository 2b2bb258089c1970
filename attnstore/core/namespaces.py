"""Which namespaces the node knows, whose they are and what their pages look like.

Owns: the map from a namespace to its layout, tenant and pages. A page is reachable through its own namespace only, because each
namespace has its own maps of hashes.
Invariant: a namespace never changes its layout or its tenant; there are at most `NAMESPACES_MAX`.
"""

from __future__ import annotations

from collections.abc import Iterator

from attnstore.core.layout import PageLayout
from attnstore.core.page import NamespaceRecord
from attnstore.errors import LayoutMismatch, NamespaceUnknown, Overloaded, PermissionDenied
from attnstore.limits import HASH_BYTES, NAMESPACES_MAX


class Namespaces:
    """The registry of namespaces."""

    def __init__(self) -> None:
        self._records: dict[bytes, NamespaceRecord] = {}

    def __iter__(self) -> Iterator[NamespaceRecord]:
        return iter(self._records.values())

    def find(self, namespace: bytes) -> NamespaceRecord:
        """Raises `NamespaceUnknown`."""
        record = self._records.get(namespace)
        if record is None:
            raise NamespaceUnknown(f"namespace {namespace.hex()} is not registered on this node; call RegisterLayout first")
        return record

    def find_of(self, namespace: bytes, tenant: str) -> NamespaceRecord:
        """Raises `NamespaceUnknown`, or `PermissionDenied` where it is another tenant's."""
        record = self.find(namespace)
        if record.tenant != tenant:
            raise _denied(namespace)
        return record

    def known(self, namespace: bytes, layout: PageLayout, tenant: str) -> NamespaceRecord | None:
        """The record where it agrees, None where the namespace may be added.

        Raises `PermissionDenied`, `LayoutMismatch`, or `Overloaded` where no more namespaces fit.
        """
        record = self._records.get(namespace)
        if record is None:
            if len(self._records) >= NAMESPACES_MAX:
                raise Overloaded(f"the node knows {NAMESPACES_MAX} namespaces, its maximum; use another node")
            return None
        if record.tenant != tenant:
            raise _denied(namespace)
        if record.layout != layout:
            raise LayoutMismatch(f"namespace {namespace.hex()} is registered with {record.layout}, not with {layout}")
        return record

    def add(self, record: NamespaceRecord) -> None:
        """Adds a namespace for which `known` said None."""
        assert len(record.namespace) == HASH_BYTES, f"a namespace has {HASH_BYTES} bytes"
        assert record.namespace not in self._records
        self._records[record.namespace] = record


def _denied(namespace: bytes) -> PermissionDenied:
    return PermissionDenied(f"namespace {namespace.hex()} belongs to another tenant; use a tenant salt of your own")
