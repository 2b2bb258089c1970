"""Loading beside computing: nobody waits for another's pages, and wherever both fronts meet the tokens are the same."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable

import pytest

from attnstore.clock import MonotonicClock
from attnstore.core.hashing import Namespace
from attnstore.core.layout import DType, PageLayout
from attnstore.types import PageStatus
from attnstore_worker.cache import CacheManager, PagePool, RemoteTier, admission_of
from attnstore_worker.cache.moving.load import FetchOrder, Load, LoadEnd, LoadPlan, LoadState, Planner
from attnstore_worker.cache.planning.observation import Answer, Step
from attnstore_worker.cache.pool.block_table import BlockTable
from attnstore_worker.cache.store.transfer import Transfer, TransferKind
from attnstore_worker.engine import Engine, EngineOptions, FinishReason, SamplingParams, Sequence
from attnstore_worker.model import LoadedModel
from attnstore_worker.testing import FixedPlanner, MemoryStore

LAYOUT = PageLayout(layers=2, kv_heads=1, head_dim=4, block_tokens=4, dtype=DType.FP32)
NAMESPACE = Namespace(b"n" * 32)
WAIT_MS = 30_000
HOUR_MS = 3_600_000.0
MEET = LoadPlan(0, 99, 4, HOUR_MS, FetchOrder.BACK_TO_FRONT, compute_before=99)


class Recorder:
    """Keeps every observation."""

    def __init__(self) -> None:
        self.transfers: list[Transfer] = []
        self.steps: list[Step] = []
        self.loads: list[Load] = []
        self.answers: list[Answer] = []

    def transferred(self, transfer: Transfer) -> None:
        self.transfers.append(transfer)

    def stepped(self, step: Step) -> None:
        self.steps.append(step)

    def loaded(self, load: Load) -> None:
        self.loads.append(load)

    def answered(self, answer: Answer) -> None:
        self.answers.append(answer)


class Turnstile:
    """Lets the store's pages through one by one, as many as were allowed."""

    def __init__(self, store: MemoryStore) -> None:
        self._permits = threading.Semaphore(0)
        store.read_status = self._pass

    def allow(self, pages: int) -> None:
        for _ in range(pages):
            self._permits.release()

    def _pass(self, _: int) -> PageStatus:
        assert self._permits.acquire(timeout=WAIT_MS / 1e3)
        return PageStatus.OK


def manager_on(store: MemoryStore, blocks: int, planner: Planner, recorder: Recorder | None = None) -> CacheManager:
    clock = MonotonicClock()
    remote = RemoteTier(store, NAMESPACE, LAYOUT, deadline_ms=WAIT_MS, clock=clock, observer=recorder)
    pages = PagePool(LAYOUT, blocks * LAYOUT.page_bytes)
    return CacheManager(pages, NAMESPACE, remote=remote, clock=clock, planner=planner, observer=recorder)


def content(tokens: list[int], block: int) -> bytes:
    return random.Random(repr(tokens[: (block + 1) * 4])).randbytes(LAYOUT.page_bytes)


def compute(manager: CacheManager, table: BlockTable, tokens: list[int], begin: int, end: int) -> None:
    """Blocks `[begin, end)`."""
    for block in range(begin, end):
        manager.pages.page(table.block_ids[block])[:] = content(tokens, block)
    manager.seal(table, tokens, end * 4)


def assert_right(manager: CacheManager, table: BlockTable, tokens: list[int], blocks: int) -> None:
    for block in range(blocks):
        assert manager.pages.page(table.block_ids[block]) == content(tokens, block)
    manager.check()


def eventually(condition: Callable[[], bool]) -> None:
    """Another thread makes the condition true; how soon is not the test's business."""
    give_up_s = time.monotonic() + WAIT_MS / 1e3
    while not condition():
        assert time.monotonic() < give_up_s
        time.sleep(0.001)


