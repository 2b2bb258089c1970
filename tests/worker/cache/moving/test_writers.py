"""The write policies: when pages reach the store, and that waiting for a store is bounded."""

from __future__ import annotations

import random

import pytest

from attnstore.errors import InvalidArgument
from attnstore_worker.cache.moving.writers import STAGED_PAGES
from attnstore_worker.engine import Engine, EngineOptions, SamplingParams
from attnstore_worker.model import LoadedModel
from attnstore_worker.options import WRITE_POLICIES
from attnstore_worker.testing import MemoryStore

WAIT_MS = 30_000
ONE = SamplingParams(max_tokens=1)


def options(model: LoadedModel, blocks: int, write_policy: str, deadline_ms: int = WAIT_MS) -> EngineOptions:
    return EngineOptions(
        pool_bytes=blocks * model.layout(16).page_bytes,
        chunk_tokens=64,
        write_policy=write_policy,
        store_deadline_ms=deadline_ms,
    )


def prompt(seed: int, length: int = 100) -> list[int]:
    generator = random.Random(seed)
    return [generator.randrange(3, 49_000) for _ in range(length)]


@pytest.mark.usefixtures("each_device")
def test_with_write_through_a_token_is_given_when_its_pages_are_in_the_store(tiny: LoadedModel, store: MemoryStore) -> None:
    with Engine(tiny, options(tiny, 40, "write-through"), store=store) as engine:
        engine.generate(prompt(1), ONE)
        assert len(store.pages) == 6
        assert engine.statistics().swap_out_pending == 0


@pytest.mark.usefixtures("each_device")
def test_write_through_waits_for_a_hanging_store_no_longer_than_its_deadline(tiny: LoadedModel, store: MemoryStore) -> None:
    with Engine(tiny, options(tiny, 40, "write-behind")) as engine:
        expected = engine.generate(prompt(1), ONE).generated
    store.gate.clear()
    with Engine(tiny, options(tiny, 40, "write-through", deadline_ms=20), store=store) as engine:
        assert engine.generate(prompt(1), ONE).generated == expected
        assert engine.statistics().swap_out_pending == 6
        store.gate.set()
        assert engine.flush(WAIT_MS)
        engine.check()
        assert len(store.pages) == 6


@pytest.mark.usefixtures("each_device")
def test_with_on_evict_the_store_gets_what_the_pool_loses_and_that_once(tiny: LoadedModel, store: MemoryStore) -> None:
    with Engine(tiny, options(tiny, 8, "on-evict"), store=store) as engine:
        expected = engine.generate(prompt(1), ONE).generated
        assert engine.flush(WAIT_MS)
        assert not store.pages, "all fits into the pool"
        engine.generate(prompt(2), ONE)
        assert engine.flush(WAIT_MS)
        assert len(store.pages) == engine.statistics().pool.evicted > 0
        again = engine.generate(prompt(1), ONE)
        assert again.generated == expected
        assert again.admission is not None
        assert again.admission.remote_tokens > 0
        written = engine.statistics().remote.pages_written
        engine.generate(prompt(3), ONE)
        engine.generate(prompt(4), ONE)
        assert engine.flush(WAIT_MS)
        assert engine.statistics().remote.pages_written == len(store.pages) > written, "nothing was written twice"
        engine.check()


def test_a_full_staging_pool_costs_pages_and_nothing_else(tiny: LoadedModel, store: MemoryStore) -> None:
    store.gate.clear()
    with Engine(tiny, options(tiny, 40, "on-evict"), store=store) as engine:
        for seed in range(20):
            engine.generate(prompt(seed), ONE)
            engine.check()
        statistics = engine.statistics()
        assert statistics.swap_out_pending == STAGED_PAGES
        assert statistics.swap_out_dropped == statistics.pool.evicted - STAGED_PAGES > 0
        assert statistics.pool.held == 0
        store.gate.set()
        assert engine.flush(WAIT_MS)


@pytest.mark.usefixtures("each_device")
@pytest.mark.parametrize("write_policy", WRITE_POLICIES)
def test_without_a_store_every_policy_keeps_to_the_pool(tiny: LoadedModel, write_policy: str) -> None:
    with Engine(tiny, options(tiny, 8, write_policy)) as engine:
        for seed in (1, 2, 1):
            engine.generate(prompt(seed), ONE)
        assert engine.flush(0)
        assert engine.statistics().swap_out_dropped == 0
        engine.check()


def test_an_unknown_policy_is_refused(tiny: LoadedModel) -> None:
    with pytest.raises(InvalidArgument, match="'write-around' is unknown"):
        Engine(tiny, options(tiny, 8, "write-around"))
