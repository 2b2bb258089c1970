"""The page table's namespaces: registration, tenants, layouts, and which namespace is forgotten for another."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from attnstore.core import namespaces as namespaces_module
from attnstore.core.page_table import PageTable
from attnstore.errors import InvalidArgument, LayoutMismatch, NamespaceUnknown, Overloaded
from attnstore.limits import NAMESPACE_EMPTY_MS_MAX, NAMESPACES_MAX
from attnstore.types import PageStatus, Space
from tests.core.pages import (
    OTHER,
    PAGE_BYTES,
    SPACE,
    STRANGERS,
    MakeLayout,
    MakeTable,
    page_hash,
    prepare,
    store,
)


def test_registering_is_idempotent(table: PageTable, layout_of_bytes: MakeLayout) -> None:
    assert table.namespaces.register(SPACE, layout_of_bytes(PAGE_BYTES)) == 4
    assert table.namespaces.find(SPACE).layout == layout_of_bytes(PAGE_BYTES)


def test_a_namespace_is_refused_with_another_layout(table: PageTable, layout_of_bytes: MakeLayout) -> None:
    with pytest.raises(LayoutMismatch, match="registered with"):
        table.namespaces.register(SPACE, layout_of_bytes(PAGE_BYTES - 2))


def test_one_namespace_of_two_tenants_is_two_spaces_which_share_nothing(shared_table: PageTable) -> None:
    table = shared_table
    mine = store(table, 1, SPACE)
    assert table.match(STRANGERS, [[page_hash(1)]], 100, 0.0).hits == (0,)
    assert table.pin(STRANGERS, page_hash(1), None, 0.0) is PageStatus.MISSING
    assert table.delete(STRANGERS, [page_hash(1)], 0.0) == [PageStatus.MISSING]
    theirs = store(table, 1, STRANGERS)
    assert mine.extent != theirs.extent
    assert [(space, event.hash) for space, event in table.take_events()] == [(SPACE, page_hash(1)), (STRANGERS, page_hash(1))]
    assert table.delete(STRANGERS, [page_hash(1)], 0.0) == [PageStatus.OK]
    assert table.match(SPACE, [[page_hash(1)]], 0, 0.0).hits == (1,)
    table.check()


def test_a_layout_of_its_own_may_go_with_another_tenants_namespace(table: PageTable, layout_of_bytes: MakeLayout) -> None:
    table.namespaces.register(STRANGERS, layout_of_bytes(PAGE_BYTES - 2))
    assert (table.namespaces.find(SPACE).layout, table.namespaces.find(STRANGERS).layout) == (
        layout_of_bytes(PAGE_BYTES),
        layout_of_bytes(PAGE_BYTES - 2),
    )


def test_a_page_that_fits_no_extent_is_refused(table: PageTable, layout_of_bytes: MakeLayout) -> None:
    with pytest.raises(InvalidArgument, match="raise the capacity"):
        table.namespaces.register(OTHER, layout_of_bytes(402))
    with pytest.raises(NamespaceUnknown):
        table.namespaces.find(OTHER)


def test_an_unknown_namespace_is_refused_everywhere(table: PageTable) -> None:
    calls: list[Callable[[], object]] = [
        lambda: table.namespaces.find(OTHER).layout,
        lambda: table.match(OTHER, [], 0, 0.0),
        lambda: table.pin(OTHER, page_hash(1), None, 0.0),
        lambda: table.prepare(OTHER, page_hash(1), 1, 0.0),
        lambda: table.delete(OTHER, [page_hash(1)], 0.0),
    ]
    for call in calls:
        with pytest.raises(NamespaceUnknown, match="RegisterLayout"):
            call()


def test_a_namespace_without_pages_makes_room_for_another(table: PageTable, layout_of_bytes: MakeLayout) -> None:
    layout = layout_of_bytes(PAGE_BYTES)
    store(table, 1)
    for number in range(NAMESPACES_MAX + 5):
        table.namespaces.register(Space("b", page_hash(number)), layout)
    known = [record.space for record in table.namespaces]
    assert len(known) == NAMESPACES_MAX
    assert SPACE in known
    assert Space("b", page_hash(NAMESPACES_MAX + 4)) in known
    with pytest.raises(NamespaceUnknown):
        table.namespaces.find(Space("b", page_hash(0)))
    table.check()


def test_a_namespace_with_pages_is_never_forgotten_for_another(
    make_table: MakeTable, layout_of_bytes: MakeLayout, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(namespaces_module, "NAMESPACES_MAX", 2)
    table = make_table(400)
    for number, space in enumerate((SPACE, OTHER)):
        table.namespaces.register(space, layout_of_bytes(PAGE_BYTES))
        prepare(table, number, space)
    with pytest.raises(Overloaded, match="2 namespaces with pages"):
        table.namespaces.register(STRANGERS, layout_of_bytes(PAGE_BYTES))
    table.check()


def test_a_namespace_without_pages_is_forgotten_by_age_with_its_class(make_table: MakeTable, layout_of_bytes: MakeLayout) -> None:
    table = make_table(400)
    table.namespaces.register(SPACE, layout_of_bytes(PAGE_BYTES))
    table.namespaces.register(OTHER, layout_of_bytes(50))
    page = prepare(table, 1, OTHER)
    table.namespaces.forget_empty(0.0)
    table.namespaces.forget_empty(NAMESPACE_EMPTY_MS_MAX)
    assert [record.space for record in table.namespaces] == [OTHER]
    table.abort(page)
    table.namespaces.forget_empty(NAMESPACE_EMPTY_MS_MAX)
    table.namespaces.forget_empty(2 * NAMESPACE_EMPTY_MS_MAX - 1)
    assert table.namespaces.find(OTHER).layout == layout_of_bytes(50)
    table.namespaces.forget_empty(2 * NAMESPACE_EMPTY_MS_MAX)
    assert [record.space for record in table.namespaces] == []
    table.check()
    table.namespaces.register(OTHER, layout_of_bytes(PAGE_BYTES))
    table.complete(prepare(table, 1, OTHER), 0.0)
    table.check()


def test_a_tenants_own_empty_namespace_goes_before_anothers(
    make_table: MakeTable, layout_of_bytes: MakeLayout, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(namespaces_module, "NAMESPACES_MAX", 3)
    table = make_table(400)
    for space in (STRANGERS, SPACE, OTHER, Space("a", b"p" * 32)):
        table.namespaces.register(space, layout_of_bytes(PAGE_BYTES))
    assert [record.space for record in table.namespaces] == [STRANGERS, OTHER, Space("a", b"p" * 32)]
