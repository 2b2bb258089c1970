"""The HOST tier on pages without a model: whole pages are stored, copied up and evicted, and none is lost."""

from __future__ import annotations

import random

import pytest
import torch

from attnstore.core.eviction import EvictionPolicy, FirstInFirstOut, LookAhead
from attnstore.core.hashing import BlockHash
from attnstore.core.layout import DType, PageLayout
from attnstore_worker.cache.pool.host_tier import HostTier, OnEvict
from attnstore_worker.errors import PoolTooSmall

LAYOUT = PageLayout(layers=2, kv_heads=1, head_dim=4, block_tokens=4, dtype=DType.FP32)


def name(number: int) -> BlockHash:
    return BlockHash(number.to_bytes(32, "big"))


def page(number: int) -> torch.Tensor:
    return torch.full(LAYOUT.shape, float(number))


def tier_of(pages: int, policy: EvictionPolicy[BlockHash] | None = None, on_evict: OnEvict | None = None) -> HostTier:
    tier = HostTier(LAYOUT, pages * LAYOUT.page_bytes, policy)
    if on_evict is not None:
        tier.on_evict = on_evict
    return tier


def found(tier: HostTier, number: int) -> bool:
    """Returns whether the page is there, with its own bytes."""
    slots = tier.hold_prefix([name(number)])
    for slot in slots:
        copy = torch.empty(LAYOUT.shape)
        tier.copy_up(slot, copy)
        assert torch.equal(copy, page(number))
    tier.release(slots)
    tier.check()
    return bool(slots)


def test_the_least_recently_used_page_leaves_first() -> None:
    tier = tier_of(3)
    for number in range(3):
        tier.keep(name(number), page(number))
    assert found(tier, 0)
    tier.keep(name(3), page(3))
    assert [found(tier, number) for number in range(4)] == [True, False, True, True]
    assert tier.statistics().evicted == 1


def test_keeping_a_page_again_copies_nothing_and_counts_as_its_use() -> None:
    tier = tier_of(2)
    tier.keep(name(0), page(0))
    tier.keep(name(1), page(1))
    tier.keep(name(0), page(99))
    tier.keep(name(2), page(2))
    assert [found(tier, number) for number in range(3)] == [True, False, True]


def test_a_page_that_is_being_copied_up_is_not_evicted() -> None:
    tier = tier_of(2)
    tier.keep(name(0), page(0))
    tier.keep(name(1), page(1))
    slots = tier.hold_prefix([name(0), name(1)])
    assert not tier.keep(name(2), page(2))
    assert tier.statistics().evicted == 0
    tier.release(slots)
    assert found(tier, 0)
    assert found(tier, 1)


def test_only_a_prefix_is_held() -> None:
    tier = tier_of(3)
    tier.keep(name(0), page(0))
    tier.keep(name(2), page(2))
    slots = tier.hold_prefix([name(0), name(1), name(2)])
    assert len(slots) == 1
    tier.release(slots)


def test_the_policy_is_the_tiers_own_choice() -> None:
    tier = tier_of(2, policy=FirstInFirstOut())
    tier.keep(name(0), page(0))
    tier.keep(name(1), page(1))
    assert found(tier, 0)
    tier.keep(name(2), page(2))
    assert not found(tier, 0)


def test_a_policy_that_looks_ahead_spares_what_a_waiting_prompt_will_use() -> None:
    tier = tier_of(2, policy=LookAhead())
    tier.keep(name(0), page(0))
    tier.announce([name(0)])
    tier.keep(name(1), page(1))
    tier.keep(name(2), page(2))
    assert [found(tier, number) for number in range(3)] == [True, False, True]
    tier.settle([name(0)])


def test_whoever_is_told_of_an_eviction_still_sees_the_page() -> None:
    seen: list[tuple[BlockHash, bytes]] = []
    tier = tier_of(1, on_evict=lambda block_hash, view: seen.append((block_hash, bytes(view))))
    for number in range(3):
        tier.keep(name(number), page(number))
    assert seen == [(name(number), page(number).numpy().tobytes()) for number in range(2)]


def test_a_tier_that_holds_no_page_is_refused() -> None:
    with pytest.raises(PoolTooSmall):
        tier_of(0)


@pytest.mark.parametrize("seed", range(5))
def test_pages_are_right_and_conserved_after_any_history(seed: int) -> None:
    print(f"seed {seed}")
    rng = random.Random(seed)
    tier = tier_of(5)
    held: list[tuple[list[int], list[int]]] = []
    for _ in range(300):
        number = rng.randrange(12)
        if rng.random() < 0.5:
            tier.keep(name(number), page(number))
        elif held and rng.random() < 0.6:
            slots, numbers = held.pop(rng.randrange(len(held)))
            for slot, each in zip(slots, numbers, strict=True):
                copy = torch.empty(LAYOUT.shape)
                tier.copy_up(slot, copy)
                assert torch.equal(copy, page(each))
            tier.release(slots)
        else:
            slots = tier.hold_prefix([name(number), name(number + 1)])
            held.append((slots, list(range(number, number + len(slots)))))
        tier.check()
        statistics = tier.statistics()
        assert statistics.free + statistics.held + statistics.evictable == 5
