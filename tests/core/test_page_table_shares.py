"""The share of a page table that one tenant may hold, whatever it does: another tenant always gets its part."""

from __future__ import annotations

from contextlib import suppress
from itertools import count

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from attnstore.core import lease as lease_module
from attnstore.core.layout import DType, PageLayout
from attnstore.core.page_table import ArrivingPage, PageTable, PinnedPage
from attnstore.errors import Overloaded
from attnstore.limits import LEASE_MS_MAX
from attnstore.types import PageStatus, Space

EXTENTS, EXTENT_BYTES, PAGE_BYTES = 8, 400, 100
GREEDY, MODEST = Space("greedy", b"n" * 32), Space("modest", b"n" * 32)
SIZES = [PAGE_BYTES, 200, 300, 400, 40, 60, 80, 102]
"""Pages of each size lie in their own extents."""
SPACES = [Space("greedy", bytes([size % 256]) * 32) for size in SIZES]


def layout(page_bytes: int) -> PageLayout:
    return PageLayout(layers=1, kv_heads=1, head_dim=page_bytes // 2, block_tokens=1, dtype=DType.OPAQUE)


def shared_table() -> PageTable:
    ids = count()
    table = PageTable(
        capacity_bytes=EXTENTS * EXTENT_BYTES,
        extent_bytes=EXTENT_BYTES,
        new_lease_id=lambda: next(ids).to_bytes(16, "big"),
        tenants=2,
    )
    for size, space in zip(SIZES, SPACES, strict=True):
        table.namespaces.register(space, layout(size))
    table.namespaces.register(MODEST, layout(PAGE_BYTES))
    return table


def page_hash(number: int) -> bytes:
    return number.to_bytes(32, "big")


def store(table: PageTable, space: Space, number: int, now_ms: float = 0.0) -> bool:
    page = table.prepare(space, page_hash(number), 0, now_ms)
    if isinstance(page, ArrivingPage):
        table.complete(page, now_ms)
    return isinstance(page, ArrivingPage)


def test_leases_renewed_for_ever_leave_memory_to_others() -> None:
    table = shared_table()
    for number in range(100):
        store(table, SPACES[0], number)
        try:
            found = table.match(SPACES[0], [[page_hash(number)]], LEASE_MS_MAX, 0.0)
        except Overloaded:
            continue
        if found.lease_id is not None:
            table.pins.renew("greedy", found.lease_id, LEASE_MS_MAX, 0.0)
    table.check()
    pages = EXTENTS // 4 * (EXTENT_BYTES // PAGE_BYTES)
    assert all(store(table, MODEST, number) for number in range(pages))
    assert table.match(MODEST, [[page_hash(number) for number in range(pages)]], LEASE_MS_MAX, 0.0).hits == (pages,)
    table.check()


def test_one_leased_page_in_each_extent_takes_no_more_than_a_share() -> None:
    table = shared_table()
    for number, space in enumerate(SPACES):
        store(table, space, number)
    leased = 0
    for number, space in enumerate(SPACES):
        try:
            table.match(space, [[page_hash(number)]], LEASE_MS_MAX, 0.0)
            leased += 1
        except Overloaded:
            break
    assert leased == 5  # two are guaranteed to each tenant, and of the other four a tenant leaves one
    assert store(table, MODEST, 0)
    table.check()


def test_what_is_over_the_share_changes_nothing() -> None:
    table = shared_table()
    for number, space in enumerate(SPACES):
        store(table, space, number)
    for number, space in enumerate(SPACES[:5]):
        assert isinstance(table.pin(space, page_hash(number), None, 0.0), PinnedPage)
    before = table.statistics()
    with pytest.raises(Overloaded, match="extents"):
        table.pin(SPACES[5], page_hash(5), None, 0.0)
    with pytest.raises(Overloaded, match="extents"):
        table.match(SPACES[5], [[page_hash(5)]], 100, 0.0)
    assert table.prepare(SPACES[5], page_hash(99), 0, 0.0) is PageStatus.NO_SPACE
    assert table.match(SPACES[5], [[page_hash(5)]], 0, 0.0).hits == (1,)
    after = table.statistics()
    assert (after.pages_sealed, after.pages_pinned, after.leases) == (before.pages_sealed, before.pages_pinned, before.leases)
    table.check()


def test_a_tenant_at_its_share_goes_on_in_the_extents_that_it_keeps_busy() -> None:
    table = shared_table()
    for number in range(EXTENTS):
        store(table, SPACES[number], number)
    for number in range(5):
        assert isinstance(table.pin(SPACES[number], page_hash(number), None, 0.0), PinnedPage)
    assert all(store(table, SPACES[0], number) for number in range(100, 110))
    table.check()


def test_leases_that_have_run_out_count_for_nothing() -> None:
    table = shared_table()
    for number, space in enumerate(SPACES):
        store(table, space, number)
    for number, space in enumerate(SPACES[:5]):
        table.match(space, [[page_hash(number)]], 100, 0.0)
    assert isinstance(table.pin(SPACES[5], page_hash(5), None, 100.0), PinnedPage)


def test_a_tenant_with_its_share_of_leases_leaves_some_to_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease_module, "LEASES_MAX", 40)
    table = shared_table()
    store(table, SPACES[0], 0)
    store(table, MODEST, 0)
    granted = 0
    with pytest.raises(Overloaded, match="40 leases"):  # noqa: PT012 - how many are granted is what is asked
        while True:
            table.match(SPACES[0], [[page_hash(0)]], 100, 0.0)
            granted += 1
    assert granted == 26
    for _ in range(10):
        assert table.match(MODEST, [[page_hash(0)]], 100, 0.0).lease_id


