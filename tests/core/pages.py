"""Pages, spaces and what tests of the page table do with them."""

from __future__ import annotations

from collections.abc import Callable

from attnstore.core.layout import PageLayout
from attnstore.core.page_table import ArrivingPage, PageTable, PinnedPage
from attnstore.core.slots import Slot
from attnstore.core.statistics import SpaceStatistics
from attnstore.types import PageEventKind, Space

MakeTable = Callable[..., PageTable]
MakeLayout = Callable[[int], PageLayout]

SPACE, OTHER, STRANGERS = Space("a", b"n" * 32), Space("a", b"o" * 32), Space("b", b"n" * 32)
PAGE_BYTES = 100


def all_spaces(table: PageTable) -> list[SpaceStatistics]:
    return table.namespaces.statistics([record.space for record in table.namespaces])


def page_hash(number: int) -> bytes:
    return number.to_bytes(32, "big")


def prepare(table: PageTable, number: int, space: Space = SPACE, now_ms: float = 0.0) -> ArrivingPage:
    page = table.prepare(space, page_hash(number), number, now_ms)
    assert isinstance(page, ArrivingPage), page
    return page


def store(table: PageTable, number: int, space: Space = SPACE, now_ms: float = 0.0) -> Slot:
    page = prepare(table, number, space, now_ms)
    table.complete(page, now_ms)
    table.check()
    return page.slot


def pin(table: PageTable, number: int, space: Space = SPACE) -> PinnedPage:
    page = table.pin(space, page_hash(number), None, 0.0)
    assert isinstance(page, PinnedPage), page
    return page


def present(table: PageTable, numbers: range, space: Space = SPACE) -> list[int]:
    """Returns the sealed pages, without touching any of them through the events or the order of eviction."""
    events = table.take_events()
    alive: dict[int, None] = {}
    for owner, event in events:
        number = int.from_bytes(event.hash, "big")
        if owner == space and event.kind is PageEventKind.SEALED:
            alive[number] = None
        elif owner == space:
            alive.pop(number, None)
    return [number for number in numbers if number in alive]
