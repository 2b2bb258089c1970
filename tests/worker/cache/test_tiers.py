"""Sequences over all tiers: the tokens are those of a run alone, whether pages come from HOST, a node's memory or a network."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

import attnstore
from attnstore.clock import MonotonicClock
from attnstore.core.eviction import EVICTION_POLICIES, LookAhead
from attnstore.core.hashing import Namespace
from attnstore.core.layout import DType, PageLayout
from attnstore.errors import InvalidArgument, Overloaded
from attnstore.testing import StoreProcess
from attnstore_worker.cache import Admission, CacheManager, Load, PagePool, PageStore, RemoteTier, Tier, admission_of
from attnstore_worker.cache.pool.block_table import BlockTable
from attnstore_worker.cache.pool.host_tier import HostTier
from attnstore_worker.engine import Engine, EngineOptions, SamplingParams, Sequence
from attnstore_worker.model import LoadedModel
from attnstore_worker.options import SharedUse
from attnstore_worker.testing import MemoryStore
from tests.samples import eventually, make_batch

WAIT_MS = 30_000
LAYOUT = PageLayout(layers=2, kv_heads=1, head_dim=4, block_tokens=4, dtype=DType.FP32)
NAMESPACE = Namespace(b"n" * 32)
HOW = SamplingParams(max_tokens=12)


def content(tokens: list[int], index: int) -> bytes:
    return random.Random(repr(tokens[: (index + 1) * LAYOUT.block_tokens])).randbytes(LAYOUT.page_bytes)


def manager_of(blocks: int, host_blocks: int, store: MemoryStore | None = None, host: HostTier | None = None) -> CacheManager:
    clock = MonotonicClock()
    remote = RemoteTier(store, NAMESPACE, LAYOUT, deadline_ms=WAIT_MS, clock=clock) if store is not None else None
    host = host or HostTier(LAYOUT, host_blocks * LAYOUT.page_bytes)
    return CacheManager(PagePool(LAYOUT, blocks * LAYOUT.page_bytes), NAMESPACE, remote=remote, clock=clock, host=host)


def loaded(manager: CacheManager, tokens: list[int]) -> tuple[BlockTable, Load]:
    """Admits a prompt, takes and checks the pages that the tiers have, and computes the rest."""
    table, load = manager.admit(tokens, [])
    done = manager.loads.advance(table, load, table.sealed * LAYOUT.block_tokens)
    while not load.over:
        manager.loads.wait(1)
        done = manager.loads.advance(table, load, done)
    for index in range(table.sealed):
        assert manager.pages.page(table.block_ids[index]) == content(tokens, index)
    for index in range(table.sealed, len(tokens) // LAYOUT.block_tokens):
        manager.pages.page(table.block_ids[index])[:] = content(tokens, index)
    manager.seal(table, tokens, len(tokens))
    manager.check()
    return table, load


def run(manager: CacheManager, tokens: list[int]) -> Admission:
    table, load = loaded(manager, tokens)
    manager.release(table)
    manager.check()
    return admission_of(load)


def prompt_of(family: int, blocks: int = 4) -> list[int]:
    return [1000 * family + index for index in range(blocks * LAYOUT.block_tokens + 1)]


def test_what_hbm_evicts_comes_back_from_host_with_no_store() -> None:
    manager = manager_of(blocks=6, host_blocks=16)
    first = run(manager, prompt_of(1))
    run(manager, prompt_of(2))
    again = run(manager, prompt_of(1))
    assert (first.hit_tokens, again.hit_tokens) == (0, 16)
    assert again.host_tokens > 0
    tiers = manager.statistics().tiers
    assert tiers[Tier.HOST].hit_tokens == again.host_tokens
    assert tiers[Tier.HOST].bytes_read == again.host_tokens // LAYOUT.block_tokens * LAYOUT.page_bytes
    assert tiers[Tier.HBM].hit_tokens == 16 - again.host_tokens
    assert tiers[Tier.HBM].evicted_blocks > 0
    assert tiers[Tier.REMOTE].queried_tokens == 0


def test_host_is_asked_before_the_store() -> None:
    store = MemoryStore()
    manager = manager_of(blocks=6, host_blocks=16, store=store)
    run(manager, prompt_of(1))
    run(manager, prompt_of(2))
    assert manager.flush(WAIT_MS)
    reads = store.calls.count("read")
    assert run(manager, prompt_of(1)).host_tokens > 0
    assert store.calls.count("read") == reads
    manager.close()


def test_what_host_evicts_comes_back_from_the_store() -> None:
    store = MemoryStore()
    manager = manager_of(blocks=6, host_blocks=2, store=store)
    for family in range(4):
        run(manager, prompt_of(family))
        assert manager.flush(WAIT_MS)
    again = run(manager, prompt_of(0))
    assert (again.hit_tokens, again.remote_tokens) == (16, 16)
    tiers = manager.statistics().tiers
    assert tiers[Tier.HOST].evicted_blocks > 0
    assert tiers[Tier.REMOTE].hit_tokens == 16
    manager.close()


def test_blocks_of_hbm_host_and_store_make_one_prefix() -> None:
    """The tail of a prefix is evicted first, from HBM and from HOST: its head is in HBM, its middle in HOST, its end
    in the store.
    """
    store = MemoryStore()
    tokens = prompt_of(1, blocks=8)
    manager = manager_of(blocks=10, host_blocks=3, store=store)
    for each in (tokens, prompt_of(2, blocks=6)):
        table, _ = loaded(manager, each)
        assert manager.flush(WAIT_MS)  # otherwise the order in which they were written would be that of their use
        manager.release(table)
    again = run(manager, tokens)
    by_tier = again.hit_tokens_by_tier()
    assert again.hit_tokens == 32
    assert all(by_tier[tier] > 0 for tier in (Tier.HBM, Tier.HOST, Tier.REMOTE))
    manager.close()


def test_a_prefix_whose_head_is_in_host_and_whose_tail_is_in_hbm_is_found_whole() -> None:
    manager = manager_of(blocks=9, host_blocks=16)
    long = prompt_of(1, blocks=6)
    run(manager, long[:9])
    run(manager, prompt_of(2, blocks=7))
    assert run(manager, long).host_tokens > 0
    assert run(manager, long).hit_tokens == 24


def test_host_hits_that_find_no_room_hold_nothing() -> None:
    manager = manager_of(blocks=6, host_blocks=16)
    run(manager, prompt_of(1))
    holder, _ = loaded(manager, prompt_of(2))
    with pytest.raises(Overloaded):
        manager.admit(prompt_of(1), [])
    manager.check()
    manager.release(holder)
    assert run(manager, prompt_of(1)).hit_tokens == 16


def test_what_a_waiting_prompt_will_use_is_spared_in_host_too() -> None:
    manager = manager_of(6, 0, host=HostTier(LAYOUT, 5 * LAYOUT.page_bytes, LookAhead()))
    waiting = prompt_of(1)
    run(manager, waiting)
    run(manager, prompt_of(2))
    hashes: list[attnstore.BlockHash] = []
    announced = manager.announce(waiting, hashes)
    for family in range(3, 6):
        run(manager, prompt_of(family))
    manager.settle(announced)
    assert run(manager, waiting).hit_tokens == 16


@pytest.mark.parametrize("seed", range(4))
def test_pages_are_right_and_conserved_in_every_tier_after_any_history(seed: int) -> None:
    print(f"seed {seed}")
    rng = random.Random(seed)
    store = MemoryStore()
    manager = manager_of(blocks=14, host_blocks=6, store=store)
    live: list[BlockTable] = []
    for _ in range(120):
        if live and rng.random() < 0.5:
            manager.release(live.pop(rng.randrange(len(live))))
        else:
            try:
                live.append(loaded(manager, prompt_of(rng.randrange(5), blocks=rng.randrange(1, 6)))[0])
            except Overloaded:
                manager.release(live.pop())
        manager.check()
        if rng.random() < 0.2:
            store.pages = {name: page for name, page in store.pages.items() if rng.random() < 0.7}
    for table in live:
        manager.release(table)
    assert manager.flush(WAIT_MS)
    assert eventually(lambda: manager.flush(1) and manager.statistics().pool.held == 0)
    manager.check()
    manager.close()


def prompts(count: int, tokens: int) -> list[list[int]]:
    rng = random.Random(5)
    return [[rng.randrange(1000) for _ in range(tokens)] for _ in range(count)]


def options(model: LoadedModel, blocks: int, host_blocks: int = 0, shared: SharedUse = SharedUse.COPY) -> EngineOptions:
    page_bytes = model.layout(16).page_bytes
    return EngineOptions(
        pool_bytes=blocks * page_bytes, host_pool_bytes=host_blocks * page_bytes, chunk_tokens=64, shared=shared, sequences_max=8
    )


def alone(model: LoadedModel, prompts: list[list[int]], how: SamplingParams = HOW) -> list[list[int]]:
    """Returns the tokens of each prompt in an engine of its own, with room for everything."""
    return [_generated(model, options(model, 40), None, [each], how)[0] for each in prompts]


def _generated(
    model: LoadedModel, options: EngineOptions, store: PageStore | None, prompts: list[list[int]], how: SamplingParams = HOW
) -> list[list[int]]:
    with Engine(model, options, store=store) as engine:
        sequences = engine.generate_all(prompts, how)
        assert engine.flush(WAIT_MS)
        engine.check()
        assert engine.statistics().pool.held == 0
        return [sequence.generated for sequence in sequences]


@pytest.mark.usefixtures("each_device")
@pytest.mark.parametrize("eviction", EVICTION_POLICIES)
def test_eight_sequences_with_a_quarter_of_the_pool_they_need_give_the_tokens_of_a_run_alone(
    tiny: LoadedModel, eviction: str
) -> None:
    each = prompts(8, 100)
    expected = alone(tiny, each)
    needed = 8 * -(-(100 + HOW.max_tokens) // 16)
    with Engine(tiny, replace(options(tiny, needed // 4, host_blocks=needed), eviction=eviction)) as engine:
        sequences = [engine.submit(tokens, HOW) for tokens in each * 2]
        while not engine.idle:
            engine.step()
            engine.check()
        assert [sequence.generated for sequence in sequences] == expected * 2
        tiers = engine.statistics().tiers
        assert tiers[Tier.HOST].hit_tokens > 0
        assert tiers[Tier.HOST].hit_tokens + tiers[Tier.HBM].hit_tokens >= 8 * 96


@pytest.fixture
def node() -> Iterator[StoreProcess]:
    with StoreProcess("--capacity", "4MiB") as node:
        yield node


def warmed(model: LoadedModel, node: StoreProcess, each: list[list[int]]) -> list[list[int]]:
    """Puts the pages of the prompts into the node; returns the tokens of each."""
    with attnstore.connect(node.url, deadline_ms=WAIT_MS) as store:
        return _generated(model, options(model, 40), store, each)


def admission(sequence: Sequence) -> Admission:
    assert sequence.admission is not None
    return sequence.admission


def test_pages_used_in_place_give_the_same_tokens_and_take_no_room_in_the_pool(tiny: LoadedModel, node: StoreProcess) -> None:
    each = prompts(3, 100)
    expected = warmed(tiny, node, each)
    with (
        attnstore.connect(node.url, deadline_ms=WAIT_MS) as store,
        Engine(tiny, options(tiny, 8, shared=SharedUse.IN_PLACE), store=store) as engine,
    ):
        for tokens, wanted in zip(each, expected, strict=True):
            sequence = engine.submit(tokens, HOW)
            held = 0
            while sequence.finish_reason is None:
                engine.step()
                engine.check()
                if len(sequence.generated) == 4:
                    held = engine.statistics().pool.held
            assert sequence.generated == wanted
            assert (admission(sequence).shared_tokens, admission(sequence).bytes_read) == (96, 0)
            assert held <= 1, "6 of 7 blocks are the node's"
            assert sequence.blocks_used == 1
        tiers = engine.statistics().tiers
        assert (tiers[Tier.SHARED].hit_tokens, tiers[Tier.SHARED].bytes_read) == (288, 0)
        assert tiers[Tier.REMOTE].hit_tokens == 0
        assert eventually(lambda: store.stats().leases == 0), "every lease was released"


def test_pages_copied_from_a_node_of_this_host_count_as_shared(tiny: LoadedModel, node: StoreProcess) -> None:
    each = prompts(1, 100)
    expected = warmed(tiny, node, each)
    for transport, tier in (("auto", Tier.SHARED), ("tcp", Tier.REMOTE), ("grpc", Tier.REMOTE)):
        with (
            attnstore.connect(node.url, deadline_ms=WAIT_MS, transport=transport) as store,
            Engine(tiny, options(tiny, 8), store=store) as engine,
        ):
            sequence = engine.generate(each[0], HOW)
            assert sequence.generated == expected[0]
            assert admission(sequence).hit_tokens_by_tier()[tier] == 96
            assert engine.statistics().tiers[tier].bytes_read == 6 * tiny.layout(16).page_bytes


def test_many_sequences_over_pages_in_place_and_their_own(tiny: LoadedModel, node: StoreProcess) -> None:
    known, new = prompts(8, 90)[:4], prompts(8, 90)[4:]
    warmed(tiny, node, known)
    mixed = [*known, *new, *(tokens[:50] + [7] * 40 for tokens in known)]
    expected = alone(tiny, mixed)
    with attnstore.connect(node.url, deadline_ms=WAIT_MS) as store:
        assert _generated(tiny, options(tiny, 30, host_blocks=10, shared=SharedUse.IN_PLACE), store, mixed) == expected


def flood(store: attnstore.Client, model: LoadedModel) -> None:
    """Recycles every unleased slot of the node."""
    batch = make_batch(1024, model=f"flood {os.urandom(8).hex()}", layout=model.layout(16))
    store.register_layout(batch.namespace, batch.layout)
    store.write(batch.namespace, batch.hashes, batch.pages)


def test_a_sequence_whose_pages_are_recycled_under_it_computes_again_and_gives_the_same_tokens(
    tiny: LoadedModel, node: StoreProcess
) -> None:
    """Another client ends the lease, which no correct client would do, and others fill the node's memory."""
    each = prompts(2, 100)
    expected = warmed(tiny, node, each)
    with (
        attnstore.connect(node.url, deadline_ms=WAIT_MS) as store,
        Engine(tiny, options(tiny, 20, shared=SharedUse.IN_PLACE), store=store) as engine,
    ):
        sequences = [engine.submit(tokens, HOW) for tokens in each]
        while any(len(sequence.generated) < 3 for sequence in sequences):
            engine.step()
        victim = sequences[1]
        assert victim.table is not None
        assert victim.table.lent is not None
        with attnstore.connect(node.url, deadline_ms=WAIT_MS) as other:
            other.release(victim.table.lent.lease.lease)
            flood(other, tiny)
        while any(sequence.finish_reason is None for sequence in sequences):
            engine.step()
            engine.check()
        assert [sequence.generated for sequence in sequences] == expected
        assert [sequence.preemptions for sequence in sequences] == [0, 1]


