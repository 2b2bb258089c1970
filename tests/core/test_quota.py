"""Quotas: a tenant at its quota evicts its own pages, never another tenant's."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from attnstore import PageLayout, PageStatus
from attnstore.core.page import PageState
from attnstore.core.page_table import ArrivingPage, PageTable
from attnstore.types import Space

PAGE_BYTES = 64
MINE, YOURS, LARGE = Space("me", b"m" * 32), Space("you", b"y" * 32), Space("me", b"l" * 32)


@pytest.fixture
def table(make_table: Callable[..., PageTable], layout_of_bytes: Callable[[int], PageLayout]) -> PageTable:
    """Sixteen extents of four pages; two tenants, the first with pages of two sizes."""
    table = make_table(64 * PAGE_BYTES, 4 * PAGE_BYTES)
    table.namespaces.register(MINE, layout_of_bytes(PAGE_BYTES))
    table.namespaces.register(LARGE, layout_of_bytes(2 * PAGE_BYTES))
    table.namespaces.register(YOURS, layout_of_bytes(PAGE_BYTES))
    return table


def name(number: int) -> bytes:
    return number.to_bytes(32, "big")


def store(table: PageTable, space: Space, number: int) -> PageStatus:
    page = table.prepare(space, name(number), 0, 0.0)
    table.check()
    if isinstance(page, ArrivingPage):
        table.complete(page, 0.0)
        return PageStatus.STORED
    return page


def held(table: PageTable, space: Space) -> list[int]:
    pages = [page for extent in range(table.extents) for page in table.pages_in(extent) if page.namespace.space == space]
    return sorted(int.from_bytes(page.hash, "big") for page in pages if page.state is PageState.SEALED)


def test_a_tenant_over_its_quota_loses_its_own_oldest_pages_and_nobody_elses(table: PageTable) -> None:
    table.quotas.limit({"me": 3 * PAGE_BYTES})
    for number in range(5):
        assert store(table, YOURS, number) is PageStatus.STORED
    for number in range(5):
        assert store(table, MINE, number) is PageStatus.STORED
    assert held(table, MINE) == [2, 3, 4]
    assert held(table, YOURS) == [0, 1, 2, 3, 4]


def test_pages_of_all_sizes_of_a_tenant_count_together(table: PageTable) -> None:
    table.quotas.limit({"me": 3 * PAGE_BYTES})
    assert store(table, LARGE, 0) is PageStatus.STORED
    assert store(table, MINE, 1) is PageStatus.STORED
    assert store(table, MINE, 2) is PageStatus.STORED
    assert (held(table, LARGE), held(table, MINE)) == ([0], [2])
    assert store(table, LARGE, 3) is PageStatus.STORED
    assert (held(table, LARGE), held(table, MINE)) == ([3], [2])


def test_a_tenant_whose_pages_are_all_pinned_is_refused_one_more_and_keeps_what_it_has(table: PageTable) -> None:
    table.quotas.limit({"me": 2 * PAGE_BYTES})
    store(table, MINE, 0)
    store(table, MINE, 1)
    assert table.match(MINE, [[name(0), name(1)]], 1_000, 0.0).lease_id is not None
    assert store(table, MINE, 2) is PageStatus.NO_SPACE
    assert held(table, MINE) == [0, 1]


def test_a_quota_smaller_than_a_page_stores_nothing(table: PageTable) -> None:
    table.quotas.limit({"me": PAGE_BYTES - 1})
    assert store(table, MINE, 0) is PageStatus.NO_SPACE


def test_a_quota_that_is_lifted_bounds_nobody(table: PageTable) -> None:
    table.quotas.limit({"me": PAGE_BYTES})
    table.quotas.limit({})
    for number in range(8):
        store(table, MINE, number)
    assert len(held(table, MINE)) == 8


def test_pages_that_are_aborted_count_no_more(table: PageTable) -> None:
    table.quotas.limit({"me": PAGE_BYTES})
    for number in range(3):
        page = table.prepare(MINE, name(number), 0, 0.0)
        assert isinstance(page, ArrivingPage)
        table.abort(page)
        table.check()
    assert store(table, MINE, 9) is PageStatus.STORED
