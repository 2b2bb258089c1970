"""Which pages lie in which extent, and which extent could be given to another class.

Owns: for each extent its pages and how many of them are busy (arriving or pinned), and the order of last use of the extents
that have pages but no busy one: the *idle* extents.
Invariant: an extent is idle exactly while it has pages and none of them is busy; the idle order is ascending in `used`.

A class that runs out of slots can take a whole idle extent from another class, the one that was unused longest. Keeping the
idle extents in order makes that choice O(1) however many extents the node has.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from attnstore.core.page import ExtentPages, Page, PageState
from attnstore.core.slots import Slot


class Residency:
    """The pages of every extent and the order of the idle ones."""

    def __init__(self, extents: int) -> None:
        self._extents = [ExtentPages() for _ in range(extents)]
        self._idle: OrderedDict[ExtentPages, None] = OrderedDict()

    def extent_of(self, slot: Slot) -> ExtentPages:
        """The extent that a slot lies in."""
        return self._extents[slot.extent]

    def coldest_idle(self) -> ExtentPages | None:
        """The idle extent that was unused longest, None where every extent is free or busy."""
        return next(iter(self._idle), None)

    def arrived(self, page: Page) -> None:
        """A page begins its life here, busy."""
        page.extent.pages[page] = None
        self.busied((page,))

    def left(self, page: Page) -> None:
        """An idle page ends its life."""
        extent = page.extent
        del extent.pages[page]
        if not extent.pages:
            del self._idle[extent]

    def abandoned(self, page: Page, tick: int) -> None:
        """A busy page ends its life."""
        self.settled((page,), tick)
        self.left(page)

    def busied(self, pages: Sequence[Page]) -> None:
        """Idle pages become busy."""
        idle = self._idle
        for page in pages:
            extent = page.extent
            if not extent.busy:
                idle.pop(extent, None)
            extent.busy += 1

    def settled(self, pages: Sequence[Page], tick: int) -> None:
        """Busy pages become idle, used until now."""
        for page in pages:
            page.used = tick
            extent = page.extent
            extent.used = tick
            extent.busy -= 1
            if not extent.busy:
                self._idle[extent] = None

    def touched(self, pages: Sequence[Page], tick: int) -> None:
        """Pages, busy or idle, were used."""
        last = None
        for page in pages:
            page.used = tick
            extent = page.extent
            if extent is not last:  # pages of one prefix were mostly written together and lie together
                last = extent
                extent.used = tick
                if not extent.busy:
                    self._idle.move_to_end(extent)

    def check(self) -> None:
        """Asserts the module's invariant. O(pages); for tests."""
        for index, extent in enumerate(self._extents):
            busy = sum(page.state is PageState.ARRIVING or page.pins > 0 for page in extent.pages)
            assert extent.busy == busy, f"extent {index}: {extent.busy} pages counted busy, {busy} are"
            assert (extent in self._idle) == (bool(extent.pages) and not busy), f"extent {index} is wrongly idle or wrongly not"
            assert all(page.extent is extent and page.slot.extent == index for page in extent.pages)
            assert all(page.used <= extent.used for page in extent.pages)
        ticks = [extent.used for extent in self._idle]
        assert ticks == sorted(ticks), "the idle extents are out of order"
