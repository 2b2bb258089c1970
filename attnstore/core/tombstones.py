"""Tombstones: pages deleted recently, so that no other node hands them over again.

Owns: the times of deletions, by tenant. Invariants: pure; a tombstone is kept for `TOMBSTONE_MS_MAX` at most; there are never more
than `TOMBSTONES_MAX`. If that does not suffice, the tenant with the most tombstones loses its oldest, so a tenant that deletes much
makes the node forget only its own deletions.
"""

from __future__ import annotations

from attnstore.limits import TOMBSTONE_MARGIN_MS, TOMBSTONE_MS_MAX, TOMBSTONES_MAX
from attnstore.types import Space


class Tombstones:
    """Times are those of the table's clock."""

    def __init__(self) -> None:
        # Per tenant, oldest first, keyed by namespace and hash joined: bytes and numbers give the garbage collector nothing to
        # scan.
        self._deleted_ms: dict[str, dict[bytes, float]] = {}
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def add(self, space: Space, page_hash: bytes, deleted_ms: float, now_ms: float) -> None:
        """Records that the page was deleted at `deleted_ms`."""
        self.remove(space, page_hash)
        of_tenant = self._deleted_ms.setdefault(space.tenant, {})
        of_tenant[space.namespace + page_hash] = deleted_ms
        self._count += 1
        while of_tenant and next(iter(of_tenant.values())) <= now_ms - TOMBSTONE_MS_MAX:
            self._forget_oldest(space.tenant)
        if self._count > TOMBSTONES_MAX:
            self._forget_oldest(max(self._deleted_ms, key=lambda tenant: len(self._deleted_ms[tenant])))

    def remove(self, space: Space, page_hash: bytes) -> None:
        """Forgets the deletion: the page was written again."""
        of_tenant = self._deleted_ms.get(space.tenant)
        if of_tenant is not None and of_tenant.pop(space.namespace + page_hash, None) is not None:
            self._count -= 1
            if not of_tenant:
                del self._deleted_ms[space.tenant]

    def cover(self, space: Space, page_hash: bytes, written_ms: float, now_ms: float) -> bool:
        """Returns whether a page written at `written_ms` may be the one that was deleted: the deletion came later, or less than
        `TOMBSTONE_MARGIN_MS` earlier. False if the deletion is unknown or long ago.
        """
        deleted_ms = self._deleted_ms.get(space.tenant, {}).get(space.namespace + page_hash)
        return deleted_ms is not None and deleted_ms > now_ms - TOMBSTONE_MS_MAX and written_ms < deleted_ms + TOMBSTONE_MARGIN_MS

    def check(self) -> None:
        """Asserts the module's invariants. O(tombstones); for tests and simulations."""
        assert all(self._deleted_ms.values())
        assert self._count == sum(map(len, self._deleted_ms.values())) <= TOMBSTONES_MAX

    def _forget_oldest(self, tenant: str) -> None:
        of_tenant = self._deleted_ms[tenant]
        del of_tenant[next(iter(of_tenant))]
        self._count -= 1
        if not of_tenant:
            del self._deleted_ms[tenant]
