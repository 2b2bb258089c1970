"""Deleted pages and hand-overs: which pages do not return, which may, and that no existing page is lost."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from attnstore.core import tombstones
from attnstore.core.layout import PageLayout
from attnstore.core.page_table import ArrivingPage, PageTable
from attnstore.core.tombstones import Tombstones
from attnstore.limits import TOMBSTONE_MARGIN_MS, TOMBSTONE_MS_MAX
from attnstore.types import PageStatus, Space

SPACE, STRANGERS = Space("a", b"n" * 32), Space("b", b"n" * 32)
PAGE_BYTES = 100
NOW_MS = 1_000_000.0
LONG_MS = 500_000


def name(number: int) -> bytes:
    return number.to_bytes(32, "big")


def arrive(table: PageTable, number: int, now_ms: float = NOW_MS, age_ms: float = 0) -> PageStatus:
    page = table.prepare(SPACE, name(number), 0, now_ms, age_ms)
    verdict = table.complete(page, now_ms) if isinstance(page, ArrivingPage) else page
    table.check()
    return verdict


def delete(table: PageTable, now_ms: float) -> PageStatus:
    """Deletes page 1."""
    [status] = table.delete(SPACE, [name(1)], now_ms)
    return status


def hits(table: PageTable, number: int) -> int:
    return table.match(SPACE, [[name(number)]], 0, NOW_MS).hits[0]


@pytest.fixture
def table(make_table: Callable[..., PageTable], layout_of_bytes: Callable[[int], PageLayout]) -> PageTable:
    """Four pages of one namespace."""
    table = make_table(4 * PAGE_BYTES)
    table.namespaces.register(SPACE, layout_of_bytes(PAGE_BYTES))
    return table


@pytest.mark.parametrize("was_here", [True, False])
def test_a_page_that_was_deleted_is_not_handed_over_again(table: PageTable, was_here: bool) -> None:
    if was_here:
        arrive(table, 1, NOW_MS - 10)
    assert delete(table, NOW_MS) is (PageStatus.OK if was_here else PageStatus.MISSING)
    assert arrive(table, 1, NOW_MS + 1, age_ms=LONG_MS) is PageStatus.DELETED
    assert not hits(table, 1)
    assert arrive(table, 2, NOW_MS + 1, age_ms=LONG_MS) is PageStatus.STORED


def test_a_page_that_was_deleted_while_it_was_handed_over_does_not_appear(table: PageTable) -> None:
    page = table.prepare(SPACE, name(1), 0, NOW_MS, LONG_MS)
    assert isinstance(page, ArrivingPage)
    assert delete(table, NOW_MS + 1) is PageStatus.MISSING
    assert table.complete(page, NOW_MS + 2) is PageStatus.DELETED
    table.check()
    assert not hits(table, 1)
    assert table.statistics().used_bytes == 0


def test_a_client_may_write_a_page_again_at_once_and_it_may_be_handed_over_then(table: PageTable) -> None:
    delete(table, NOW_MS)
    assert arrive(table, 1, NOW_MS) is PageStatus.STORED
    assert hits(table, 1)
    table.deleted_elsewhere(SPACE, name(1), NOW_MS - 1, NOW_MS)  # news of the earlier deletion
    assert hits(table, 1)


def test_a_page_that_was_written_long_enough_after_the_deletion_may_be_handed_over(table: PageTable) -> None:
    delete(table, NOW_MS)
    late_ms = NOW_MS + 2 * TOMBSTONE_MARGIN_MS
    assert arrive(table, 1, late_ms, age_ms=1.5 * TOMBSTONE_MARGIN_MS) is PageStatus.DELETED
    assert arrive(table, 1, late_ms, age_ms=0.5 * TOMBSTONE_MARGIN_MS) is PageStatus.STORED


def test_a_deletion_is_forgotten_in_time(table: PageTable) -> None:
    delete(table, NOW_MS)
    assert arrive(table, 1, NOW_MS + TOMBSTONE_MS_MAX, age_ms=2 * TOMBSTONE_MS_MAX) is PageStatus.STORED


def test_a_page_that_is_pinned_is_not_deleted_and_not_buried(table: PageTable) -> None:
    arrive(table, 1)
    pinned = table.pin(SPACE, name(1), None, NOW_MS)
    assert delete(table, NOW_MS) is PageStatus.PINNED
    assert not isinstance(pinned, PageStatus)
    table.unpin(pinned)
    assert arrive(table, 1, age_ms=LONG_MS) is PageStatus.ALREADY_PRESENT


def test_news_of_a_deletion_removes_what_was_written_before_also_where_it_was_handed_over(table: PageTable) -> None:
    arrive(table, 1, NOW_MS, age_ms=LONG_MS)
    arrive(table, 2, NOW_MS)
    for number in (1, 2, 3):
        table.deleted_elsewhere(SPACE, name(number), NOW_MS - LONG_MS / 2, NOW_MS)
        table.deleted_elsewhere(STRANGERS, name(number), NOW_MS, NOW_MS)  # a space that is not registered
    table.check()
    assert [hits(table, number) for number in (1, 2, 3)] == [0, 1, 0]
    assert arrive(table, 3, age_ms=LONG_MS) is PageStatus.DELETED


def test_what_is_handed_over_takes_free_memory_only_and_no_clients_page(table: PageTable) -> None:
    for number in range(3):
        arrive(table, number)
    assert arrive(table, 3, age_ms=1) is PageStatus.STORED
    assert arrive(table, 4, age_ms=1) is PageStatus.NO_SPACE
    assert [hits(table, number) for number in range(5)] == [1, 1, 1, 1, 0]
    assert arrive(table, 4) is PageStatus.STORED, "a client's write evicts"


def test_what_is_handed_over_does_not_pass_or_empty_a_quota(table: PageTable) -> None:
    table.quotas.limit({"a": 2 * PAGE_BYTES})
    arrive(table, 1)
    assert arrive(table, 2, age_ms=1) is PageStatus.STORED
    assert arrive(table, 3, age_ms=1) is PageStatus.NO_SPACE
    assert [hits(table, number) for number in (1, 2)] == [1, 1]


def test_pages_sealed_after_a_number_of_pages_are_listed_alone(table: PageTable) -> None:
    arrive(table, 1)
    before = table.statistics().stored_pages
    arrive(table, 2)
    arrive(table, 3, age_ms=1)
    for after, listed in ((0, [1, 2, 3]), (before, [2, 3]), (before + 2, [])):
        assert [page.hash for page in table.pages_in(0) if page.number > after] == [name(number) for number in listed]


def test_a_tenant_that_deletes_a_lot_makes_the_node_forget_its_own_deletions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tombstones, "TOMBSTONES_MAX", 10)
    remembered = Tombstones()
    remembered.add(STRANGERS, name(0), NOW_MS, NOW_MS)
    for number in range(100):
        remembered.add(SPACE, name(number), NOW_MS, NOW_MS)
        remembered.check()
    assert len(remembered) == 10
    assert remembered.cover(STRANGERS, name(0), NOW_MS, NOW_MS)
    assert not remembered.cover(SPACE, name(0), NOW_MS, NOW_MS)
    assert remembered.cover(SPACE, name(99), NOW_MS, NOW_MS)
    remembered.add(SPACE, name(1), NOW_MS + TOMBSTONE_MS_MAX, NOW_MS + TOMBSTONE_MS_MAX)
    assert len(remembered) == 2, "those that are too old go with the next"
