"""Every eviction policy against a simple model of its order, and against the contract of all policies."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import pytest
from hypothesis import given
from hypothesis import strategies as st

from attnstore.core.eviction import (
    EVICTION_POLICIES,
    EvictionPolicy,
    FirstInFirstOut,
    LeastRecentlyUsed,
    LookAhead,
    S3Fifo,
    create_eviction_policy,
)
from attnstore.errors import InvalidArgument

Policy = TypeVar("Policy", bound=EvictionPolicy[int])
Steps = list[tuple[str, int]]
STEPS = st.lists(st.tuples(st.sampled_from(["use", "pin", "unpin", "remove", "evict"]), st.integers(0, 7)), max_size=80)


class Model:
    """A list in order of eviction, the next victim first; subclasses maintain the order."""

    def __init__(self) -> None:
        self.order: list[int] = []
        self.pinned: list[int] = []

    def evictable(self) -> list[int]:
        return self.order

    def victim(self) -> int | None:
        return next(iter(self.evictable()), None)

    def admit(self, item: int) -> None:
        self.order.append(item)

    def use(self, item: int) -> None:
        self.order.remove(item)
        self.order.append(item)

    def pin(self, item: int) -> None:
        self.order.remove(item)
        self.pinned.append(item)

    def unpin(self, item: int) -> None:
        self.pinned.remove(item)
        self.order.append(item)

    def remove(self, item: int) -> None:
        self.order.remove(item)


class ArrivalModel(Model):
    """Pinned items stay in the list, but are never its first."""

    def evictable(self) -> list[int]:
        return [item for item in self.order if item not in self.pinned]

    def use(self, item: int) -> None:
        pass

    def pin(self, item: int) -> None:
        self.pinned.append(item)
        self.step_aside()

    def unpin(self, item: int) -> None:
        self.pinned.remove(item)
        if item not in self.order:
            self.order.insert(0, item)

    def remove(self, item: int) -> None:
        self.order.remove(item)
        self.step_aside()

    def step_aside(self) -> None:
        while self.order and self.order[0] in self.pinned:
            del self.order[0]


class S3Model(Model):
    """The paper's three queues as lists, with pinned items as in `ArrivalModel`."""

    def __init__(self) -> None:
        super().__init__()
        self.small, self.main = ArrivalModel(), ArrivalModel()
        self.ghosts: list[int] = []
        self.uses: dict[int, int] = {}  # of all items, including pinned ones
        self.home: dict[int, ArrivalModel] = {}

    def evictable(self) -> list[int]:
        return self.small.evictable() + self.main.evictable()

    def victim(self) -> int | None:
        while self.evictable():
            item, stays = self.candidate()
            if not stays:
                return item
            self.uses[item] = self.uses[item] - 1 if self.home[item] is self.main else 0
            self.home[item].remove(item)
            self.home[item] = self.main
            self.main.admit(item)
        return None

    def candidate(self) -> tuple[int, bool]:
        small_items = sum(home is self.small for home in self.home.values())
        small, main = self.small.evictable(), self.main.evictable()
        if small and (small_items >= len(self.home) / 10 or not main):
            return small[0], self.uses[small[0]] > 1
        return main[0], self.uses[main[0]] > 0

    def admit(self, item: int) -> None:
        self.uses[item] = 0
        self.home[item] = self.main if item in self.ghosts else self.small
        self.ghosts = [ghost for ghost in self.ghosts if ghost != item]
        self.home[item].admit(item)

    def use(self, item: int) -> None:
        self.uses[item] = min(3, self.uses[item] + 1)

    def pin(self, item: int) -> None:
        self.use(item)
        self.pinned.append(item)
        self.home[item].pin(item)

    def unpin(self, item: int) -> None:
        self.pinned.remove(item)
        self.home[item].unpin(item)

    def remove(self, item: int) -> None:
        del self.uses[item]
        home = self.home.pop(item)
        home.remove(item)
        self.ghosts += [item] if home is self.small else []
        present = len(self.home)
        self.ghosts = self.ghosts[-max(1, present - present // 10) :]


class LookAheadModel(Model):
    """In order of use; items of waiting sequences are evicted last, the item with the farthest use first."""

    def __init__(self) -> None:
        super().__init__()
        self.waiting: list[list[int]] = []

    def victim(self) -> int | None:
        awaited = [item for items in self.waiting for item in items]
        unawaited = [item for item in self.order if item not in awaited]
        return next(iter(unawaited), None) if unawaited else max(self.order, key=awaited.index, default=None)

    def wait(self, items: list[int]) -> None:
        self.waiting.append(items)

    def run(self) -> None:
        """Runs the first sequence: items that are no longer awaited count as used, the first item last."""
        for item in reversed(self.waiting.pop(0)):
            if item in self.order and not any(item in items for items in self.waiting):
                self.use(item)


def drain(policy: EvictionPolicy[int]) -> list[int]:
    order = []
    while (victim := policy.victim()) is not None:
        policy.removed(victim)
        order.append(victim)
    return order


def policy_of(items: Sequence[int], policy: Policy) -> Policy:
    for item in items:
        policy.admitted(item)
    return policy


def step_both(policy: EvictionPolicy[int], model: Model, step: str, item: int) -> None:
    """Applies the step to both, if the model allows it; afterwards they agree on victim and size."""
    if step == "use" and item in model.evictable():
        policy.touched([item])
        model.use(item)
    elif step == "use" and item not in model.pinned:
        policy.admitted(item)
        model.admit(item)
    elif step == "pin" and item in model.evictable():
        policy.withdrawn([item])
        model.pin(item)
    elif step == "unpin" and item in model.pinned:
        policy.returned([item])
        model.unpin(item)
    elif step == "remove" and item in model.evictable():
        policy.removed(item)
        model.remove(item)
    elif step == "evict" and (victim := model.victim()) is not None:
        policy.removed(victim)
        model.remove(victim)
    assert policy.victim() == model.victim()
    assert len(policy) == len(model.evictable())


def compare(policy: EvictionPolicy[int], model: Model, steps: Steps) -> None:
    """Applies the steps and then evicts everything."""
    for step, item in steps + [("evict", 0)] * 8:
        step_both(policy, model, step, item)


@pytest.mark.parametrize("name", EVICTION_POLICIES)
class TestEveryPolicy:
    def test_without_items_has_no_victim(self, name: str) -> None:
        assert create_eviction_policy(name).victim() is None

    def test_naming_a_victim_changes_nothing(self, name: str) -> None:
        policy: EvictionPolicy[int] = create_eviction_policy(name)
        policy.admitted(1)
        assert policy.victim() == policy.victim() == 1
        assert len(policy) == 1

    def test_evicts_new_items_in_order_of_arrival_while_nothing_is_used_or_announced(self, name: str) -> None:
        assert drain(policy_of(range(50), create_eviction_policy(name))) == list(range(50))

    @given(steps=st.lists(st.tuples(st.sampled_from(["use", "pin", "unpin", "evict", "wait", "run"]), st.integers(0, 15))))
    def test_holds_exactly_the_evictable_items(self, name: str, steps: Steps) -> None:
        policy: EvictionPolicy[int] = create_eviction_policy(name)
        evictable: set[int] = set()
        pinned: set[int] = set()
        waiting: list[list[int]] = []
        for step, item in steps:
            if step == "use" and item in evictable:
                policy.touched([item])
            elif step == "use" and item not in pinned:
                policy.admitted(item)
                evictable.add(item)
            elif step == "pin" and item in evictable:
                policy.withdrawn([item])
                evictable.remove(item)
                pinned.add(item)
            elif step == "unpin" and item in pinned:
                policy.returned([item])
                pinned.remove(item)
                evictable.add(item)
            elif step == "evict" and (victim := policy.victim()) is not None:
                policy.removed(victim)
                evictable.remove(victim)
            elif step == "wait":
                waiting.append([item, (item + 1) % 16])
                policy.announced(waiting[-1])
            elif step == "run" and waiting:
                policy.settled(waiting.pop(item % len(waiting)))
            assert len(policy) == len(evictable)
            assert {item for item in range(16) if item in policy} == evictable
            assert policy.victim() == policy.victim()
            assert policy.victim() in evictable if evictable else policy.victim() is None
        assert sorted(drain(policy)) == sorted(evictable)


def test_an_unknown_policy_is_refused_with_the_known_names() -> None:
    with pytest.raises(InvalidArgument, match=r"'clock' is unknown; choose one of lru, fifo, s3-fifo, look-ahead"):
        create_eviction_policy("clock")


class TestLeastRecentlyUsed:
    def test_withdrawn_items_are_no_victims_and_return_as_the_most_recent(self) -> None:
        policy = policy_of(range(4), LeastRecentlyUsed[int]())
        policy.withdrawn([0, 1])
        assert 0 not in policy
        assert policy.victim() == 2
        policy.returned([1, 0])
        assert drain(policy) == [2, 3, 1, 0]

    @given(STEPS)
    def test_victims_come_in_order_of_last_use(self, steps: Steps) -> None:
        compare(LeastRecentlyUsed[int](), Model(), steps)


class TestFirstInFirstOut:
    def test_a_pin_in_the_middle_costs_no_place(self) -> None:
        policy = policy_of(range(4), FirstInFirstOut[int]())
        policy.withdrawn([1, 2])
        policy.returned([2, 1])
        assert drain(policy) == [0, 1, 2, 3]

    def test_items_pinned_at_the_front_rejoin_it_in_the_order_of_their_return(self) -> None:
        policy = policy_of(range(4), FirstInFirstOut[int]())
        policy.withdrawn([0, 1])
        assert policy.victim() == 2
        policy.returned([1, 0])
        assert drain(policy) == [1, 0, 2, 3]

    @given(STEPS)
    def test_victims_come_in_order_of_arrival(self, steps: Steps) -> None:
        compare(FirstInFirstOut[int](), ArrivalModel(), steps)


class TestS3Fifo:
    def test_an_item_used_twice_more_outlives_newer_ones(self) -> None:
        policy = policy_of(range(20), S3Fifo[int]())
        policy.touched([0])
        policy.touched([0])
        assert drain(policy) == [*range(1, 20), 0]

    def test_one_more_use_is_not_enough_to_stay(self) -> None:
        policy = policy_of(range(20), S3Fifo[int]())
        policy.touched([0])
        assert policy.victim() == 0

    def test_an_item_that_comes_back_soon_goes_straight_to_the_main_queue(self) -> None:
        policy = policy_of(range(10), S3Fifo[int]())
        policy.removed(0)
        policy.admitted(0)
        assert drain(policy) == [*range(1, 10), 0]

    def test_a_scan_of_new_items_does_not_flush_what_is_in_use(self) -> None:
        policy = policy_of(range(90), S3Fifo[int]())
        for _ in range(2):
            policy.touched(range(90))
        for item in range(1000, 1500):
            policy.admitted(item)
            if len(policy) > 100:
                victim = policy.victim()
                assert victim is not None
                policy.removed(victim)
        assert all(item in policy for item in range(90))

    def test_it_remembers_no_more_removed_items_than_it_holds(self) -> None:
        policy: S3Fifo[int] = policy_of(range(100), S3Fifo())
        for item in range(100, 5000):
            policy.admitted(item)
            policy.removed(item - 100)
        assert len(policy._ghosts) == 90

    @given(STEPS)
    def test_victims_are_those_of_the_papers_three_queues(self, steps: Steps) -> None:
        compare(S3Fifo[int](), S3Model(), steps)


class TestLookAhead:
    def test_what_waiting_sequences_will_use_goes_last_and_the_farthest_of_it_first(self) -> None:
        policy = policy_of(range(6), LookAhead[int]())
        policy.announced([0, 1])
        policy.announced([0, 2, 9])
        assert drain(policy) == [3, 4, 5, 2, 1, 0]

    def test_an_announced_item_is_spared_when_it_comes_after_the_announcement(self) -> None:
        policy: LookAhead[int] = LookAhead()
        policy.announced([0])
        assert drain(policy_of(range(3), policy)) == [1, 2, 0]

    def test_an_item_is_spared_until_the_last_sequence_that_announced_it_runs(self) -> None:
        policy = policy_of(range(3), LookAhead[int]())
        policy.announced([0])
        policy.announced([0])
        policy.settled([0])
        assert policy.victim() == 1
        policy.settled([0])
        policy.touched([1, 2])
        assert policy.victim() == 0

    def test_the_other_policy_decides_about_everything_else(self) -> None:
        policy = policy_of(range(4), LookAhead[int](FirstInFirstOut()))
        policy.announced([2])
        policy.touched([0])
        assert drain(policy) == [0, 1, 3, 2]

    def test_it_forgets_what_nobody_waits_for_any_more(self) -> None:
        policy = policy_of(range(8), LookAhead[int]())
        for _ in range(500):
            policy.announced(range(8))
            policy.settled(range(8))
        assert not policy._uses
        assert len(policy._farthest) < 100

    @given(st.lists(st.tuples(st.sampled_from(["use", "pin", "unpin", "remove", "evict", "wait", "run"]), st.integers(0, 7))))
    def test_victims_are_those_of_a_search_through_all_waiting_sequences(self, steps: Steps) -> None:
        policy, model = LookAhead[int](), LookAheadModel()
        for step, item in steps:
            if step == "wait":
                policy.announced([item, item // 2])
                model.wait([item, item // 2])
            elif step == "run" and model.waiting:
                policy.settled(model.waiting[0])
                model.run()
            step_both(policy, model, step, item)

    @given(st.lists(st.integers(0, 9), max_size=60), st.integers(1, 6))
    def test_with_the_whole_future_announced_it_misses_as_often_as_the_optimum(self, uses: list[int], capacity: int) -> None:
        policy: LookAhead[int] = LookAhead()
        for item in uses:
            policy.announced([item])
        misses = 0
        for item in uses:
            policy.settled([item])
            if item in policy:
                continue
            misses += 1
            policy.admitted(item)
            if len(policy) > capacity:
                victim = policy.victim()
                assert victim is not None
                policy.removed(victim)
        assert misses == optimal_misses(uses, capacity)


def optimal_misses(uses: list[int], capacity: int) -> int:
    """Returns the fewest possible misses, by trying all decisions. An item need not be kept."""
    costs: dict[frozenset[int], int] = {frozenset(): 0}
    for item in uses:
        best: dict[frozenset[int], int] = {}
        for kept, misses in costs.items():
            missed = misses + (item not in kept)
            full = kept | {item}
            for choice in {kept, full} if len(full) <= capacity else {kept, *(full - {out} for out in full)}:
                best[choice] = min(missed, best.get(choice, missed))
        costs = best
    return min(costs.values())
