"""One page: its life, its record in the table with the records it refers to, and the handles given to whoever fills or reads
it.

Owns: the transition table of a page's life.
Invariant: a page moves along `PAGE_LIFE` and in no other way; a step that is not in the table is a bug and raises
`AssertionError`.

    state     | prepare   complete  abort   evict   delete
    ----------+-------------------------------------------
    ABSENT    | ARRIVING
    ARRIVING  |           SEALED    ABSENT
    SEALED    |                             ABSENT  ABSENT

Only SEALED pages are found by a lookup, and only SEALED pages that nobody pins are evicted or deleted. (A page on the SSD
will be a fourth state, SPILLED, between SEALED and ABSENT.)
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Final

from attnstore.core.eviction import EvictionPolicy
from attnstore.core.layout import PageLayout
from attnstore.core.slots import Slot, SlotClass
from attnstore.types import Space


class PageState(enum.StrEnum):
    """Where a page is in its life."""

    ABSENT = "absent"
    ARRIVING = "arriving"
    SEALED = "sealed"


class PageStep(enum.StrEnum):
    """What moves a page on."""

    PREPARE = "prepare"
    COMPLETE = "complete"
    ABORT = "abort"
    EVICT = "evict"
    DELETE = "delete"


PAGE_LIFE: Final[dict[tuple[PageState, PageStep], PageState]] = {
    (PageState.ABSENT, PageStep.PREPARE): PageState.ARRIVING,
    (PageState.ARRIVING, PageStep.COMPLETE): PageState.SEALED,
    (PageState.ARRIVING, PageStep.ABORT): PageState.ABSENT,
    (PageState.SEALED, PageStep.EVICT): PageState.ABSENT,
    (PageState.SEALED, PageStep.DELETE): PageState.ABSENT,
}


class Page:
    """The table's record of one page. `pins` counts leases and readers together, `readers` those in this process alone."""

    __slots__ = ("checksum", "extent", "hash", "namespace", "pins", "readers", "slot", "state", "used")

    def __init__(self, namespace: NamespaceRecord, page_hash: bytes, checksum: int, slot: Slot, extent: ExtentPages) -> None:
        self.namespace = namespace
        self.hash = page_hash
        self.checksum = checksum
        self.slot = slot
        self.extent = extent
        self.state = PageState.ABSENT
        self.pins = 0
        self.readers = 0
        self.used = 0  # the table's tick at the last use

    def advance(self, step: PageStep) -> None:
        """Moves the page along `PAGE_LIFE`."""
        state = PAGE_LIFE.get((self.state, step))
        assert state is not None, f"a page that is {self.state.value} cannot {step.value}"
        self.state = state


class ExtentPages:
    """The pages of one extent. `busy` counts those that are arriving or pinned, `used` is the tick at the last use of any of
    them.
    """

    __slots__ = ("busy", "pages", "used")

    def __init__(self) -> None:
        self.pages: dict[Page, None] = {}
        self.busy = 0
        self.used = 0


class NamespaceRecord:
    """One space and its pages by hash. Those of one class (tenant and page size) share slots and eviction order."""

    __slots__ = ("arriving", "layout", "policy", "sealed", "slot_class", "space")

    def __init__(self, space: Space, layout: PageLayout, slot_class: SlotClass, policy: EvictionPolicy[Page]) -> None:
        self.space = space
        self.layout = layout
        self.slot_class = slot_class
        self.policy = policy
        self.arriving: dict[bytes, Page] = {}
        self.sealed: dict[bytes, Page] = {}


@dataclass(frozen=True, slots=True)
class ArrivingPage:
    """A slot to fill: hand it back to `PageTable.complete` or `PageTable.abort`, exactly once."""

    record: Page

    @property
    def slot(self) -> Slot:
        """Where the bytes go."""
        return self.record.slot

    @property
    def checksum(self) -> int:
        """What the writer announced: the XXH3-64 that the bytes must have before `complete`."""
        return self.record.checksum


@dataclass(frozen=True, slots=True)
class PinnedPage:
    """A sealed page that stays where it is until `PageTable.unpin`, which must be called exactly once."""

    record: Page

    @property
    def slot(self) -> Slot:
        """Where the bytes are."""
        return self.record.slot

    @property
    def checksum(self) -> int:
        """XXH3-64 of the whole page."""
        return self.record.checksum
