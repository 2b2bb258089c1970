"""The KV manager on pages without a model: a sequence gets exactly the pages that were sealed, whatever the store does."""

from __future__ import annotations

import random
import time
from collections.abc import Callable

import pytest

from attnstore.clock import MonotonicClock
from attnstore.core.eviction import EvictionPolicy, LookAhead
from attnstore.core.hashing import BlockHash, Namespace
from attnstore.core.layout import DType, PageLayout
from attnstore.errors import Overloaded, Unavailable
from attnstore.testing import ManualClock
from attnstore.types import PageStatus
from attnstore_worker.cache import Admission, CacheManager, Load, PagePool, Planner, RemoteTier, admission_of
from attnstore_worker.cache.moving.load import LoadPlan
from attnstore_worker.cache.pool.block_table import BlockTable
from attnstore_worker.cache.store.remote import PAUSE_MS
from attnstore_worker.errors import PoolTooSmall
from attnstore_worker.testing import FixedPlanner, MemoryStore

LAYOUT = PageLayout(layers=2, kv_heads=1, head_dim=4, block_tokens=4, dtype=DType.FP32)
NAMESPACE = Namespace(b"n" * 32)
WAIT_MS = 10_000


def manager_on(
    store: MemoryStore | None,
    blocks: int,
    deadline_ms: int = WAIT_MS,
    policy: EvictionPolicy[BlockHash] | None = None,
    planner: Planner | None = None,
) -> CacheManager:
    clock = MonotonicClock()
    remote = RemoteTier(store, NAMESPACE, LAYOUT, deadline_ms=deadline_ms, clock=clock) if store is not None else None
    pages = PagePool(LAYOUT, blocks * LAYOUT.page_bytes)
    return CacheManager(pages, NAMESPACE, remote=remote, clock=clock, policy=policy, planner=planner)


def admit(manager: CacheManager, tokens: list[int]) -> tuple[BlockTable, Load]:
    """Admits a sequence that waits until its load is over; ready blocks after a gap stay ahead of it."""
    table, load = manager.admit(tokens, [])
    while load.running:
        manager.loads.advance(table, load, table.sealed * LAYOUT.block_tokens)
        if load.running:
            manager.loads.wait(5)
    return table, load


