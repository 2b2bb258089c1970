"""Leases: which pages they hold, when they end, and that an expired lease is never honoured."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from attnstore.core import lease as lease_module
from attnstore.core.layout import PageLayout
from attnstore.core.page_table import ArrivingPage, PageTable, PinnedPage
from attnstore.errors import LeaseExpired, Overloaded
from attnstore.limits import LEASE_MS_MAX, LEASES_MAX
from attnstore.types import PageStatus, Space

SPACE, OTHER = Space("a", b"n" * 32), Space("a", b"o" * 32)
HASHES = [bytes([number]) * 32 for number in range(4)]


@pytest.fixture
def table(make_table: Callable[..., PageTable], layout_of_bytes: Callable[[int], PageLayout]) -> PageTable:
    """A full table of four pages."""
    return filled(make_table(400), layout_of_bytes(100))


def filled(table: PageTable, layout: PageLayout) -> PageTable:
    for space in (SPACE, OTHER):
        table.namespaces.register(space, layout)
    for page_hash in HASHES:
        page = table.prepare(SPACE, page_hash, 0, 0.0)
        assert isinstance(page, ArrivingPage)
        table.complete(page, 0.0)
    return table


def lease(table: PageTable, *numbers: int, lease_ms: int = 100, now_ms: float = 0.0) -> bytes:
    outcome = table.match(SPACE, [[HASHES[number] for number in numbers]], lease_ms, now_ms)
    assert outcome.lease_id is not None
    table.check()
    return outcome.lease_id


def test_a_match_without_a_lease_or_without_a_hit_grants_none(table: PageTable) -> None:
    for prefixes, lease_ms in [([HASHES], 0), ([[b"?" * 32]], 100), ([], 100)]:
        outcome = table.match(SPACE, prefixes, lease_ms, 0.0)
        assert (outcome.lease_id, outcome.lease_ms) == (None, 0)
    assert table.statistics().leases == 0


def test_a_lease_longer_than_the_maximum_is_granted_the_maximum(table: PageTable) -> None:
    outcome = table.match(SPACE, [HASHES], LEASE_MS_MAX + 1, 0.0)
    assert outcome.lease_ms == LEASE_MS_MAX
    assert table.pins.expire(0.0) == LEASE_MS_MAX


@pytest.mark.parametrize("prefixes", [[(0, 0)], [(0, 1, 0, 2, 0)], [(0, 1), (0, 1)], [(0,)] * 3])
def test_a_lease_over_pages_that_are_named_several_times_gives_all_of_them_back(
    table: PageTable, prefixes: list[tuple[int, ...]]
) -> None:
    outcome = table.match(SPACE, [[HASHES[number] for number in numbers] for numbers in prefixes], 100, 0.0)
    table.check()
    assert outcome.lease_id is not None
    assert table.statistics().pages_pinned == len({number for numbers in prefixes for number in numbers})
    assert table.pins.release("a", outcome.lease_id, 1.0)
    table.check()
    assert table.statistics().pages_pinned == 0


def test_a_lease_over_prefixes_that_share_pages_holds_each_page_once(table: PageTable) -> None:
    outcome = table.match(SPACE, [HASHES[:3], HASHES[:2], HASHES[:1]], 100, 0.0)
    table.check()
    assert table.statistics().pages_pinned == 3
    assert outcome.lease_id is not None
    assert table.pins.release("a", outcome.lease_id, 1.0)
    assert table.statistics().pages_pinned == 0


def test_a_page_stays_pinned_until_the_last_of_its_leases_and_readers_is_gone(table: PageTable) -> None:
    first, second = lease(table, 0), lease(table, 0, 1)
    reader = table.pin(SPACE, HASHES[0], first, 0.0)
    assert isinstance(reader, PinnedPage)
    for end in (
        lambda: table.pins.release("a", first, 1.0),
        lambda: table.pins.release("a", second, 1.0),
        lambda: table.unpin(reader),
    ):
        assert table.delete(SPACE, [HASHES[0]], 1.0) == [PageStatus.PINNED]
        end()
        table.check()
    assert table.delete(SPACE, [HASHES[0]], 1.0) == [PageStatus.OK]


def test_a_lease_ends_exactly_at_its_time(table: PageTable) -> None:
    lease_id = lease(table, 0)
    assert isinstance(table.pin(SPACE, HASHES[0], lease_id, 99.9), PinnedPage)
    assert table.pin(SPACE, HASHES[0], lease_id, 100.0) is PageStatus.LEASE_EXPIRED


def test_an_expired_lease_is_not_honoured_although_nobody_swept(table: PageTable) -> None:
    lease_id = lease(table, 0)
    assert table.statistics().leases == 1
    assert table.pin(SPACE, HASHES[0], lease_id, 100.0) is PageStatus.LEASE_EXPIRED
    with pytest.raises(LeaseExpired, match="match again"):
        table.pins.renew("a", lease_id, 100, 100.0)
    assert not table.pins.release("a", lease_id, 100.0)


def test_an_expired_lease_protects_no_page_although_nobody_swept(table: PageTable) -> None:
    lease(table, 0)
    assert table.delete(SPACE, [HASHES[0]], 99.9) == [PageStatus.PINNED]
    assert table.delete(SPACE, [HASHES[0]], 100.0) == [PageStatus.OK]


def test_an_expired_lease_says_so_even_where_the_page_is_gone(table: PageTable) -> None:
    lease_id = lease(table, 0)
    table.delete(SPACE, [HASHES[0]], 100.0)
    assert table.pin(SPACE, HASHES[0], lease_id, 101.0) is PageStatus.LEASE_EXPIRED


def test_an_unknown_lease_and_one_of_another_namespace_count_as_expired(table: PageTable) -> None:
    page = table.prepare(OTHER, HASHES[0], 0, 0.0)
    assert isinstance(page, ArrivingPage)
    table.complete(page, 0.0)
    assert table.pin(OTHER, HASHES[0], lease(table, 1), 1.0) is PageStatus.LEASE_EXPIRED
    assert table.pin(OTHER, HASHES[0], b"?" * 16, 1.0) is PageStatus.LEASE_EXPIRED
    assert not table.pins.release("a", b"?" * 16, 1.0)


def test_a_lease_is_neither_renewed_nor_released_by_another_tenant(table: PageTable) -> None:
    lease_id = lease(table, 0)
    with pytest.raises(LeaseExpired):
        table.pins.renew("b", lease_id, LEASE_MS_MAX, 1.0)
    assert not table.pins.release("b", lease_id, 1.0)
    assert table.statistics().leases == 1
    assert table.pins.expire(1.0) == 100.0


def test_a_reader_keeps_the_page_when_its_lease_expires_under_it(table: PageTable) -> None:
    reader = table.pin(SPACE, HASHES[0], lease(table, 0), 0.0)
    assert isinstance(reader, PinnedPage)
    table.pins.expire(100.0)
    assert table.delete(SPACE, [HASHES[0]], 100.0) == [PageStatus.PINNED]
    table.unpin(reader)
    table.check()


def test_renewing_extends_and_never_shortens(table: PageTable) -> None:
    lease_id = lease(table, 0)
    assert table.pins.renew("a", lease_id, 10, 40.0) == 60
    assert table.pins.renew("a", lease_id, 200, 50.0) == 200
    assert table.pins.expire(249.9) == 250.0
    assert table.pins.renew("a", lease_id, LEASE_MS_MAX + 5, 249.9) == LEASE_MS_MAX


def test_a_lookup_renews_nothing(table: PageTable) -> None:
    lease_id = lease(table, 0)
    table.match(SPACE, [HASHES], 0, 99.0)
    assert table.pin(SPACE, HASHES[0], lease_id, 100.0) is PageStatus.LEASE_EXPIRED


def test_the_sweep_names_the_next_expiry(table: PageTable) -> None:
    assert table.pins.expire(0.0) is None
    long, short = lease(table, 0, lease_ms=300), lease(table, 1, lease_ms=100)
    assert table.pins.expire(0.0) == 100.0
    table.pins.renew("a", short, 500, 50.0)
    assert table.pins.expire(50.0) == 300.0
    table.pins.release("a", long, 60.0)
    assert table.pins.expire(60.0) == 550.0
    assert table.pins.expire(550.0) is None
    table.check()


def test_many_short_leases_leave_no_memory_behind(table: PageTable) -> None:
    keeper = lease(table, 0, lease_ms=LEASE_MS_MAX)
    for _ in range(1000):
        table.pins.renew("a", keeper, LEASE_MS_MAX, 1.0)
        outcome = table.match(SPACE, [HASHES], LEASE_MS_MAX, 1.0)
        assert outcome.lease_id is not None
        table.pins.release("a", outcome.lease_id, 1.0)
    table.check()  # bounds the heap of expiries by the number of leases


def test_the_number_of_leases_is_bounded_and_expiry_makes_room(table: PageTable) -> None:
    for _ in range(LEASES_MAX):
        table.match(SPACE, [HASHES[:1]], 100, 0.0)
    hits = table.statistics().hit_pages
    with pytest.raises(Overloaded, match=str(LEASES_MAX)):
        table.match(SPACE, [HASHES[:1]], 100, 99.0)
    assert table.statistics().hit_pages == hits
    assert table.match(SPACE, [HASHES[:1]], 0, 99.0).hits == (1,)
    lease(table, 0, now_ms=100.0)


def test_the_pages_under_lease_are_bounded(
    make_table: Callable[..., PageTable], layout_of_bytes: Callable[[int], PageLayout], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease_module, "LEASED_PAGES_MAX", 5)
    table = filled(make_table(400), layout_of_bytes(100))
    first = lease(table, 0, 1, 2)
    with pytest.raises(Overloaded, match=r"5 leased pages .* holds 3 .* 3 more"):
        table.match(SPACE, [HASHES[:3]], 100, 0.0)
    table.check()
    lease(table, 0, 1)
    table.pins.release("a", first, 1.0)
    lease(table, 0, 1, 2, now_ms=1.0)
