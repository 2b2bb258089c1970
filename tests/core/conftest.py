"""A page table of a few pages, and names for its contents."""

from __future__ import annotations

from collections.abc import Callable
from itertools import count

import pytest
from hypothesis import settings

from attnstore.core.layout import DType, PageLayout
from attnstore.core.page_table import PageTable
from tests.core.pages import (
    PAGE_BYTES,
    SPACE,
    STRANGERS,
    MakeLayout,
    MakeTable,
)

# The same examples in every run, and no failure because the machine is slow.
settings.register_profile("attnstore", deadline=None, derandomize=True)
settings.load_profile("attnstore")


@pytest.fixture
def make_table() -> MakeTable:
    """`make_table(capacity_bytes, extent_bytes)`: lease ids count up from 0."""

    def make(capacity_bytes: int, extent_bytes: int | None = None) -> PageTable:
        ids = count()
        return PageTable(
            capacity_bytes=capacity_bytes,
            extent_bytes=extent_bytes or capacity_bytes,
            new_lease_id=lambda: next(ids).to_bytes(16, "big"),
        )

    return make


@pytest.fixture
def layout_of_bytes() -> Callable[[int], PageLayout]:
    """A layout whose page has the given, even, number of bytes."""

    def make(page_bytes: int) -> PageLayout:
        return PageLayout(layers=1, kv_heads=1, head_dim=page_bytes // 2, block_tokens=1, dtype=DType.OPAQUE)

    return make


@pytest.fixture
def table(make_table: MakeTable, layout_of_bytes: MakeLayout) -> PageTable:
    """Four pages of one namespace in one extent."""
    table = make_table(4 * PAGE_BYTES)
    assert table.namespaces.register(SPACE, layout_of_bytes(PAGE_BYTES)) == 4
    return table


@pytest.fixture
def shared_table(make_table: MakeTable, layout_of_bytes: MakeLayout) -> PageTable:
    """Two tenants with a namespace each, and two extents of two pages."""
    table = make_table(4 * PAGE_BYTES, 2 * PAGE_BYTES)
    table.namespaces.register(SPACE, layout_of_bytes(PAGE_BYTES))
    table.namespaces.register(STRANGERS, layout_of_bytes(PAGE_BYTES))
    return table
