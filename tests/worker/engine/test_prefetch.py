"""Look-ahead prefetch: pages have arrived when a sequence's turn comes, and running sequences are not slowed."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable

import pytest

from attnstore.errors import InvalidArgument
from attnstore.types import PageStatus
from attnstore_worker.cache.planning.fixed_planners import AHEAD_BLOCKS, RecomputeAll
from attnstore_worker.engine import Engine, EngineOptions, SamplingParams, Sequence
from attnstore_worker.model import LoadedModel
from attnstore_worker.testing import MemoryStore

WAIT_MS = 30_000
HOW = SamplingParams(max_tokens=3)
LONG = SamplingParams(max_tokens=40)


def options(model: LoadedModel, blocks: int, sequences_max: int = 1, prefetch_sequences: int = 2) -> EngineOptions:
    return EngineOptions(
        pool_bytes=blocks * model.layout(16).page_bytes,
        chunk_tokens=64,
        sequences_max=sequences_max,
        prefetch_sequences=prefetch_sequences,
        store_deadline_ms=WAIT_MS,
    )


def prompt(seed: int, length: int = 200) -> list[int]:
    generator = random.Random(seed)
    return [generator.randrange(3, 49_000) for _ in range(length)]


def eventually(condition: Callable[[], bool]) -> None:
    """Waits until another thread makes the condition true. How soon it does is not tested."""
    give_up_s = time.monotonic() + WAIT_MS / 1e3
    while not condition():
        assert time.monotonic() < give_up_s
        time.sleep(0.001)


@pytest.fixture
def expected(tiny: LoadedModel, store: MemoryStore) -> dict[int, list[int]]:
    """The tokens behind three prompts of 12 blocks, whose pages are in the store."""
    with Engine(tiny, options(tiny, 60), store=store) as engine:
        tokens = {seed: engine.generate(prompt(seed), HOW).generated for seed in (1, 2, 3)}
        assert engine.flush(WAIT_MS)
    return tokens


def finish(engine: Engine, *sequences: Sequence) -> None:
    while any(sequence.finish_reason is None for sequence in sequences):
        engine.step()
        engine.check()
    eventually(lambda: engine.flush(1) and engine.statistics().pool.held == 0)
    engine.check()


@pytest.mark.usefixtures("each_device")
def test_the_pages_of_those_who_wait_are_in_the_pool_when_their_turn_comes(
    tiny: LoadedModel, store: MemoryStore, expected: dict[int, list[int]]
) -> None:
    with Engine(tiny, options(tiny, 60), store=store) as engine:
        running = engine.submit(prompt(9, 30), LONG)
        waiting = [engine.submit(prompt(seed), HOW) for seed in (1, 2, 3)]
        while len(running.generated) < 30:
            engine.step()
            engine.check()
            threading.Event().wait(0.002)  # lets the transfers run if there is one processor
        assert engine.statistics().remote.pages_read == 24, "two prompts of twelve blocks"
        finish(engine, running, *waiting)
        for sequence, seed in zip(waiting, (1, 2, 3), strict=True):
            assert sequence.generated == expected[seed]
            assert sequence.admission is not None
            assert sequence.admission.hit_tokens == 192
        assert waiting[0].admission is not None
        assert waiting[0].admission.local_tokens == 192


@pytest.mark.usefixtures("each_device")
def test_a_turn_that_comes_during_a_prefetch_keeps_what_has_arrived(
    tiny: LoadedModel, store: MemoryStore, expected: dict[int, list[int]]
) -> None:
    first_read, going_on = threading.Event(), threading.Event()

    def stall_in_the_second_read(index: int) -> PageStatus:
        if index == 0 and first_read.is_set():
            going_on.wait(WAIT_MS / 1e3)
        first_read.set()
        return PageStatus.OK

    with Engine(tiny, options(tiny, 60), store=store) as engine:
        running = engine.submit(prompt(9, 30), HOW)
        engine.step()
        store.read_status = stall_in_the_second_read
        waiting = engine.submit(prompt(1), HOW)
        engine.step()
        eventually(lambda: store.calls.count("read") >= 2)
        while running.finish_reason is None:
            engine.step()
        store.read_status = lambda _: PageStatus.OK
        engine.step()
        engine.check()
        assert engine.statistics().quarantined == 12 - AHEAD_BLOCKS
        going_on.set()
        finish(engine, waiting)
        assert waiting.generated == expected[1]
        assert waiting.admission is not None
        assert waiting.admission.local_tokens == AHEAD_BLOCKS * 16
        assert waiting.admission.remote_tokens == 192 - AHEAD_BLOCKS * 16


@pytest.mark.usefixtures("each_device")
def test_prefetching_gives_way_before_anyone_is_preempted(
    tiny: LoadedModel, store: MemoryStore, expected: dict[int, list[int]]
) -> None:
    """The pool has 18 blocks: the running sequence needs three and then six of them, the waiting one twelve."""
    going_on = threading.Event()

    def stall_behind_the_first_read(_: int) -> PageStatus:
        if store.calls.count("read") > 1:
            going_on.wait(WAIT_MS / 1e3)
        return PageStatus.OK

    store.calls.clear()
    store.read_status = stall_behind_the_first_read
    with Engine(tiny, options(tiny, 18, sequences_max=2), store=store) as engine:
        running = [engine.submit(prompt(seed, 30), LONG) for seed in (8, 9)]
        engine.step()
        waiting = engine.submit(prompt(1), HOW)
        while any(sequence.finish_reason is None for sequence in running):
            engine.step()
            engine.check()
        assert engine.batching().preemptions == 0
        going_on.set()
        finish(engine, waiting)
        assert waiting.generated == expected[1]


@pytest.mark.usefixtures("each_device")
def test_one_who_is_cancelled_while_waiting_leaves_nothing_behind(
    tiny: LoadedModel, store: MemoryStore, expected: dict[int, list[int]]
) -> None:
    del expected
    with Engine(tiny, options(tiny, 60), store=store) as engine:
        running = engine.submit(prompt(9, 30), LONG)
        engine.step()
        store.gate.clear()
        store.calls.clear()
        waiting = engine.submit(prompt(1), HOW)
        engine.step()
        eventually(lambda: "read" in store.calls)
        engine.cancel(waiting)
        assert engine.statistics().quarantined == AHEAD_BLOCKS
        store.gate.set()
        finish(engine, running)


@pytest.mark.usefixtures("each_device")
def test_nothing_is_prefetched_where_the_planner_or_the_options_say_so(
    tiny: LoadedModel, store: MemoryStore, expected: dict[int, list[int]]
) -> None:
    del expected
    store.calls.clear()
    with Engine(tiny, options(tiny, 60), store=store, planner=RecomputeAll()) as engine:
        finish(engine, *(engine.submit(prompt(seed), HOW) for seed in (1, 2)))
    assert "match" not in store.calls
    with Engine(tiny, options(tiny, 60, prefetch_sequences=0), store=store) as engine:
        running = engine.submit(prompt(9, 30), LONG)
        engine.submit(prompt(1), HOW)
        while running.finish_reason is None:
            engine.step()
        assert store.calls.count("match") == 1
    with pytest.raises(InvalidArgument, match="prefetch_sequences"):
        options(tiny, 60, prefetch_sequences=-1)
