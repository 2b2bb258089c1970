"""Residency: which pages lie in which extent, and which extent may be given to another class.

Owns: the pages of each extent, how many of them are busy (arriving or pinned), a counter of uses, and the order of last use of the
*idle* extents: those that have pages, none of them busy.
Invariants: an extent is idle exactly while it has pages and none of them is busy; the idle order is ascending in `used`; with
several tenants, none makes more extents busy than its share, so that one tenant's endlessly renewed leases, slow readers and slow
writers leave extents for the others.

A class that runs out of slots can take a whole idle extent from another class: the least recently used one. Keeping the idle
extents in order makes that choice O(1), independent of the number of extents.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence

from attnstore.core.fair_share import FairShares
from attnstore.core.page import ExtentPages, Page, PageState
from attnstore.core.slots import Slot


class Residency:
    """The pages of every extent and the order of the idle ones, on a node of `tenants` tenants."""

    def __init__(self, extents: int, tenants: int = 1) -> None:
        self._is_shared = tenants > 1
        self._busy = FairShares(extents, "extents of memory in use", "release leases, or try again later", tenants=tenants)
        self._extents = [ExtentPages() for _ in range(extents)]
        self._idle: OrderedDict[ExtentPages, None] = OrderedDict()
        self._tick = 0  # counts uses, so that recency is strictly ordered even if the clock does not advance

    def extent_of(self, slot: Slot) -> ExtentPages:
        """The extent that a slot lies in."""
        return self._extents[slot.extent]

    def may_busy(self, tenant: str) -> bool:
        """Returns whether pages of the tenant in an idle extent may become busy."""
        return not self._is_shared or self._busy.fits(tenant)

    def require_room(self, tenant: str, pages: Sequence[Page]) -> None:
        """Raises `Overloaded` if these pages, once busy, would give the tenant more than its share of the extents."""
        # Counting the extents is needed only if their upper bound does not fit.
        if self._is_shared and not self._busy.fits(tenant, min(len(pages), len(self._idle))):
            idle = {page.extent for page in pages if not page.extent.busy}
            if idle:
                self._busy.require(tenant, len(idle))

    def pages_of(self, extent: int) -> Iterable[Page]:
        """Returns the pages of an extent in order of arrival."""
        return self._extents[extent].pages

    def coldest_idle(self) -> ExtentPages | None:
        """Returns the least recently used idle extent, or None if every extent is free or busy."""
        return next(iter(self._idle), None)

    def arrived(self, page: Page) -> None:
        """Adds a new page, which is busy."""
        page.extent.pages[page] = None
        self.busied((page,))

    def left(self, page: Page) -> None:
        """Removes an idle page."""
        extent = page.extent
        del extent.pages[page]
        if not extent.pages:
            del self._idle[extent]

    def abandoned(self, page: Page) -> None:
        """Removes a busy page."""
        self.settled((page,))
        self.left(page)

    def busied(self, pages: Sequence[Page]) -> None:
        """Makes idle pages busy."""
        idle, is_shared = self._idle, self._is_shared
        for page in pages:
            extent = page.extent
            if not extent.busy:
                idle.pop(extent, None)
                if is_shared:
                    self._busy.take(page.namespace.space.tenant)
            extent.busy += 1

    def settled(self, pages: Sequence[Page]) -> None:
        """Makes busy pages idle; they count as used until now."""
        self._tick = tick = self._tick + 1
        idle, is_shared = self._idle, self._is_shared
        for page in pages:
            page.used = tick
            extent = page.extent
            extent.used = tick
            extent.busy -= 1
            if not extent.busy:
                idle[extent] = None
                if is_shared:
                    self._busy.give_back(page.namespace.space.tenant)

    def touched(self, pages: Sequence[Page]) -> None:
        """Records that pages, busy or idle, were used."""
        self._tick = tick = self._tick + 1
        last = None
        for page in pages:
            page.used = tick
            extent = page.extent
            if extent is not last:  # pages of one prefix are usually written together and are neighbours
                last = extent
                extent.used = tick
                if not extent.busy:
                    self._idle.move_to_end(extent)

    def check(self) -> None:
        """Asserts the module's invariants. O(pages); for tests."""
        for index, extent in enumerate(self._extents):
            busy = sum(page.state is PageState.ARRIVING or page.pins > 0 for page in extent.pages)
            assert extent.busy == busy, f"extent {index}: {extent.busy} pages counted busy, {busy} are"
            assert (extent in self._idle) == (bool(extent.pages) and not busy), f"extent {index}: idle order and pages disagree"
            assert all(page.extent is extent and page.slot.extent == index for page in extent.pages)
            assert all(page.used <= extent.used for page in extent.pages)
        holders = Counter(next(iter(extent.pages)).namespace.space.tenant for extent in self._extents if extent.busy)
        assert self._busy.held == (holders if self._is_shared else {})
        ticks = [extent.used for extent in self._idle]
        assert ticks == sorted(ticks), "the idle extents are out of order"
