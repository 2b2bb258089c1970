"""Kept leases: renewed until `let_go`, released once, and never waited for."""

from __future__ import annotations

import threading

import pytest

import attnstore
from attnstore.clock import MonotonicClock
from attnstore.errors import AttnStoreError, LeaseExpired, Unavailable
from attnstore.testing import StoreProcess
from attnstore.testing.clock import ManualClock
from attnstore.types import Lease
from attnstore_worker.cache.store.leases import LeaseKeeper
from tests.samples import SMALL, eventually, make_batch

FIRST, SECOND = Lease(b"1" * 16, 10_000), Lease(b"2" * 16, 20_000)


class Node:
    """Counts its calls; `errors` says how a renewal of each lease fails."""

    def __init__(self) -> None:
        self.renewed: list[tuple[Lease, int]] = []
        self.released: list[Lease] = []
        self.errors: dict[Lease, Exception] = {}
        self.gate = threading.Event()
        self.gate.set()

    def renew(self, lease: Lease, lease_ms: int, /) -> None:
        self.gate.wait()
        self.renewed.append((lease, lease_ms))
        if lease in self.errors:
            raise self.errors[lease]

    def release(self, lease: Lease, /) -> None:
        self.gate.wait()
        self.released.append(lease)
        if lease in self.errors:
            raise self.errors[lease]


def test_a_lease_is_renewed_to_its_length_until_it_is_let_go() -> None:
    node = Node()
    keeper = LeaseKeeper(node, period_ms=1)
    first, second = keeper.keep(FIRST), keeper.keep(SECOND)
    assert eventually(lambda: node.renewed.count((FIRST, 10_000)) > 2 and node.renewed.count((SECOND, 20_000)) > 2)
    keeper.let_go(first)
    assert eventually(lambda: node.released == [FIRST])
    before = node.renewed.count((FIRST, 10_000))
    more = len(node.renewed) + 5
    assert eventually(lambda: len(node.renewed) > more)
    assert node.renewed.count((FIRST, 10_000)) == before
    assert not second.lost
    keeper.close()
    assert eventually(lambda: node.released == [FIRST, SECOND])
    keeper.let_go(second)
    keeper.let_go(first)


@pytest.mark.parametrize(("error", "lost"), [(LeaseExpired("gone"), True), (Unavailable("no answer"), False)])
def test_only_a_store_that_says_so_makes_a_lease_lost(error: AttnStoreError, lost: bool) -> None:
    node = Node()
    node.errors[FIRST] = error
    keeper = LeaseKeeper(node, period_ms=1)
    kept, other = keeper.keep(FIRST), keeper.keep(SECOND)
    assert eventually(lambda: node.renewed.count((SECOND, 20_000)) > 2)
    assert kept.lost == lost
    assert not other.lost
    keeper.let_go(kept)
    keeper.let_go(other)
    assert eventually(lambda: set(node.released) == {FIRST, SECOND})
    keeper.close()


def test_a_store_that_hangs_keeps_nobody_waiting() -> None:
    node = Node()
    node.gate.clear()
    keeper = LeaseKeeper(node, period_ms=1)
    kept = keeper.keep(FIRST)
    keeper.let_go(kept)
    keeper.keep(SECOND)
    keeper.close()
    assert node.released == []
    node.gate.set()
    assert eventually(lambda: set(node.released) == {FIRST, SECOND})


def test_leases_that_are_let_go_all_the_time_delay_no_renewal() -> None:
    """Renewals are due by the clock; here each release comes within a tenth of the period after the last one."""
    node, clock = Node(), ManualClock()
    keeper = LeaseKeeper(node, period_ms=1_000, clock=clock)
    keeper.keep(FIRST)
    for number in range(1, 51):
        clock.advance_ms(100)
        keeper.let_go(keeper.keep(SECOND))
        assert eventually(lambda number=number: len(node.released) == number)  # type: ignore[misc]
        assert node.renewed.count((FIRST, 10_000)) == number // 10
    keeper.close()


def test_a_renewal_that_fails_in_a_way_nobody_foresaw_costs_no_other_lease_its_own() -> None:
    node = Node()
    node.errors[FIRST] = ZeroDivisionError()
    keeper = LeaseKeeper(node, period_ms=1)
    keeper.keep(FIRST)
    keeper.keep(SECOND)
    assert eventually(lambda: min(map(node.renewed.count, [(FIRST, 10_000), (SECOND, 20_000)])) > 20)
    keeper.close()


def test_a_busy_workers_lease_outlives_its_first_length_at_a_real_node() -> None:
    """Like pages that a long answer uses in place while short ones come and go."""
    lease_ms, clock = 2_000, MonotonicClock()
    batch = make_batch(4, model="kept")
    with StoreProcess("--capacity", "64MiB") as node, attnstore.connect(node.url) as client:
        client.register_layout(batch.namespace, SMALL)
        client.write(batch.namespace, batch.hashes, batch.pages)

        def lease() -> Lease:
            found = client.match(batch.namespace, [batch.hashes], lease_ms=lease_ms)
            assert found.lease is not None
            return found.lease

        keeper = LeaseKeeper(client, period_ms=lease_ms / 8)
        long = keeper.keep(lease())
        end_ms = clock.now_ms() + 1.5 * lease_ms
        while clock.now_ms() < end_ms:
            keeper.let_go(keeper.keep(lease()))
        client.renew(long.lease, lease_ms)  # raises if it has expired
        assert not long.lost
        keeper.close()


def test_a_release_that_fails_in_a_way_nobody_foresaw_loses_no_other_lease() -> None:
    node = Node()
    node.errors[FIRST] = ZeroDivisionError()
    keeper = LeaseKeeper(node, period_ms=1)
    node.gate.clear()
    for kept in [keeper.keep(FIRST), keeper.keep(SECOND)]:
        keeper.let_go(kept)
    node.gate.set()
    assert eventually(lambda: node.released == [FIRST, SECOND])
    keeper.close()