@pytest.mark.parametrize("when", ["before a step", "during a step"])
def test_pages_recycled_around_a_step_cost_its_result(
    tiny: LoadedModel, node: StoreProcess, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    each = prompts(1, 100)
    expected = warmed(tiny, node, each)
    with (
        attnstore.connect(node.url, deadline_ms=WAIT_MS) as store,
        attnstore.connect(node.url, deadline_ms=WAIT_MS) as other,
        Engine(tiny, options(tiny, 20, shared=SharedUse.IN_PLACE), store=store) as engine,
    ):
        sequence = engine.submit(each[0], HOW)
        while len(sequence.generated) < 3:
            engine.step()
        assert sequence.table is not None
        assert sequence.table.lent is not None
        lease = sequence.table.lent.lease.lease

        def recycle(*_: object) -> None:
            other.release(lease)
            flood(other, tiny)

        if when == "before a step":
            recycle()
            engine.step()
        else:
            decoder = engine.model.decoder
            compute = decoder.logits

            def recycled_at_the_end(*arguments: object) -> object:
                logits = compute(*arguments)  # type: ignore[arg-type]
                recycle()
                return logits

            monkeypatch.setattr(decoder, "logits", recycled_at_the_end)
            assert engine.step() == []
            monkeypatch.setattr(decoder, "logits", compute)
        while sequence.finish_reason is None:
            engine.step()
            engine.check()
        assert sequence.generated == expected[0]
        assert sequence.preemptions == 1


def test_a_node_killed_under_its_pages_costs_no_token(tiny: LoadedModel) -> None:
    each = prompts(2, 100)
    with StoreProcess("--capacity", "4MiB") as node:
        expected = warmed(tiny, node, each)
        with (
            attnstore.connect(node.url, deadline_ms=2_000) as store,
            Engine(tiny, replace(options(tiny, 20, shared=SharedUse.IN_PLACE), store_deadline_ms=2_000), store=store) as engine,
        ):
            first = engine.submit(each[0], HOW)
            while len(first.generated) < 3:
                engine.step()
            assert admission(first).shared_tokens == 96
            node.kill()
            second = engine.submit(each[1], HOW)
            while not engine.idle:
                engine.step()
            assert [first.generated, second.generated] == expected
            engine.check()


def test_a_cancelled_sequence_gives_its_lease_back(tiny: LoadedModel, node: StoreProcess) -> None:
    each = prompts(1, 100)
    warmed(tiny, node, each)
    with (
        attnstore.connect(node.url, deadline_ms=WAIT_MS) as store,
        Engine(tiny, options(tiny, 20, shared=SharedUse.IN_PLACE), store=store) as engine,
    ):
        for steps in range(4):
            sequence = engine.submit(each[0], HOW)
            for _ in range(steps):
                engine.step()
            engine.cancel(sequence)
            engine.check()
        assert eventually(lambda: store.stats().leases == 0)
        assert engine.statistics().pool.held == 0


def test_a_store_that_cannot_lend_is_refused_and_a_node_that_cannot_is_copied_from(tiny: LoadedModel) -> None:
    in_place = options(tiny, 20, shared=SharedUse.IN_PLACE)
    with pytest.raises(InvalidArgument, match="lends no pages"):
        Engine(tiny, in_place, store=MemoryStore())
    each = prompts(1, 100)
    with StoreProcess("--capacity", "4MiB", "--transports", "tcp") as node:
        expected = warmed(tiny, node, each)
        with attnstore.connect(node.url, deadline_ms=WAIT_MS) as store, Engine(tiny, in_place, store=store) as engine:
            sequence = engine.generate(each[0], HOW)
            assert sequence.generated == expected[0]
            assert admission(sequence).hit_tokens_by_tier()[Tier.REMOTE] == 96


def test_an_arena_in_a_file_lends_its_pages_to_a_worker_that_names_it(tiny: LoadedModel, tmp_path: Path) -> None:
    path = tmp_path / "arena"
    each = prompts(1, 100)
    with StoreProcess("--capacity", "4MiB", "--arena-path", str(path)) as node:
        expected = warmed(tiny, node, each)
        with (
            attnstore.connect(node.url, deadline_ms=WAIT_MS, shared_path=path) as store,
            Engine(tiny, options(tiny, 8, shared=SharedUse.IN_PLACE), store=store) as engine,
        ):
            sequence = engine.generate(each[0], HOW)
            assert sequence.generated == expected[0]
            assert (admission(sequence).shared_tokens, admission(sequence).bytes_read) == (96, 0)
