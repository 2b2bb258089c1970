"""The block pool: conservation under every sequence of operations, and the choice of evicted blocks."""

from __future__ import annotations

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from attnstore.core.eviction import EVICTION_POLICIES, LookAhead, create_eviction_policy
from attnstore.core.hashing import BlockHash
from attnstore.errors import Overloaded
from attnstore_worker.cache.pool.block_pool import BlockPool

CAPACITY = 6


def name(number: int) -> BlockHash:
    return BlockHash(number.to_bytes(32, "big"))


class PoolMachine(RuleBasedStateMachine):
    """Drives a pool with any policy beside a model that only counts the holders."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(CAPACITY)
        self.waiting: list[list[BlockHash]] = []
        self.holds: list[int] = []
        self.sealed: dict[int, BlockHash] = {}

    @initialize(policy=st.sampled_from(EVICTION_POLICIES))
    def choose_policy(self, policy: str) -> None:
        self.pool = BlockPool(CAPACITY, create_eviction_policy(policy))

    @rule()
    def allocate(self) -> None:
        if len(set(self.holds)) == CAPACITY:
            with pytest.raises(Overloaded):
                self.pool.allocate()
            return
        block_id = self.pool.allocate()
        assert block_id not in self.holds, "a held block was given out"
        self.sealed.pop(block_id, None)
        self.holds.append(block_id)

    @precondition(lambda self: self.holds)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        block_id = data.draw(st.sampled_from(self.holds))
        self.holds.remove(block_id)
        self.pool.release([block_id])

    @precondition(lambda self: self.holds)
    @rule(data=st.data())
    def hold_again(self, data: st.DataObject) -> None:
        block_id = data.draw(st.sampled_from(self.holds))
        self.pool.hold(block_id)
        self.holds.append(block_id)

    @rule(data=st.data(), number=st.integers(0, 8))
    def seal(self, data: st.DataObject, number: int) -> None:
        private = [block_id for block_id in set(self.holds) if block_id not in self.sealed]
        if not private:
            return
        block_id = data.draw(st.sampled_from(sorted(private)))
        assert self.pool.seal(block_id, name(number)) == (name(number) not in self.sealed.values())
        if name(number) not in self.sealed.values():
            self.sealed[block_id] = name(number)

    @rule(numbers=st.lists(st.integers(0, 8), max_size=4))
    def hold_prefix(self, numbers: list[int]) -> None:
        block_ids = self.pool.hold_prefix([name(number) for number in numbers])
        assert [self.sealed[block_id] for block_id in block_ids] == [name(number) for number in numbers[: len(block_ids)]]
        if len(block_ids) < len(numbers):
            assert name(numbers[len(block_ids)]) not in self.sealed.values()
        self.holds += block_ids

    @rule(numbers=st.lists(st.integers(0, 8), max_size=4))
    def announce(self, numbers: list[int]) -> None:
        self.waiting.append([name(number) for number in numbers])
        self.pool.announce(self.waiting[-1])

    @precondition(lambda self: self.waiting)
    @rule(data=st.data())
    def settle(self, data: st.DataObject) -> None:
        index = data.draw(st.integers(0, len(self.waiting) - 1))
        self.pool.settle(self.waiting.pop(index))

    @invariant()
    def every_block_is_in_one_state(self) -> None:
        self.pool.check()
        statistics = self.pool.statistics()
        assert statistics.held == len(set(self.holds))
        assert statistics.evictable == len(set(self.sealed) - set(self.holds))
        assert all(self.pool.holders(block_id) == self.holds.count(block_id) for block_id in range(CAPACITY))


TestPoolMachine = PoolMachine.TestCase


def test_the_block_released_first_is_evicted_first() -> None:
    pool = BlockPool(3)
    blocks = [pool.allocate() for _ in range(3)]
    for number, block_id in enumerate(blocks):
        pool.seal(block_id, name(number))
    pool.release([blocks[1], blocks[0], blocks[2]])
    assert [pool.allocate() for _ in range(3)] == [blocks[1], blocks[0], blocks[2]]
    assert pool.statistics().evicted == 3


def test_a_hit_saves_a_block_from_eviction() -> None:
    pool = BlockPool(2)
    old, new = pool.allocate(), pool.allocate()
    pool.seal(old, name(0))
    pool.seal(new, name(1))
    pool.release([old, new])
    assert pool.hold_prefix([name(0)]) == [old]
    assert pool.allocate() == new


def test_free_blocks_are_used_before_anything_is_evicted() -> None:
    pool = BlockPool(2)
    block_id = pool.allocate()
    pool.seal(block_id, name(0))
    pool.release([block_id])
    assert pool.allocate() != block_id
    assert pool.statistics().evicted == 0


def test_a_policy_that_looks_ahead_keeps_the_blocks_of_a_waiting_sequence() -> None:
    pool = BlockPool(3, LookAhead())
    blocks = [pool.allocate() for _ in range(3)]
    for number, block_id in enumerate(blocks):
        pool.seal(block_id, name(number))
    pool.release(blocks)
    pool.announce([name(0), name(1)])
    assert pool.allocate() == blocks[2]
    assert pool.hold_prefix([name(0), name(1)]) == [blocks[0], blocks[1]]
    pool.settle([name(0), name(1)])
    pool.check()
