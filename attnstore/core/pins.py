"""Who keeps pages in place: leases and readers.

Owns: every page's count of pins, and the leases that have ended and whose pages are still to be let go. Invariants: a page's pins
are its readers and the leases that have it, living or ended, each as often as it has it; a lease that has ended names nothing any
more; a page's eviction policy and its extent learn of the first pin and of the last.

No command lets more than `MATCH_PAGES_MAX` pages go beyond those that it was given: what takes more says that it is not done.
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
    """The pins of one page table. `bury` ends the life of a corrupt page whose last pin is gone."""

    def __init__(self, residency: Residency, leases: LeaseTable, bury: Callable[[Page], None]) -> None:
        self._residency = residency
        self._leases = leases
        self._bury = bury
        self._ended: deque[LeaseRecord] = deque()
        self.pages = 0
        """How many are pinned."""

    def lease(self, record: NamespaceRecord, pages: list[Page], lease_ms: int, now_ms: float, lease_id: bytes | None) -> bytes:
        """A new lease over the pages, or `lease_id` with them; as it was where it has expired meanwhile."""
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
        """Ends a tenant's lease; False where it had expired or never existed. Lets pages go, its own or as `expire` does."""
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

    def has_due(self, now_ms: float) -> bool:
        """Whether `expire` is worth a call: False where it would find nothing to let go."""
        return bool(self._ended) or self._leases.has_due(now_ms)

    def expire(self, now_ms: float) -> float | None:
        """Ends the leases that have expired and lets the pages of ended ones go, the last of a prefix first: at most
        `WORK_PAGES_MAX` leases and `MATCH_PAGES_MAX` pages.

        Returns when there is more to do: not later than now where this was not all, else when the next lease expires, None where no
        lease is left.
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
        """`expire` where it has something to do. Whether pages that nothing holds any more are then still to be let go."""
        if not self._ended and not self._leases.has_due(now_ms):
            return False
        next_ms = self.expire(now_ms)
        return next_ms is not None and next_ms <= now_ms

    def may_busy(self, tenant: str, now_ms: float) -> bool:
        """`Residency.may_busy`, once what is not held any more was let go."""
        if self._residency.may_busy(tenant):
            return True
        self.settle(now_ms)
        return self._residency.may_busy(tenant)

    def hold(self, record: NamespaceRecord, pages: Sequence[Page]) -> None:
        """Pins each of the pages once more, one that is named twice twice."""
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
        """Undoes `hold`; where it was the last pin they are the most recently used pages now, in the order given."""
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
                    self._bury(page)

    def touch(self, record: NamespaceRecord, pages: Sequence[Page]) -> None:
        """Sealed pages, pinned or not, were used."""
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
        assert all(page.pins for page in corrupt), "a corrupt page that nobody holds keeps its slot"
