"""The order of eviction, checked against a list that is simply kept in order of use."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from attnstore.core.eviction import LeastRecentlyUsed


def drain(policy: LeastRecentlyUsed[int]) -> list[int]:
    order = []
    while (victim := policy.victim()) is not None:
        policy.removed(victim)
        order.append(victim)
    return order


def test_an_empty_policy_has_no_victim() -> None:
    assert LeastRecentlyUsed[int]().victim() is None


def test_naming_a_victim_changes_nothing() -> None:
    policy = LeastRecentlyUsed[int]()
    policy.admitted(1)
    assert policy.victim() == policy.victim() == 1
    assert len(policy) == 1


def test_withdrawn_items_are_no_victims_and_return_as_the_most_recent() -> None:
    policy = LeastRecentlyUsed[int]()
    for item in range(4):
        policy.admitted(item)
    policy.withdrawn([0, 1])
    assert 0 not in policy
    assert policy.victim() == 2
    policy.returned([1, 0])
    assert drain(policy) == [2, 3, 1, 0]


@given(st.lists(st.tuples(st.sampled_from(["use", "pin", "unpin", "remove"]), st.integers(0, 7)), max_size=80))
def test_victims_come_in_order_of_last_use(steps: list[tuple[str, int]]) -> None:
    policy = LeastRecentlyUsed[int]()
    order: list[int] = []
    pinned: set[int] = set()
    for step, item in steps:
        if step == "use" and item in order:
            policy.touched([item])
            order.remove(item)
            order.append(item)
        elif step == "use" and item not in pinned:
            policy.admitted(item)
            order.append(item)
        elif step == "pin" and item in order:
            policy.withdrawn([item])
            order.remove(item)
            pinned.add(item)
        elif step == "unpin" and item in pinned:
            policy.returned([item])
            pinned.remove(item)
            order.append(item)
        elif step == "remove" and item in order:
            policy.removed(item)
            order.remove(item)
        assert policy.victim() == next(iter(order), None)
        assert len(policy) == len(order)
    assert drain(policy) == order
