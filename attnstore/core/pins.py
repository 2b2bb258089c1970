"""Pins: leases and readers that keep pages in place.

Owns: the pin count of every page, and the ended leases whose pages are not yet released. Invariants: a page's pin count is its
number of readers plus the number of times that leases list it, alive or ended; an ended lease is never found; the eviction policy
and the extent of a page are told of its first and of its last pin.

No command releases more than `MATCH_PAGES_MAX` pages beyond those that it was given. A command with more to release reports that it
is not done.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Sequence
from itertools import chain

from attnstore.core.lease import LeaseRecord, LeaseTable
from attnstore.core.page import NamespaceRecord, Page
from attnstore.core.residency import Residency
from attnstore.limits import MATCH_PAGES_MAX, WORK_PAGES_MAX


class Pins:
    """The pins of one page table. `free_corrupt` is called with a corrupt page whose last pin is gone."""

    def __init__(self, residency: Residency, leases: LeaseTable, free_corrupt: Callable[[Page], None]) -> None:
        self._residency = residency
        self._leases = leases
        self._free_corrupt = free_corrupt
        self._ended: deque[LeaseRecord] = deque()
        self.pages = 0
        """The number of pinned pages."""

    def lease(self, record: NamespaceRecord, pages: list[Page], lease_ms: int, now_ms: float, lease_id: bytes | None) -> bytes:
        """Returns a new lease over the pages, or adds them to `lease_id`; does nothing if that lease has expired meanwhile."""
        self.settle(now_ms)
        lease = None if lease_id is None else self._leases.find(lease_id, now_ms)
        if lease_id is not None and lease is None:
            return lease_id
        self._residency.require_room(record.space.tenant, pages)
        if lease is None:
            lease = self._leases.grant(record, pages, lease_ms, now_ms)
        else:
            self._leases.extend(lease, pages, lease_ms, now_ms)
        self.hold(record, pages)
        return lease.lease_id

    def release(self, tenant: str, lease_id: bytes, now_ms: float) -> bool:
        """Ends a tenant's lease. Returns False if it had expired or never existed. Releases its pages, or some as `expire` does."""
        lease = self._leases.find_of(tenant, lease_id, now_ms)
        if lease is None:
            self.settle(now_ms)
            return False
        self._leases.remove(lease_id)
        if self._ended or len(lease.pages) > MATCH_PAGES_MAX:
            self._ended.append(lease)
            self.settle(now_ms)
        else:
            lease.pages.reverse()
            self.let_go(lease.namespace, lease.pages)
        return True

    def renew(self, tenant: str, lease_id: bytes, lease_ms: int, now_ms: float) -> int:
        """`LeaseTable.renew`."""
        return self._leases.renew(tenant, lease_id, lease_ms, now_ms)

    @property
    def leased_pages(self) -> int:
        """The number of pages leased since the start; a page counts once per lease."""
        return self._leases.leased_pages

    def has_due(self, now_ms: float) -> bool:
        """Returns False if `expire` would find nothing to release."""
        return bool(self._ended) or self._leases.has_due(now_ms)

    def expire(self, now_ms: float) -> float | None:
        """Ends the leases that have expired and releases the pages of ended leases, the last of a prefix first.

        Ends at most `WORK_PAGES_MAX` leases and releases at most `MATCH_PAGES_MAX` pages. Returns the time at which there is more
        to do: `now_ms` if pages are left, else the expiry of the next lease, or None if there is no lease.
        """
        for _ in range(WORK_PAGES_MAX):
            expired = self._leases.pop_expired(now_ms)
            if expired is None:
                break
            self._ended.append(expired)
        left = MATCH_PAGES_MAX
        while self._ended and left > 0:
            lease = self._ended[0]
            going = lease.pages[-left:]
            going.reverse()
            self.let_go(lease.namespace, going)
            if len(going) == len(lease.pages):
                self._ended.popleft()
            else:
                del lease.pages[-left:]
            left -= max(1, len(going))
        return now_ms if self._ended else self._leases.next_expiry_ms()

    def settle(self, now_ms: float) -> bool:
        """Calls `expire` if it has something to do. Returns whether pages of ended leases are still to be released."""
        if not self._ended and not self._leases.has_due(now_ms):
            return False
        next_ms = self.expire(now_ms)
        return next_ms is not None and next_ms <= now_ms

    def may_busy(self, tenant: str, now_ms: float) -> bool:
        """`Residency.may_busy`, after releasing pages of ended leases if that is needed."""
        if self._residency.may_busy(tenant):
            return True
        self.settle(now_ms)
        return self._residency.may_busy(tenant)

    def hold(self, record: NamespaceRecord, pages: Sequence[Page]) -> None:
        """Pins each page once more; a page listed twice is pinned twice."""
        unpinned = []
        for page in pages:
            pins = page.pins
            if not pins:
                unpinned.append(page)
            page.pins = pins + 1
        record.policy.withdrawn(unpinned)
        self._residency.busied(unpinned)
        self.pages += len(unpinned)

    def let_go(self, record: NamespaceRecord, pages: Sequence[Page]) -> None:
        """Undoes `hold`. Pages whose last pin this was become the most recently used ones, in the given order."""
        unpinned = []
        for page in pages:
            pins = page.pins - 1
            page.pins = pins
            if not pins:
                unpinned.append(page)
        self._residency.settled(unpinned)
        record.policy.returned(unpinned)
        self.pages -= len(unpinned)
        if record.corrupt:
            for page in unpinned:
                if page in record.corrupt:
                    self._free_corrupt(page)

    def touch(self, record: NamespaceRecord, pages: Sequence[Page]) -> None:
        """Records that sealed pages, pinned or not, were used."""
        self._residency.touched(pages)
        record.policy.touched([page for page in pages if not page.pins])

    def check(self, sealed: Sequence[Page], corrupt: Sequence[Page]) -> None:
        """Asserts the module's invariants, given all pages that can be pinned. O(pages); for tests."""
        self._leases.check()
        pages = [*sealed, *corrupt]
        leased = Counter(page for lease in chain(self._leases, self._ended) for page in lease.pages)
        assert leased.keys() <= set(pages), "a lease covers a page that is gone"
        assert all(page.pins == page.readers + leased[page] for page in pages)
        assert self.pages == sum(page.pins > 0 for page in pages)
        assert all((page in page.namespace.policy) == (page.pins == 0) for page in sealed)
        assert all(page.pins for page in corrupt), "an unpinned corrupt page keeps its slot"
