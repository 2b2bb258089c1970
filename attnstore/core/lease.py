"""Leases: time-bounded pins that a remote client holds.

Owns: which lease covers which pages and when it ends.
Invariant: an expired lease is never found, swept or not, because every look-up compares it with the given time. There are at most
`LEASES_MAX` leases over at most `LEASED_PAGES_MAX` pages; a page counts once per lease.

Expiry order is a heap with one entry per lease. A renewal leaves the entry where it is; when the sweep reaches the entry and the
lease is still alive, it pushes a new one. Frequent renewals therefore cost no memory.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from attnstore.core.fair_share import FairShares
from attnstore.core.page import NamespaceRecord, Page
from attnstore.errors import LeaseExpired
from attnstore.limits import LEASE_ID_BYTES, LEASE_MS_MAX, LEASED_PAGES_MAX, LEASES_MAX

_STALE_ENTRIES_MIN = 64


@dataclass(slots=True)
class LeaseRecord:
    """One lease on pages of one space; a page listed twice is pinned twice."""

    lease_id: bytes
    namespace: NamespaceRecord
    pages: list[Page]
    expires_ms: float


class LeaseTable:
    """The leases of `tenants` tenants by id. Pins nothing: the page table pins, and unpins when a lease ends.

    `leased_pages` counts the pages of all leases since the start.
    """

    def __init__(self, new_lease_id: Callable[[], bytes], tenants: int = 1) -> None:
        self._new_lease_id = new_lease_id
        remedy = "release leases, or match without one"
        self._shares = FairShares(LEASES_MAX, "leases", remedy, tenants=tenants)
        self._page_shares = FairShares(LEASED_PAGES_MAX, "leased pages", remedy, tenants=tenants)
        self._leases: dict[bytes, LeaseRecord] = {}
        self._expiries: list[tuple[float, bytes]] = []
        self.leased_pages = 0

    def __len__(self) -> int:
        return len(self._leases)

    def __iter__(self) -> Iterator[LeaseRecord]:
        return iter(self._leases.values())

    def grant(self, namespace: NamespaceRecord, pages: list[Page], lease_ms: int, now_ms: float) -> LeaseRecord:
        """Returns a new lease of `lease_ms`. Raises `Overloaded` if it would exceed the tenant's share."""
        tenant = namespace.space.tenant
        self._shares.take(tenant)
        try:
            self._page_shares.take(tenant, len(pages))
        except BaseException:
            self._shares.give_back(tenant)
            raise
        lease_id = self._new_lease_id()
        assert len(lease_id) == LEASE_ID_BYTES, f"a lease id has {LEASE_ID_BYTES} bytes"
        assert lease_id not in self._leases, "lease ids must not repeat"
        assert 0 < lease_ms <= LEASE_MS_MAX
        lease = LeaseRecord(lease_id, namespace, pages, now_ms + lease_ms)
        self._leases[lease_id] = lease
        self.leased_pages += len(pages)
        heapq.heappush(self._expiries, (lease.expires_ms, lease_id))
        return lease

    def extend(self, lease: LeaseRecord, pages: Sequence[Page], lease_ms: int, now_ms: float) -> None:
        """Adds pages to a living lease and extends it to at least `lease_ms` from now. Raises `Overloaded` as `grant` does."""
        self._page_shares.take(lease.namespace.space.tenant, len(pages))
        self.leased_pages += len(pages)
        lease.pages += pages
        lease.expires_ms = max(lease.expires_ms, now_ms + lease_ms)

    def find(self, lease_id: bytes, now_ms: float) -> LeaseRecord | None:
        """Returns the lease if it is alive at `now_ms`."""
        lease = self._leases.get(lease_id)
        return lease if lease is not None and now_ms < lease.expires_ms else None

    def find_of(self, tenant: str, lease_id: bytes, now_ms: float) -> LeaseRecord | None:
        """`find`, for a lease of this tenant."""
        lease = self._leases.get(lease_id)
        if lease is None or now_ms >= lease.expires_ms or lease.namespace.space.tenant != tenant:
            return None
        return lease

    def renew(self, tenant: str, lease_id: bytes, lease_ms: int, now_ms: float) -> int:
        """Extends a tenant's living lease to at least `lease_ms` from now. Returns its remaining whole milliseconds.

        A renewal never shortens a lease. Raises `LeaseExpired`, also for a lease of another tenant.
        """
        lease = self.find_of(tenant, lease_id, now_ms)
        if lease is None:
            raise LeaseExpired(f"lease {lease_id.hex()} has expired or never existed; match again")
        lease.expires_ms = max(lease.expires_ms, now_ms + min(lease_ms, LEASE_MS_MAX))
        return int(lease.expires_ms - now_ms)

    def remove(self, lease_id: bytes) -> LeaseRecord | None:
        """Removes and returns a lease, alive or expired, or None if it does not exist."""
        lease = self._leases.pop(lease_id, None)
        if lease is not None:
            tenant = lease.namespace.space.tenant
            self._shares.give_back(tenant)
            self._page_shares.give_back(tenant, len(lease.pages))
            if len(self._expiries) > 2 * len(self._leases) + _STALE_ENTRIES_MIN:
                self._forget_stale_entries()
        return lease

    def pop_expired(self, now_ms: float) -> LeaseRecord | None:
        """Removes and returns the lease that expired first, or None if none has expired."""
        entry = self._earliest()
        return self.remove(entry[1]) if entry is not None and entry[0] <= now_ms else None

    def has_due(self, now_ms: float) -> bool:
        """Returns False if no lease has expired, at less cost than `pop_expired`."""
        return bool(self._expiries) and self._expiries[0][0] <= now_ms

    def next_expiry_ms(self) -> float | None:
        """Returns the time at which the next lease expires, or None if there is no lease."""
        entry = self._earliest()
        return None if entry is None else entry[0]

    def check(self) -> None:
        """Asserts the module's invariant. O(pages); for tests."""
        leases: Counter[str] = Counter()
        pages: Counter[str] = Counter()
        for lease in self:
            leases[lease.namespace.space.tenant] += 1
            pages[lease.namespace.space.tenant] += len(lease.pages)
        assert (self._shares.held, self._page_shares.held) == (leases, pages)
        filed = [lease_id for _, lease_id in self._expiries if lease_id in self._leases]
        assert sorted(filed) == sorted(self._leases), "every lease has exactly one entry in the heap"
        assert len(self._expiries) <= 2 * len(self._leases) + _STALE_ENTRIES_MIN

    def _earliest(self) -> tuple[float, bytes] | None:
        """Returns the first valid entry of the heap. Pushes new entries for renewed leases and drops those of removed ones."""
        heap = self._expiries
        while heap:
            expires_ms, lease_id = heap[0]
            lease = self._leases.get(lease_id)
            if lease is None:
                heapq.heappop(heap)
            elif lease.expires_ms > expires_ms:
                heapq.heapreplace(heap, (lease.expires_ms, lease_id))
            else:
                return heap[0]
        return None

    def _forget_stale_entries(self) -> None:
        """Keeps the heap within twice the number of leases: a client that matches and releases quickly leaves entries until they
        expire.
        """
        self._expiries = [(lease.expires_ms, lease.lease_id) for lease in self]
        heapq.heapify(self._expiries)
