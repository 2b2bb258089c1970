"""The namespaces of a node and the removal of their pages: deleted, beyond a quota, or of leases that have ended.

Owns: `StoreSpaces`, a part of `attnstore.server.store.Store`, whose lock it shares. Invariant: under one hold of the lock, at most
`WORK_PAGES_MAX` pages are changed.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence

from attnstore.clock import Clock
from attnstore.core.layout import PageLayout
from attnstore.core.page import PageState
from attnstore.core.page_table import PageTable
from attnstore.core.statistics import SpaceStatistics
from attnstore.limits import WORK_PAGES_MAX
from attnstore.server.slices import Sliced, finish, in_slices
from attnstore.server.store_leases import StoreLeases
from attnstore.types import PageStatus, Space


class StoreSpaces:
    """Usable from any thread. `tell` publishes the events of the page table, under the lock."""

    def __init__(self, table: PageTable, clock: Clock, lock: threading.Lock, leases: StoreLeases, tell: Callable[[], None]) -> None:
        self._table = table
        self._clock = clock
        self._lock = lock
        self._leases = leases
        self._tell = tell

    def register(self, space: Space, layout: PageLayout) -> int:
        """`Namespaces.register`."""
        with self._lock:
            return self._table.namespaces.register(space, layout)

    def limit_tenants(self, quota_bytes: Mapping[str, int]) -> None:
        """`Quotas.limit`."""
        with self._lock:
            self._table.quotas.limit(quota_bytes)

    def sealed(self, after: int = 0) -> Iterator[list[tuple[Space, bytes]]]:
        """Yields the readable pages that were sealed after the first `after` pages stored here, a part of one extent at a time.

        Pages that come or go during the iteration may be included or not.
        """
        for extent in range(self._table.extents):
            with self._lock:
                pages = self._table.pages_in(extent)
            for part in in_slices(pages, WORK_PAGES_MAX):
                yield [(page.namespace.space, page.hash) for page in part if page.state is PageState.SEALED and page.number > after]

    def delete(self, space: Space, page_hashes: Sequence[bytes]) -> list[PageStatus]:
        """`PageTable.delete` of all pages."""
        return finish(self.deleting(space, page_hashes))

    def deleting(self, space: Space, page_hashes: Sequence[bytes]) -> Sliced[list[PageStatus]]:
        """`delete` in slices."""
        yield from self._leases.settling()
        statuses: list[PageStatus] = []
        for hashes in in_slices(page_hashes, WORK_PAGES_MAX):
            if statuses:
                yield
            with self._lock:
                statuses += self._table.delete(space, hashes, self._clock.now_ms())
                self._tell()
        return statuses

    def deleted_elsewhere(self, space: Space, page_hashes: Sequence[bytes], age_ms: float) -> None:
        """`PageTable.deleted_elsewhere` of each page, all deleted `age_ms` ago."""
        deleted_ms = self._clock.now_ms() - age_ms
        for hashes in in_slices(page_hashes, WORK_PAGES_MAX):
            with self._lock:
                for page_hash in hashes:
                    self._table.deleted_elsewhere(space, page_hash, deleted_ms, self._clock.now_ms())
                self._tell()

    def sweeping(self) -> Sliced[None]:
        """Frees what nobody may hold any more: pages of ended leases, pages beyond quotas, and namespaces that have been empty for
        long.
        """
        with self._lock:
            self._table.namespaces.forget_empty(self._clock.now_ms())
        yield from self._leases.settling()
        while True:
            with self._lock:
                has_more = self._table.trim()
                self._tell()
            if not has_more:
                return
            yield

    def expire(self) -> None:
        """`sweeping`, for a caller on a thread."""
        finish(self.sweeping())

    def namespaces(self, tenant: str | None = None) -> Sliced[list[SpaceStatistics]]:
        """`Namespaces.statistics` of the tenant's spaces, or of all spaces."""
        with self._lock:
            spaces = [record.space for record in self._table.namespaces]
        if tenant is not None:
            spaces = [space for space in spaces if space.tenant == tenant]
        statistics: list[SpaceStatistics] = []
        for part in in_slices(spaces, WORK_PAGES_MAX):
            if statistics:
                yield
            with self._lock:
                statistics += self._table.namespaces.statistics(part)
        return statistics
