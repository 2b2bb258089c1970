"""The store with several threads: extents change tenants safely, and its counters are exact."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from typing import NoReturn

import pytest

from attnstore.arena import MemoryArena
from attnstore.core.hashing import page_checksum
from attnstore.core.layout import DType, PageLayout
from attnstore.core.page_table import PageTable
from attnstore.core.slots import Slot
from attnstore.errors import Overloaded
from attnstore.server import pinned_views
from attnstore.server.pinned_views import Arrival
from attnstore.server.store import Store
from attnstore.telemetry import NodeMetrics
from attnstore.testing import ManualClock
from attnstore.types import PageEvent, PageEventKind, PageStatus, Space

LAYOUT = PageLayout(layers=1, kv_heads=1, head_dim=2048, block_tokens=1, dtype=DType.OPAQUE)
SIZE = LAYOUT.page_bytes
SLOTS = 16


class FaultyArena(MemoryArena):
    """Fails once it has returned `left` views, until `left` is set again."""

    left = -1

    def view(self, slot: Slot) -> memoryview:
        self.left -= 1
        if self.left == -1:
            raise Overloaded("no memory for the extent of a new tenant")
        return super().view(slot)


def make_store(
    publish: Callable[[list[tuple[Space, PageEvent]]], None] = lambda events: None,  # noqa: ARG005
    arena: type[MemoryArena] = MemoryArena,
) -> Store:
    ids = count()
    table = PageTable(capacity_bytes=SLOTS * SIZE, extent_bytes=SLOTS * SIZE, new_lease_id=lambda: next(ids).to_bytes(16, "big"))
    return Store(table, arena(SLOTS * SIZE, SLOTS * SIZE), ManualClock(), publish)  # type: ignore[arg-type]


def fill(store: Store, space: Space, page_hash: bytes, page: bytes) -> PageStatus:
    arriving = store.prepare(space, page_hash, page_checksum(page))
    if isinstance(arriving, PageStatus):
        return arriving
    arriving.data[:] = page
    return store.seal(arriving)


@pytest.fixture
def faulty() -> Iterator[tuple[Store, FaultyArena, Space]]:
    """A store whose arena can fail, with four pages in it; at the end no page is arriving or pinned."""
    store = make_store(arena=FaultyArena)
    arena = store._arena
    assert isinstance(arena, FaultyArena)
    space = Space("default", b"n" * 32)
    store.spaces.register(space, LAYOUT)
    for number in range(4):
        assert fill(store, space, name(number), bytes(SIZE)) is PageStatus.STORED
    yield store, arena, space
    store._table.check()
    now = store.statistics()
    assert (now.pages_sealed, now.pages_arriving, now.pages_pinned) == (4, 0, 0)


def name(number: int) -> bytes:
    return bytes([number]) * 32


def test_a_page_for_which_there_is_no_memory_does_not_arrive_for_ever(faulty: tuple[Store, FaultyArena, Space]) -> None:
    store, arena, space = faulty
    arena.left = 0
    with pytest.raises(Overloaded):
        store.prepare(space, name(9), 0)
    assert fill(store, space, name(9), bytes(SIZE)) is PageStatus.STORED
    store.spaces.delete(space, [name(9)])


def test_a_page_whose_events_cannot_be_told_does_not_arrive_for_ever() -> None:
    is_closed = False

    def publish(_events: object) -> None:
        if is_closed:
            raise RuntimeError("the loop is closed")

    store = make_store(publish)
    space = Space("default", b"n" * 32)
    store.spaces.register(space, LAYOUT)
    for number in range(SLOTS):
        fill(store, space, name(number), bytes(SIZE))
    is_closed = True
    with pytest.raises(RuntimeError):
        store.prepare(space, name(SLOTS), 0)  # evicts a page, which must be reported
    assert store.statistics().pages_arriving == 0


@pytest.mark.parametrize("end", ["seal", "fill"])
def test_a_page_that_cannot_be_hashed_when_it_ends_is_aborted(
    faulty: tuple[Store, FaultyArena, Space], end: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, _, space = faulty
    page = store.prepare(space, name(9), 0)
    assert isinstance(page, Arrival)
    monkeypatch.setattr("attnstore.server.store.checksums" if end == "seal" else "attnstore.server.store.copy", out_of_memory)
    with pytest.raises(MemoryError):
        store.seal(page) if end == "seal" else store.fill(page, 0)


def out_of_memory(*_arguments: object) -> NoReturn:
    raise MemoryError


def test_a_reader_that_is_refused_in_the_middle_lets_go_of_what_it_has(
    faulty: tuple[Store, FaultyArena, Space], monkeypatch: pytest.MonkeyPatch
) -> None:
    store, arena, space = faulty
    monkeypatch.setattr(pinned_views, "_PINS_PER_LOCK", 2)
    for left in range(4):
        for read in (
            lambda: store.pin_all(space, [name(number) for number in range(4)], None),
            lambda: store.reading_all(space, [name(number) for number in (0, 1, 0, 2)], None).__enter__(),
        ):
            arena.left = left
            with pytest.raises(Overloaded):
                read()
            assert store.statistics().pages_pinned == 0


def test_threads_that_share_a_new_extent_do_not_wipe_each_others_pages() -> None:
    store = make_store()
    tenants = [Space(str(number), b"n" * 32) for number in range(2)]
    for space in tenants:
        store.spaces.register(space, LAYOUT)
    with ThreadPoolExecutor(4) as pool:
        for turn in range(40):
            # The extent alternates between the tenants and is wiped each time.
            space = tenants[turn % 2]
            hashes = [bytes([turn, number]) * 16 for number in range(SLOTS)]
            pages = [bytes([number + 1]) * SIZE for number in range(SLOTS)]
            verdicts = list(pool.map(fill, [store] * SLOTS, [space] * SLOTS, hashes, pages))
            assert verdicts == [PageStatus.STORED] * SLOTS
            for page_hash, page in zip(hashes, pages, strict=True):
                with store.reading_all(space, [page_hash], None) as [found]:
                    assert not isinstance(found, PageStatus)
                    assert found.data == page
            store.spaces.delete(space, hashes)


def test_events_are_published_in_the_order_in_which_they_happened() -> None:
    seen: list[PageEvent] = []
    store = make_store(lambda events: seen.extend(event for _, event in events))
    space = Space("default", b"n" * 32)
    store.spaces.register(space, LAYOUT)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda number: fill(store, space, bytes([number]) * 32, bytes(SIZE)), range(3 * SLOTS)))
    assert [event.sequence for event in seen] == list(range(1, len(seen) + 1))
    assert sum(event.kind is PageEventKind.SEALED for event in seen) == store.statistics().stored_pages == 3 * SLOTS
    assert store.statistics().stored_bytes == 3 * SLOTS * SIZE


def test_bytes_are_counted_exactly_whatever_thread_counts_them() -> None:
    metrics = NodeMetrics(make_store().statistics)

    def work(_number: int) -> None:
        for _ in range(2_000):
            metrics.sent("tcp", 2, 3)
            metrics.received("tcp", 5)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(8)))
    assert (metrics.read_pages, metrics.read_bytes) == (8 * 2_000 * 2, 8 * 2_000 * 3)
    assert metrics.registry.get_sample_value("attnstore_sent_bytes_total", {"transport": "tcp"}) == metrics.read_bytes
    assert metrics.registry.get_sample_value("attnstore_received_bytes_total", {"transport": "tcp"}) == 8 * 2_000 * 5