@pytest.fixture
def tokens(store: MemoryStore) -> list[int]:
    """A prompt of 16 blocks and one token, whose pages the store has."""
    prompt = list(range(65))
    manager = manager_on(store, 20, FixedPlanner(None))
    table, load = manager.admit(prompt, [])
    while not load.over:
        manager.loads.wait(5)
        manager.loads.advance(table, load, 0)
    compute(manager, table, prompt, 0, 16)
    assert manager.flush(WAIT_MS)
    manager.close()
    assert len(store.pages) == 16
    return prompt


def test_the_computed_front_meets_the_pages_that_arrive_from_the_back(store: MemoryStore, tokens: list[int]) -> None:
    turnstile, recorder = Turnstile(store), Recorder()
    store.calls.clear()
    manager = manager_on(store, 20, FixedPlanner(MEET), recorder)
    table, load = manager.admit(tokens, [])
    eventually(lambda: "read" in store.calls)
    assert manager.loads.advance(table, load, 0) == 0
    assert manager.loads.claim(load, 24) == 24
    compute(manager, table, tokens, 0, 6)
    turnstile.allow(4)  # blocks 12 to 15
    eventually(lambda: store.calls.count("read") == 2)
    assert manager.loads.advance(table, load, 24) == 24
    assert manager.loads.claim(load, 64) == 32, "blocks 8 to 11 are in flight"
    compute(manager, table, tokens, 6, 8)
    turnstile.allow(99)
    eventually(lambda: load.state is LoadState.FINISHED)
    assert manager.loads.advance(table, load, 32) == 64
    assert load.over
    assert_right(manager, table, tokens, 16)
    assert (admission_of(load).remote_tokens, admission_of(load).bytes_read) == (32, 8 * LAYOUT.page_bytes)
    assert [load.end for load in recorder.loads] == [LoadEnd.MET]
    assert store.calls.count("read") == 2, "what was computed was not fetched"
    manager.release(table)
    assert manager.flush(WAIT_MS)
    assert manager.statistics().pool.held == 0


def test_what_is_claimed_is_never_fetched_and_what_is_in_flight_never_claimed(store: MemoryStore, tokens: list[int]) -> None:
    turnstile = Turnstile(store)
    manager = manager_on(store, 20, FixedPlanner(MEET, searching=99))
    table, load = manager.admit(tokens, [])
    eventually(lambda: store.calls.count("read") == 1)
    assert manager.loads.claim(load, 64) == 48
    turnstile.allow(4)
    eventually(lambda: load.state is LoadState.FINISHED)
    assert manager.loads.claim(load, 64) == 48, "they have arrived, but were not taken yet"
    assert manager.loads.advance(table, load, 0) == 0
    assert manager.loads.claim(load, 64) == 48, "they are ready"
    compute(manager, table, tokens, 0, 12)
    assert manager.loads.advance(table, load, 48) == 64
    assert_right(manager, table, tokens, 16)