def fill(manager: CacheManager, table: BlockTable, load: Load, tokens: list[int]) -> None:
    """Computes what is missing: the page of a block is a function of all tokens up to its end."""
    manager.grow(table, len(tokens))
    computed = table.sealed * LAYOUT.block_tokens
    while computed < len(tokens):
        computed = manager.loads.advance(table, load, computed)
        end = manager.loads.claim(load, len(tokens))
        for index in range(computed // LAYOUT.block_tokens, end // LAYOUT.block_tokens):
            manager.pages.page(table.block_ids[index])[:] = content(tokens, index)
        manager.seal(table, tokens, end)
        computed = end


def content(tokens: list[int], index: int) -> bytes:
    prefix = tokens[: (index + 1) * LAYOUT.block_tokens]
    return random.Random(repr(prefix)).randbytes(LAYOUT.page_bytes)


def assert_right(manager: CacheManager, table: BlockTable, tokens: list[int]) -> None:
    for index in range(table.sealed):
        assert manager.pages.page(table.block_ids[index]) == content(tokens, index)
    manager.check()


def run(manager: CacheManager, tokens: list[int]) -> Admission:
    table, load = admit(manager, tokens)
    assert_right(manager, table, tokens)
    fill(manager, table, load, tokens)
    assert_right(manager, table, tokens)
    manager.release(table)
    manager.check()
    return admission_of(load)


def stored_by_another_worker(store: MemoryStore, tokens: list[int]) -> None:
    manager = manager_on(store, 64)
    run(manager, tokens)
    assert manager.flush(WAIT_MS)
    manager.close()


def test_a_second_sequence_finds_the_first_ones_blocks_in_the_pool() -> None:
    manager = manager_on(None, 8)
    tokens = list(range(18))
    assert run(manager, tokens).hit_tokens == 0
    assert run(manager, tokens).local_tokens == 16
    assert run(manager, [*tokens[:9], 99, *tokens[10:]]).local_tokens == 8


def test_a_policy_that_looks_ahead_spares_the_blocks_of_a_prompt_that_waits() -> None:
    manager = manager_on(None, 10, policy=LookAhead())
    waiting, other = list(range(18)), list(range(100, 118))
    run(manager, waiting)
    announced = manager.announce(waiting, [])
    run(manager, other)
    run(manager, list(range(200, 216)))
    manager.settle(announced)
    assert run(manager, waiting).local_tokens == 16


def test_the_last_token_is_never_taken_from_the_cache() -> None:
    manager = manager_on(None, 8)
    tokens = list(range(16))
    run(manager, tokens)
    assert run(manager, tokens).local_tokens == 12


def test_another_worker_reads_what_the_first_wrote(store: MemoryStore) -> None:
    tokens = list(range(18))
    stored_by_another_worker(store, tokens)
    manager = manager_on(store, 8)
    admission = run(manager, tokens)
    assert (admission.local_tokens, admission.remote_tokens, admission.bytes_read) == (0, 16, 4 * LAYOUT.page_bytes)
    assert_eventually(lambda: not store.leases)
    manager.flush(WAIT_MS)
    assert manager.statistics().remote.pages_written == 0, "pages that came from the store went back to it"


def test_local_blocks_are_not_read_again(store: MemoryStore) -> None:
    stored_by_another_worker(store, list(range(18)))
    manager = manager_on(store, 8)
    run(manager, list(range(9)))
    admission = run(manager, list(range(18)))
    assert (admission.local_tokens, admission.remote_tokens) == (8, 8)


@pytest.mark.parametrize("status", [PageStatus.CORRUPT, PageStatus.INCOMPLETE, PageStatus.MISSING, PageStatus.LEASE_EXPIRED])
@pytest.mark.parametrize("position", [0, 2, 3])
def test_a_page_that_is_not_whole_is_computed_and_those_behind_it_are_used(
    store: MemoryStore, status: PageStatus, position: int
) -> None:
    stored_by_another_worker(store, list(range(18)))
    store.read_status = lambda index: status if index == position else PageStatus.OK
    admission = run(manager_on(store, 8), list(range(18)))
    assert admission.remote_tokens == 3 * LAYOUT.block_tokens, "only the one that is not whole is computed"
    assert_eventually(lambda: not store.leases)


@pytest.mark.parametrize("call", ["register_layout", "match", "read", "write", "release"])
def test_a_call_that_raises_costs_hits_and_nothing_else(store: MemoryStore, call: str) -> None:
    stored_by_another_worker(store, list(range(18)))
    store.failing = [call]
    store.error = Unavailable("gone")
    manager = manager_on(store, 16)
    run(manager, list(range(18)))
    run(manager, list(range(100, 118)))
    assert manager.flush(WAIT_MS)
    assert manager.statistics().remote.failures >= 1
    assert "gone" in str(manager.statistics().remote.last_error)
    assert manager.statistics().pool.held == 0


def test_after_a_failure_the_store_is_left_alone_for_a_while(store: MemoryStore) -> None:
    clock = ManualClock()
    remote = RemoteTier(store, NAMESPACE, LAYOUT, deadline_ms=WAIT_MS, clock=clock)
    store.failing = ["match"]
    remote.match([])
    store.calls.clear()
    remote.match([])
    assert store.calls == []
    assert remote.statistics().skipped == 1
    clock.advance_ms(PAUSE_MS)
    remote.match([])
    assert store.calls == ["match"]


def test_a_full_store_is_counted_and_harmless(store: MemoryStore) -> None:
    store.write_verdict = PageStatus.NO_SPACE
    manager = manager_on(store, 8)
    run(manager, list(range(18)))
    assert manager.flush(WAIT_MS)
    assert manager.statistics().remote.pages_refused == 4
    assert run(manager, list(range(18))).local_tokens == 16


def test_blocks_of_a_read_that_timed_out_are_not_reused_before_it_is_over(store: MemoryStore) -> None:
    tokens = list(range(18))
    stored_by_another_worker(store, tokens)
    store.gate.clear()
    manager = manager_on(store, 16, planner=FixedPlanner(LoadPlan(0, 4, 4, deadline_ms=1)))
    table, load = admit(manager, tokens)
    assert admission_of(load).hit_tokens == 0
    assert manager.statistics().quarantined == 4
    assert manager.statistics().pool.held == 4 + 5
    fill(manager, table, load, tokens)
    store.gate.set()  # the late bytes arrive now, in blocks that no sequence holds
    assert_right(manager, table, tokens)
    manager.release(table)
    assert_eventually_idle(manager)
    assert run(manager, tokens).local_tokens == 16


def test_a_pool_that_a_hanging_read_holds_refuses_in_bounded_time_and_recovers(store: MemoryStore) -> None:
    tokens = list(range(18))
    stored_by_another_worker(store, tokens)
    store.gate.clear()
    manager = manager_on(store, 5, deadline_ms=1, planner=FixedPlanner(LoadPlan(0, 4, 4, deadline_ms=1)))
    table, _ = admit(manager, tokens)
    with pytest.raises(Overloaded):
        manager.grow(table, len(tokens))
    manager.release(table)
    manager.check()
    store.gate.set()
    assert_eventually_idle(manager)
    assert run(manager, tokens).remote_tokens == 16


def test_queued_writes_give_way_when_the_pool_is_needed(store: MemoryStore) -> None:
    manager = manager_on(store, 4)
    manager.connect()
    store.gate.clear()
    run(manager, list(range(5)))  # one block is in flight and waits at the gate
    assert_eventually(lambda: "write" in store.calls)
    run(manager, list(range(100, 112)))  # three are queued behind it
    run(manager, list(range(200, 212)))  # these need the queued ones' blocks
    assert manager.statistics().swap_out_dropped == 3
    store.gate.set()
    assert manager.flush(WAIT_MS)
    assert_eventually_idle(manager)


def test_a_pool_of_less_than_a_page_is_refused() -> None:
    with pytest.raises(PoolTooSmall, match=str(LAYOUT.page_bytes)):
        PagePool(LAYOUT, LAYOUT.page_bytes - 1)


def test_the_pool_never_holds_more_bytes_than_it_was_given() -> None:
    assert PagePool(LAYOUT, 3 * LAYOUT.page_bytes - 1).tensor.nbytes == 2 * LAYOUT.page_bytes


@pytest.mark.parametrize("seed", range(6))
def test_blocks_are_conserved_and_pages_are_right_under_random_faults(store: MemoryStore, seed: int) -> None:
    """Several live sequences with shared prefixes, a small pool and a store that fails in every way."""
    rng = random.Random(seed)
    manager = manager_on(store, 24)
    live: list[tuple[BlockTable, list[int]]] = []
    statuses = [PageStatus.OK] * 6 + [PageStatus.CORRUPT, PageStatus.INCOMPLETE, PageStatus.MISSING]
    store.read_status = lambda _: rng.choice(statuses)
    for _ in range(150):
        store.failing = rng.sample(["match", "read", "write", "release"], k=rng.choice([0, 0, 0, 1]))
        store.write_verdict = rng.choice([PageStatus.STORED, PageStatus.STORED, PageStatus.NO_SPACE])
        if live and rng.random() < 0.5:
            table, tokens = live.pop(rng.randrange(len(live)))
            assert_right(manager, table, tokens)
            manager.release(table)
        else:
            family = rng.randrange(3)
            tokens = [family, *range(rng.randrange(1, 24))]
            try:
                table, load = admit(manager, tokens)
            except Overloaded:
                continue
            try:
                fill(manager, table, load, tokens)
                live.append((table, tokens))
            except Overloaded:
                manager.release(table)
        for table, tokens in live:
            assert_right(manager, table, tokens)
    for table, _ in live:
        manager.release(table)
    assert manager.flush(WAIT_MS)
    assert_eventually_idle(manager)


def assert_eventually_idle(manager: CacheManager) -> None:
    """Waits for the end of all transfers; then no block is held."""
    assert_eventually(lambda: manager.flush(1) and manager.statistics().pool.held == 0)
    assert manager.statistics().quarantined == 0
    manager.check()


def assert_eventually(condition: Callable[[], bool]) -> None:
    """Polls, because another thread makes the condition true; the time that takes is not tested."""
    give_up_s = time.monotonic() + WAIT_MS / 1e3
    while not condition():
        assert time.monotonic() < give_up_s
        time.sleep(0.001)
