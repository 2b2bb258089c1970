"""One page: its life, its record in the table with the records it refers to, and the handles given to whoever fills or reads
it.

Owns: the transition table of a page's life.
Invariant: a page moves along `PAGE_LIFE` and in no other way; a step that is not in the table is a bug and raises
`AssertionError`.

    state     | prepare   complete  abort   evict   delete  condemn  free
    ----------+------------------------------------------------------------
    ABSENT    | ARRIVING
    ARRIVING  |           SEALED    ABSENT
    SEALED    |                             ABSENT  ABSENT  CORRUPT
    CORRUPT   |                                                      ABSENT

Only SEALED pages are found by a lookup, and only SEALED pages that nobody pins are evicted or deleted. A page whose bytes are not
what was sealed any more is CORRUPT until its last pin is gone: nobody finds it, and its hash may be written anew meanwhile. (A page
on the SSD will be another state, SPILLED, between SEALED and ABSENT.)
"""

from __future__ import annotations

import enum
import math
from dataclasses import dataclass
from typing import Final

from attnstore.core.eviction import EvictionPolicy
from attnstore.core.hashing import LAYER_CHECKSUM_BYTES, range_checksum
from attnstore.core.layout import PageLayout
from attnstore.core.slots import Slot, SlotClass
from attnstore.types import Space


class PageState(enum.StrEnum):
    """Where a page is in its life."""

    ABSENT = "absent"
    ARRIVING = "arriving"
    SEALED = "sealed"
    CORRUPT = "corrupt"


class PageStep(enum.StrEnum):
    """What moves a page on."""

    PREPARE = "prepare"
    COMPLETE = "complete"
    ABORT = "abort"
    EVICT = "evict"
    DELETE = "delete"
    CONDEMN = "condemn"
    FREE = "free"


PAGE_LIFE: Final[dict[tuple[PageState, PageStep], PageState]] = {
    (PageState.ABSENT, PageStep.PREPARE): PageState.ARRIVING,
    (PageState.ARRIVING, PageStep.COMPLETE): PageState.SEALED,
    (PageState.ARRIVING, PageStep.ABORT): PageState.ABSENT,
    (PageState.SEALED, PageStep.EVICT): PageState.ABSENT,
    (PageState.SEALED, PageStep.DELETE): PageState.ABSENT,
    (PageState.SEALED, PageStep.CONDEMN): PageState.CORRUPT,
    (PageState.CORRUPT, PageStep.FREE): PageState.ABSENT,
}


class Page:
    """The table's record of one page. `pins` counts leases and readers together, `readers` those in this process alone. `layers`
    are the `layer_checksums` of a sealed page, `verified_ms` is when it was last hashed again, `written_ms` when a client wrote it,
    also where it was handed over since; `number` counts the table's sealed pages.
    """

    __slots__ = (
        "checksum",
        "extent",
        "hash",
        "is_handed_over",
        "layers",
        "namespace",
        "number",
        "pins",
        "readers",
        "slot",
        "state",
        "used",
        "verified_ms",
        "written_ms",
    )

    def __init__(self, namespace: NamespaceRecord, page_hash: bytes, checksum: int, slot: Slot, extent: ExtentPages) -> None:
        self.namespace = namespace
        self.hash = page_hash
        self.checksum = checksum
        self.slot = slot
        self.extent = extent
        self.layers = b""
        self.state = PageState.ABSENT
        self.verified_ms = -math.inf
        self.pins = 0
        self.readers = 0
        self.used = 0  # the tick at the last use
        self.number = 0
        self.written_ms = 0.0
        self.is_handed_over = False

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
    """One space and its pages by hash, with those that are corrupt and still held. Spaces of one class (tenant and page size) share
    slots and eviction order.
    """

    __slots__ = ("arriving", "corrupt", "layout", "policy", "sealed", "slot_class", "space")

    def __init__(self, space: Space, layout: PageLayout, slot_class: SlotClass, policy: EvictionPolicy[Page]) -> None:
        self.space = space
        self.layout = layout
        self.slot_class = slot_class
        self.policy = policy
        self.arriving: dict[bytes, Page] = {}
        self.sealed: dict[bytes, Page] = {}
        self.corrupt: set[Page] = set()

    @property
    def has_pages(self) -> bool:
        """Slots are taken, whatever for."""
        return bool(self.sealed or self.arriving or self.corrupt)


@dataclass(slots=True, eq=False)
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

    @property
    def layer_bytes(self) -> int:
        """Bytes of each of the page's layers."""
        return self.record.namespace.layout.layer_bytes


@dataclass(slots=True, eq=False)
class PinnedPage:
    """A sealed page that stays where it is until `PageTable.unpin`, which must be called exactly once."""

    record: Page

    @property
    def slot(self) -> Slot:
        """Where the bytes are."""
        return self.record.slot

    @property
    def written_ms(self) -> float:
        """When a client wrote it, by the table's clock."""
        return self.record.written_ms

    @property
    def checksum(self) -> int:
        """XXH3-64 of the whole page."""
        return self.record.checksum

    @property
    def layers(self) -> bytes:
        """`layer_checksums` of the page."""
        return self.record.layers

    @property
    def layer_bytes(self) -> int:
        """Bytes of each of the page's layers."""
        return self.record.namespace.layout.layer_bytes

    @property
    def verified_ms(self) -> float:
        """When the page was last hashed again and found intact; minus infinity where it never was."""
        return self.record.verified_ms

    def guard(self, begin: int, end: int) -> int:
        """What a reader of bytes `[begin, end)`, whole layers, checks: the page's checksum for all of it, else `range_checksum`."""
        if end - begin == self.record.slot.size_bytes:
            return self.record.checksum
        first, last = begin // self.layer_bytes, end // self.layer_bytes
        return range_checksum(self.record.layers[LAYER_CHECKSUM_BYTES * first : LAYER_CHECKSUM_BYTES * last])
