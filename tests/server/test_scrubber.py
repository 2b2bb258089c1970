"""Rehashing pages: the order of tenants, the cost of a report, and the effect on the event loop."""

from __future__ import annotations

import asyncio
import threading
from itertools import count

import pytest

from attnstore.arena import MemoryArena
from attnstore.core.hashing import page_checksum
from attnstore.core.layout import DType, PageLayout
from attnstore.core.page_table import PageTable
from attnstore.errors import InvalidArgument, Overloaded, Unavailable
from attnstore.limits import REPORTED_HASHES_MAX
from attnstore.server.pinned_views import Arrival, PageView
from attnstore.server.scrubber import Scrubber
from attnstore.server.store import Store
from attnstore.testing import ManualClock
from attnstore.types import PageStatus, Space

LAYOUT = PageLayout(layers=2, kv_heads=1, head_dim=512, block_tokens=1, dtype=DType.OPAQUE)
SIZE = LAYOUT.page_bytes
PAGES = 8
ADA, BOB = Space("ada", b"n" * 32), Space("bob", b"n" * 32)
OK, MISSING = PageStatus.OK, PageStatus.MISSING


def name(number: int) -> bytes:
    return number.to_bytes(32, "big")


class GatedStore(Store):
    """Reports which page is hashed, and hashes it when the test allows it."""

    def __init__(self) -> None:
        ids = count()
        capacity_bytes = 4 * PAGES * SIZE
        table = PageTable(
            capacity_bytes=capacity_bytes, extent_bytes=PAGES * SIZE, new_lease_id=lambda: next(ids).to_bytes(16, "big")
        )
        super().__init__(table, MemoryArena(capacity_bytes, PAGES * SIZE), ManualClock(), lambda _events: None)
        self.open = threading.Event()
        self.hashed: list[tuple[str, int]] = []
        self.threads: set[str] = set()

    def is_intact(self, view: PageView, within_ms: float = 0.0) -> bool:
        record = view.page.record
        self.hashed.append((record.namespace.space.tenant, int.from_bytes(record.hash, "big")))
        self.threads.add(threading.current_thread().name)
        assert self.open.wait(20)
        return super().is_intact(view, within_ms)


def filled(space: Space, store: Store | None = None) -> GatedStore:
    store = store or GatedStore()
    assert isinstance(store, GatedStore)
    store.spaces.register(space, LAYOUT)
    for number in range(PAGES):
        page = bytes([number + 1]) * SIZE
        arriving = store.prepare(space, name(number), page_checksum(page))
        assert isinstance(arriving, Arrival)
        arriving.data[:] = page
        assert store.seal(arriving) is PageStatus.STORED
    return store


def flip(store: Store, space: Space, number: int) -> None:
    view = store.peek(space, name(number))
    assert view is not None
    view.data[SIZE - 1] ^= 1


def test_reports_of_two_tenants_take_turns_and_neither_hashes_on_the_loop() -> None:
    async def run() -> None:
        store = filled(BOB, filled(ADA))
        scrubber = Scrubber(store, 0)
        flip(store, BOB, 1)
        adas = asyncio.create_task(scrubber.verify(ADA, [name(number) for number in range(PAGES)]))
        await asyncio.sleep(0)
        bobs = asyncio.create_task(scrubber.verify(BOB, [name(0), name(1), name(99)]))
        await asyncio.sleep(0)
        store.open.set()
        assert await bobs == [OK, MISSING, MISSING]
        assert await adas == [OK] * PAGES
        assert [tenant for tenant, _ in store.hashed][:5] == ["ada", "bob", "ada", "bob", "ada"]
        assert threading.current_thread().name not in store.threads
        assert len(store.threads) == 1
        assert store.peek(BOB, name(1)) is None
        await scrubber.stop()

    asyncio.run(run())


def test_a_tenant_has_one_report_at_a_time_of_a_bounded_number_of_pages() -> None:
    async def run() -> None:
        store = filled(ADA)
        scrubber = Scrubber(store, 0)
        first = asyncio.create_task(scrubber.verify(ADA, [name(0)]))
        await asyncio.sleep(0)
        with pytest.raises(Overloaded):
            await scrubber.verify(ADA, [name(1)])
        store.open.set()
        assert await first == [OK]
        assert await scrubber.verify(ADA, [name(1)]) == [OK]
        with pytest.raises(InvalidArgument):
            await scrubber.verify(ADA, [name(0)] * (REPORTED_HASHES_MAX + 1))
        await scrubber.stop()
        with pytest.raises(Unavailable):
            await scrubber.verify(ADA, [name(0)])

    asyncio.run(run())


def test_the_walk_hashes_every_page_and_drops_what_has_changed() -> None:
    async def run() -> None:
        store = filled(BOB, filled(ADA))
        store.open.set()
        flip(store, ADA, 3)
        scrubber = Scrubber(store, SIZE * 10_000)
        scrubber.start()
        while len(store.hashed) < 2 * PAGES:
            await asyncio.sleep(0.001)
        await scrubber.stop()
        assert set(store.hashed) == {(tenant, number) for tenant in ("ada", "bob") for number in range(PAGES)}
        now = store.statistics()
        assert (now.corrupt_pages, now.pages_sealed, now.pages_pinned) == (1, 2 * PAGES - 1, 0)
        assert store.peek(ADA, name(3)) is None

    asyncio.run(run())


def test_a_rate_of_nothing_starts_nothing() -> None:
    async def run() -> None:
        scrubber = Scrubber(filled(ADA), 0)
        scrubber.start()
        assert len(asyncio.all_tasks()) == 1
        await scrubber.stop()

    asyncio.run(run())
