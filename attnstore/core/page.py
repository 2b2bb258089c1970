"""One page: the states of its life, its record in the page table, the handles for writers and readers, and what a match finds.

Owns: the transition table of a page's life.
Invariant: a page changes its state only along `PAGE_LIFE`; a step that is not in the table is a bug and raises `AssertionError`.

    state     | prepare   complete  abort   evict   delete  condemn  free
    ----------+------------------------------------------------------------
    ABSENT    | ARRIVING
    ARRIVING  |           SEALED    ABSENT
    SEALED    |                             ABSENT  ABSENT  CORRUPT
    CORRUPT   |                                                      ABSENT

Only SEALED pages are found by a lookup, and only unpinned SEALED pages are evicted or deleted. A page whose bytes changed after it
was sealed is CORRUPT until its last pin is gone: lookups do not find it, and its hash may be written again meanwhile. (A page on
the SSD will have another state, SPILLED, between SEALED and ABSENT.)
"""

from __future__ import annotations

import enum
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from attnstore.core.eviction import EvictionPolicy
from attnstore.core.hashing import LAYER_CHECKSUM_BYTES, range_checksum
from attnstore.core.layout import PageLayout
from attnstore.core.slots import Slot, SlotClass
from attnstore.types import Space


class PageState(enum.StrEnum):
    """The state of a page."""

    ABSENT = "absent"
    ARRIVING = "arriving"
    SEALED = "sealed"
    CORRUPT = "corrupt"


class PageStep(enum.StrEnum):
    """A step between two states."""

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
    """The table's record of one page. `pins` counts leases and readers together, `readers` only those of this process.

    `layers` are the `layer_checksums` of a sealed page. `verified_ms` is the time of the last successful check, `written_ms` the
    time when a client wrote the page, even if another node handed it over since. `number` is the page's position among all pages
    that the table sealed.
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
        self.used = 0  # tick of the last use
        self.number = 0
        self.written_ms = 0.0
        self.is_handed_over = False

    def advance(self, step: PageStep) -> None:
        """Moves the page along `PAGE_LIFE`."""
        state = PAGE_LIFE.get((self.state, step))
        assert state is not None, f"a page that is {self.state.value} cannot {step.value}"
        self.state = state


class ExtentPages:
    """The pages of one extent. `busy` counts those that are arriving or pinned, `used` is the tick of their last use."""

    __slots__ = ("busy", "pages", "used")

    def __init__(self) -> None:
        self.pages: dict[Page, None] = {}
        self.busy = 0
        self.used = 0


class NamespaceRecord:
    """One space and its pages by hash, including the corrupt ones that are still pinned. Spaces of one class (tenant and page size)
    share slots and eviction order.
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
        """Whether the space has pages in any state."""
        return bool(self.sealed or self.arriving or self.corrupt)

    def leading(self, prefixes: Sequence[Sequence[bytes]]) -> tuple[tuple[int, ...], list[Page]]:
        """Returns how many leading pages of each prefix are sealed, and these pages. O(1) per hash."""
        found: list[Page] = []
        hits = []
        lookup = self.sealed.get
        for prefix in prefixes:
            before = len(found)
            for page_hash in prefix:
                page = lookup(page_hash)
                if page is None:
                    break
                found.append(page)
            hits.append(len(found) - before)
        return tuple(hits), found


@dataclass(slots=True, eq=False)
class ArrivingPage:
    """A slot to fill. Pass it to `PageTable.complete` or `PageTable.abort`, exactly once."""

    record: Page

    @property
    def slot(self) -> Slot:
        """Where the bytes go."""
        return self.record.slot

    @property
    def checksum(self) -> int:
        """The XXH3-64 that the writer announced; the bytes must have it before `complete`."""
        return self.record.checksum

    @property
    def layer_bytes(self) -> int:
        """Bytes of each of the page's layers."""
        return self.record.namespace.layout.layer_bytes


@dataclass(slots=True, eq=False)
class PinnedPage:
    """A sealed page that keeps its slot until `PageTable.unpin`, which must be called exactly once."""

    record: Page

    @property
    def slot(self) -> Slot:
        """Where the bytes are."""
        return self.record.slot

    @property
    def written_ms(self) -> float:
        """The time when a client wrote it, by the table's clock."""
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
        """The time when the page was last verified as intact; minus infinity if it never was."""
        return self.record.verified_ms

    def guard(self, begin: int, end: int) -> int:
        """Returns the checksum that a reader of bytes `[begin, end)`, whole layers, compares: the page's checksum for the whole
        page, else `range_checksum`.
        """
        if end - begin == self.record.slot.size_bytes:
            return self.record.checksum
        first, last = begin // self.layer_bytes, end // self.layer_bytes
        return range_checksum(self.record.layers[LAYER_CHECKSUM_BYTES * first : LAYER_CHECKSUM_BYTES * last])


@dataclass(frozen=True, slots=True)
class MatchOutcome:
    """`hits[i]` is the number of leading sealed pages of prefix i. `lease_id` is None and `lease_ms` is 0 if no lease was requested
    or nothing was found.
    """

    hits: tuple[int, ...]
    lease_id: bytes | None
    lease_ms: int