HOLDS = st.sampled_from(["arrive", "lease", "pin"])
STEPS = st.tuples(st.sampled_from(["arrive", "store", "lease", "pin", "abort", "unpin", "wait"]), st.integers(0, len(SPACES) - 1))


class Greedy:
    """A tenant that takes as much as it can get."""

    def __init__(self, table: PageTable) -> None:
        self.table = table
        self.now_ms = 0.0
        self._arriving: list[ArrivingPage] = []
        self._pinned: list[PinnedPage] = []

    def does(self, what: str, space: Space, number: int) -> None:
        table = self.table
        if what == "arrive" and isinstance(page := table.prepare(space, page_hash(number), 0, self.now_ms), ArrivingPage):
            self._arriving.append(page)
        elif what == "store":
            store(table, space, number, self.now_ms)
        elif what == "lease":
            table.match(space, [[page_hash(number)]], 100, self.now_ms)
        elif what == "pin" and isinstance(held := table.pin(space, page_hash(number), None, self.now_ms), PinnedPage):
            self._pinned.append(held)
        elif what == "abort" and self._arriving:
            table.abort(self._arriving.pop())
        elif what == "unpin" and self._pinned:
            table.unpin(self._pinned.pop())
        elif what == "wait":
            self.now_ms += 30.0


@settings(max_examples=200)
@given(st.lists(STEPS, max_size=30), st.lists(HOLDS, min_size=len(SPACES), max_size=len(SPACES)))
def test_whatever_one_tenant_does_another_has_its_guaranteed_memory(steps: list[tuple[str, int]], holds: list[str]) -> None:
    table = shared_table()
    greedy = Greedy(table)
    # Then it stores a page of each size, in its own extent, and keeps it in place by one of several means.
    keeps = [(what, which) for which, hold in enumerate(holds) for what in ("store", hold)]
    for what, which in [*steps, *keeps]:
        with suppress(Overloaded):
            greedy.does(what, SPACES[which], which)
        table.check()
    pages = EXTENTS // 4 * (EXTENT_BYTES // PAGE_BYTES)
    assert all(store(table, MODEST, number, greedy.now_ms) for number in range(pages))
    assert table.match(MODEST, [[page_hash(number) for number in range(pages)]], 100, greedy.now_ms).lease_id is not None
    table.check()
