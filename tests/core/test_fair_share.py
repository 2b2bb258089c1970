"""Shares of one limit: no tenant takes all of it, and each can always hold its guaranteed part."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from attnstore.core.fair_share import FairShares
from attnstore.errors import Overloaded

LIMIT = 100


def shares(limit: int = LIMIT, tenants: int = 5) -> FairShares:
    return FairShares(limit, "seats", "stand up", tenants=tenants)


def fill(shared: FairShares, tenant: str) -> int:
    """Takes all that the tenant may have, and returns how much it then holds."""
    while shared.fits(tenant):
        shared.take(tenant)
    return shared.held.get(tenant, 0)


def test_the_only_tenant_of_a_node_may_have_all_of_it() -> None:
    assert fill(shares(tenants=1), "a") == LIMIT


def test_a_tenant_on_its_own_gets_its_guarantee_and_four_fifths_of_what_nobody_is_guaranteed() -> None:
    shared = shares()
    assert shared.guaranteed == 10
    assert fill(shared, "a") == 10 + 40
    assert fill(shared, "b") == 10 + 8


@pytest.mark.parametrize("limit", [10, 100, 65_536])
def test_each_tenant_has_its_guarantee_after_all_others_took_what_they_could(limit: int) -> None:
    shared = shares(limit)
    for tenant in "abcde":
        assert fill(shared, tenant) >= limit // 10


def test_with_more_tenants_than_units_one_leaves_room_for_another() -> None:
    shared = shares(8, tenants=1_000)
    assert shared.guaranteed == 0
    assert fill(shared, "a") == 6
    assert fill(shared, "b") == 1
    assert fill(shared, "c") == 1


def test_a_refusal_says_who_holds_what_and_what_to_do() -> None:
    shared = shares()
    shared.take("b", 5)
    held = fill(shared, "a")
    with pytest.raises(Overloaded, match=f"100 seats the tenant holds {held} and others 5; 1 more .* stand up"):
        shared.take("a")


def test_what_is_given_back_can_be_taken_by_others() -> None:
    shared = shares()
    fill(shared, "a")
    before = fill(shared, "b")
    shared.give_back("a", 40)
    assert fill(shared, "b") > before


def test_many_units_at_once_pass_the_share_no_more_than_one_at_a_time() -> None:
    shared = shares()
    assert not shared.fits("a", 51)
    shared.take("a", 50)
    assert not shared.fits("a")
    assert not shared.fits("b", 19)
    assert shared.fits("b", 18)


@given(
    st.integers(1, 50),
    st.integers(1, 4),
    st.lists(st.tuples(st.integers(0, 3), st.integers(1, 8), st.booleans()), max_size=60),
)
def test_what_is_held_is_counted_and_every_guarantee_kept(limit: int, tenants: int, steps: list[tuple[int, int, bool]]) -> None:
    shared = shares(limit, tenants)
    names = "abcd"[:tenants]
    held = dict.fromkeys(names, 0)
    for number, units, takes in steps:
        tenant = names[number % tenants]
        if takes and shared.fits(tenant, units):
            shared.take(tenant, units)
            held[tenant] += units
        elif not takes and held[tenant] >= units:
            shared.give_back(tenant, units)
            held[tenant] -= units
        assert shared.held == {name: count for name, count in held.items() if count}
        assert shared.used == sum(held.values()) <= limit
        assert all(shared.fits(name, shared.guaranteed - held[name]) for name in names if held[name] < shared.guaranteed)