@pytest.mark.parametrize("order", FetchOrder)
@pytest.mark.parametrize("compute_before", [0, 99])
@pytest.mark.parametrize("lost", [set(), {0}, {5}, {15}, {3, 9}, set(range(16))])
def test_gaps_are_computed_whatever_the_plan(
    store: MemoryStore, tokens: list[int], order: FetchOrder, compute_before: int, lost: set[int]
) -> None:
    names = list(store.pages)
    pages_read: list[bytes] = []
    store.on_page = pages_read.append
    store.read_status = lambda _: PageStatus.CORRUPT if names.index(pages_read[-1]) in lost else PageStatus.OK
    manager = manager_on(store, 20, FixedPlanner(LoadPlan(0, 16, 3, HOUR_MS, order, compute_before)))
    table, load = manager.admit(tokens, [])
    computed = 0
    while computed < 64:
        computed = manager.loads.advance(table, load, computed)
        end = manager.loads.claim(load, min(64, (computed // 16 + 1) * 16))
        if end <= computed:
            manager.loads.wait(5)
            continue
        compute(manager, table, tokens, computed // 4, end // 4)
        computed = end
    assert_right(manager, table, tokens, 16)
    manager.loads.abandon(table, load)
    manager.release(table)
    eventually(lambda: manager.flush(1) and manager.statistics().pool.held == 0)
    manager.check()


def test_a_load_that_is_given_up_leaves_its_blocks_in_quarantine_and_the_sequence_gets_others(
    store: MemoryStore, tokens: list[int]
) -> None:
    turnstile, recorder = Turnstile(store), Recorder()
    planner = FixedPlanner(MEET)
    manager = manager_on(store, 24, planner, recorder)
    table, load = manager.admit(tokens, [])
    eventually(lambda: "read" in store.calls)
    before = list(table.block_ids)
    planner.gives_up = True
    assert manager.loads.advance(table, load, 0) == 0
    assert load.over
    assert recorder.loads[0].end is LoadEnd.LATE
    assert manager.statistics().quarantined == 4
    assert not set(before[12:16]) & set(table.block_ids)
    compute(manager, table, tokens, 0, 16)
    turnstile.allow(4)
    eventually(lambda: manager.flush(1) and manager.statistics().quarantined == 0)
    assert_right(manager, table, tokens, 16)


def test_a_table_without_blocks_to_replace_quarantined_ones_is_cut_and_can_grow_later(
    store: MemoryStore, tokens: list[int]
) -> None:
    turnstile = Turnstile(store)
    planner = FixedPlanner(MEET)
    manager = manager_on(store, 18, planner)
    table, load = manager.admit(tokens, [])
    eventually(lambda: "read" in store.calls)
    planner.gives_up = True
    manager.loads.advance(table, load, 0)
    assert len(table.block_ids) == 13, "12 before the quarantined ones, and the one that was free"
    manager.check()
    turnstile.allow(4)
    manager.grow(table, len(tokens))
    compute(manager, table, tokens, 0, 16)
    assert_right(manager, table, tokens, 16)


def test_what_was_measured_is_told(store: MemoryStore, tokens: list[int]) -> None:
    recorder = Recorder()
    manager = manager_on(store, 20, FixedPlanner(LoadPlan(0, 16, 8, HOUR_MS)), recorder)
    table, load = manager.admit(tokens, [])
    while not load.over:
        manager.loads.wait(5)
        manager.loads.advance(table, load, 0)
    told = [(transfer.kind, transfer.pages, transfer.bytes, transfer.failed) for transfer in recorder.transfers]
    assert told == [
        (TransferKind.MATCH, 16, 0, False),
        (TransferKind.READ, 8, 8 * LAYOUT.page_bytes, False),
        (TransferKind.READ, 8, 8 * LAYOUT.page_bytes, False),
    ]
    assert all(transfer.started_ms <= transfer.ended_ms for transfer in recorder.transfers)
    assert [(load.end, load.arrived_blocks, load.bytes_read) for load in recorder.loads] == [
        (LoadEnd.COMPLETE, 16, 16 * LAYOUT.page_bytes)
    ]


def options(model: LoadedModel, blocks: int, chunk_tokens: int = 64) -> EngineOptions:
    return EngineOptions(pool_bytes=blocks * model.layout(16).page_bytes, chunk_tokens=chunk_tokens, store_deadline_ms=WAIT_MS)


def prompt(seed: int, length: int) -> list[int]:
    generator = random.Random(seed)
    return [generator.randrange(3, 49_000) for _ in range(length)]


def stored(model: LoadedModel, store: MemoryStore, token_ids: list[int], how: SamplingParams) -> list[int]:
    """The tokens after a prompt, whose pages are in the store then."""
    with Engine(model, options(model, 40), store=store) as engine:
        generated = engine.generate(token_ids, how).generated
        assert engine.flush(WAIT_MS)
    return generated


def test_others_decode_while_one_waits_for_its_pages(tiny: LoadedModel, store: MemoryStore) -> None:
    how = SamplingParams(max_tokens=12)
    expected = stored(tiny, store, prompt(1, 100), how)
    with Engine(tiny, options(tiny, 40), store=store) as engine:
        other = engine.submit(prompt(2, 30), how)
        while not other.generated:
            engine.step()
        store.gate.clear()
        waiting = engine.submit(prompt(1, 100), how)
        while other.finish_reason is None:
            engine.step()
            engine.check()
        assert engine.batching().loading == 1
        assert (waiting.computed_tokens, waiting.generated) == (0, [])
        store.gate.set()
        while waiting.finish_reason is None:
            engine.step()
        assert waiting.generated == expected
        assert waiting.admission is not None
        assert waiting.admission.remote_tokens == 96


def test_a_step_with_nothing_but_loads_waits_and_is_woken_by_their_end(
    tiny: LoadedModel, store: MemoryStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the bound of the waiting out of the way, a step that spun or missed its wake-up would be seen."""
    monkeypatch.setattr("attnstore_worker.engine.residency._IDLE_MS", WAIT_MS)
    how = SamplingParams(max_tokens=2)
    expected = stored(tiny, store, prompt(1, 100), how)
    with Engine(tiny, options(tiny, 40), store=store) as engine:
        engine.warm_up()
        store.gate.clear()
        sequence = engine.submit(prompt(1, 100), how)
        opening = threading.Timer(0.2, store.gate.set)
        opening.start()
        steps = 0
        while sequence.finish_reason is None:
            engine.step()
            steps += 1
        opening.join()
    assert sequence.generated == expected
    assert steps <= 5, "the swap-in says something at most when its read is over and when it ends; then two tokens"


def test_a_waiting_step_can_be_woken(tiny: LoadedModel, store: MemoryStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("attnstore_worker.engine.residency._IDLE_MS", WAIT_MS)
    stored(tiny, store, prompt(1, 100), SamplingParams(max_tokens=2))
    with Engine(tiny, options(tiny, 40), store=store) as engine:
        store.gate.clear()
        sequence = engine.submit(prompt(1, 100))
        waking = threading.Timer(0.2, engine.wake)
        waking.start()
        assert engine.step() == []
        waking.join()
        engine.cancel(sequence)
        assert sequence.finish_reason is FinishReason.CANCELLED
        assert engine.idle
        engine.check()


@pytest.mark.parametrize("order", FetchOrder)
@pytest.mark.parametrize("batch_blocks", [1, 3, 99])
def test_tokens_are_right_wherever_computing_and_fetching_meet(
    tiny: LoadedModel, store: MemoryStore, order: FetchOrder, batch_blocks: int
) -> None:
    how = SamplingParams(max_tokens=8)
    token_ids = prompt(3, 330)
    expected = stored(tiny, store, token_ids, how)
    for permits in (0, 1, 5, 12, 99):
        turnstile = Turnstile(store)
        plan = LoadPlan(2, 18, batch_blocks, HOUR_MS, order, 99)
        planner = FixedPlanner(plan, searching=99)
        with Engine(tiny, options(tiny, 40, chunk_tokens=32), store=store, planner=planner) as engine:
            turnstile.allow(permits)
            sequence = engine.submit(token_ids, how)
            for _ in range(8):
                engine.step()
                engine.check()
            turnstile.allow(99)
            while sequence.finish_reason is None:
                engine.step()
                engine.check()
            assert sequence.generated == expected


def test_cancelling_a_loading_sequence_gives_back_all_but_what_is_in_flight(tiny: LoadedModel, store: MemoryStore) -> None:
    stored(tiny, store, prompt(1, 200), SamplingParams(max_tokens=2))
    turnstile = Turnstile(store)
    planner = FixedPlanner(LoadPlan(0, 12, 4, HOUR_MS))
    with Engine(tiny, options(tiny, 40), store=store, planner=planner) as engine:
        sequence: Sequence = engine.submit(prompt(1, 200))
        store.calls.clear()
        while "read" not in store.calls:
            engine.step()
        engine.cancel(sequence)
        assert engine.statistics().pool.held == 4
        assert engine.statistics().quarantined == 4
        engine.check()
        turnstile.allow(4)
        eventually(lambda: engine.flush(1) and engine.statistics().pool.held == 0)
        assert store.calls.count("read") == 1, "the rest was not fetched"
        engine.check()
