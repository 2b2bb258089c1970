"""What copies to a device cost: told by its own timer, waited for by nobody, and part of every forecast."""

from __future__ import annotations

from typing import Final

import pytest

from attnstore.core.hashing import Namespace, block_hashes
from attnstore.core.layout import DType, PageLayout
from attnstore.testing import ManualClock
from attnstore_worker.cache import CostPlanner, Observer, create_cache
from attnstore_worker.cache.moving.load import FetchOrder, LoadPlan, Planner, Prompt
from attnstore_worker.cache.moving.staging import part_pages
from attnstore_worker.cache.planning.decisions import Decision
from attnstore_worker.cache.planning.estimators import PrefillCost
from attnstore_worker.cache.planning.observation import Answer, Step, Unobserved
from attnstore_worker.cache.planning.split import Choice
from attnstore_worker.cache.pool.device_blocks import DeviceBlocks
from attnstore_worker.cache.pool.tier import Tier
from attnstore_worker.cache.store.transfer import Transfer, TransferKind
from attnstore_worker.device.base import Device, Wait
from attnstore_worker.device.host import HostDevice
from attnstore_worker.device.simulated import Schedule, SimulatedDevice
from attnstore_worker.errors import DeviceLost
from attnstore_worker.options import EngineOptions
from attnstore_worker.testing import FixedPlanner, MemoryStore
from experiments.device_faults.nodes import Copied, Lends
from tests.samples import eventually

LAYOUT: Final = PageLayout(layers=2, kv_heads=2, head_dim=32, block_tokens=16, dtype=DType.BF16)
NAMESPACE: Final = Namespace(b"c" * 32)
CHUNK_TOKENS: Final = 64
COST: Final = PrefillCost(chunk_ms=1.0, token_ms=0.4, pair_ms=0.0)
PAGE_MS: Final = 0.05
"""What the store takes for a page, which is computed in 6.4 ms."""
FAST, SLOW = 100.0 * LAYOUT.page_bytes, LAYOUT.page_bytes / 1_000.0
"""Bytes per ms."""
BLOCKS: Final = 70
WAIT_MS: Final = 30_000


class Transfers(Unobserved):
    def __init__(self) -> None:
        self.all: list[Transfer] = []

    def transferred(self, transfer: Transfer) -> None:
        self.all.append(transfer)

    def of(self, kind: TransferKind) -> list[Transfer]:
        return [transfer for transfer in self.all if transfer.kind is kind]


class Worker:
    """A cache on a device, beside a store with the pages of every prompt. Time passes as the store and the chunks say."""

    def __init__(self, device: Device, planner: Planner, observer: Observer, clock: ManualClock, *, host: bool = False) -> None:
        self.clock = clock
        self.store = MemoryStore()
        self.store.on_page = lambda _: clock.advance_ms(PAGE_MS)
        pool_bytes = 2 * BLOCKS * LAYOUT.page_bytes
        options = EngineOptions(pool_bytes=pool_bytes, host_pool_bytes=pool_bytes if host else 0, chunk_tokens=CHUNK_TOKENS)
        self.manager = create_cache(
            LAYOUT,
            NAMESPACE,
            options,
            store=None if host else self.store,
            clock=clock,
            planner=planner,
            observer=observer,
            device=device,
        )
        self._observer = observer

    def run(self, number: int) -> None:
        """A prompt to its first token; all its pages are in the store, and none is in the pool."""
        tokens = [1_000 * number + at for at in range(BLOCKS * LAYOUT.block_tokens + 1)]
        for name in block_hashes(NAMESPACE, tokens, LAYOUT.block_tokens):
            self.store.pages[name] = bytes(LAYOUT.page_bytes)
        began_ms, loads = self.clock.now_ms(), self.manager.loads
        table, load = self.manager.admit(tokens, [])
        done = table.sealed * LAYOUT.block_tokens
        while done < len(tokens):
            done = loads.advance(table, load, done)
            end = min(len(tokens), (done // CHUNK_TOKENS + 1) * CHUNK_TOKENS)
            claimed = loads.claim(load, end) if not load.over else end
            if claimed > done:
                self.manager.before_step()
                self.clock.advance_ms(COST.chunk(done, claimed))
                done = claimed
                self.manager.seal(table, tokens, done)
            else:
                loads.wait(1)
        loads.abandon(table, load)
        self._observer.answered(Answer(load.prompt, began_ms, self.clock.now_ms()))
        self.manager.release(table)
        assert self.manager.flush(WAIT_MS)
        self.manager.drop_cached()
        self.manager.check()


class Planned(Worker):
    """A worker that knows the cost of computing."""

    def __init__(self, device: Device) -> None:
        clock = ManualClock(1_000.0)
        self.planner = CostPlanner(clock, CHUNK_TOKENS)
        for begin in range(0, BLOCKS * LAYOUT.block_tokens, CHUNK_TOKENS):
            end = begin + CHUNK_TOKENS
            self.planner.stepped(Step(0.0, COST.chunk(begin, end), ((begin, end),)))
        super().__init__(device, self.planner, self.planner, clock)

    def decide(self, number: int) -> Decision:
        """Runs a prompt, and returns what was decided about it."""
        self.run(number)
        return self.planner.decisions(1)[0]


def simulated(bytes_per_ms: float, schedule: Schedule = "early") -> SimulatedDevice:
    device = SimulatedDevice(schedule)
    device.copy_bytes_per_ms = bytes_per_ms
    return device


@pytest.mark.parametrize("schedule", ["early", "late"])
def test_pages_are_fetched_over_a_fast_copy_and_computed_if_the_copy_is_slow(schedule: Schedule) -> None:
    choices = {}
    for speed in (FAST, SLOW):
        worker = Planned(simulated(speed, schedule))
        assert worker.decide(0).choice is Choice.PROBE
        choices[speed] = [worker.decide(number).choice for number in range(1, 4)]
        [(tier, copy)] = worker.planner.report().copies.items()
        assert (tier, copy.bytes_per_ms) == (Tier.REMOTE, pytest.approx(speed, rel=0.01))
    assert set(choices[FAST]) <= {Choice.FETCH, Choice.LAYERS, Choice.MEET}
    assert set(choices[SLOW]) == {Choice.RECOMPUTE}


def test_the_estimate_follows_a_device_whose_copies_become_slow_and_fast_again() -> None:
    device = simulated(FAST)
    worker = Planned(device)
    for number in range(4):
        worker.decide(number)
    device.copy_bytes_per_ms = SLOW
    assert Choice.RECOMPUTE in [worker.decide(number).choice for number in range(4, 9)]
    device.copy_bytes_per_ms = FAST
    choices = []
    for number in range(9, 19):
        worker.clock.advance_ms(11_000.0)  # an unused path is measured again beside a prompt that is computed
        choices.append(worker.decide(number).choice)
    assert choices[0] is Choice.PROBE
    assert choices[-1] in {Choice.FETCH, Choice.LAYERS, Choice.MEET}


def test_on_the_processor_no_copy_is_told_and_none_is_in_a_forecast() -> None:
    worker = Planned(HostDevice())
    decisions = [worker.decide(number) for number in range(3)]
    assert worker.planner.report().copies == {}
    assert decisions[-1].copy_gbit_per_s is None
    assert decisions[-1].choice is not Choice.RECOMPUTE


@pytest.mark.parametrize("schedule", ["early", "late"])
def test_each_part_of_a_load_is_told_and_each_layer_of_one_by_layers(schedule: Schedule) -> None:
    told = Transfers()
    for order in (FetchOrder.FRONT_TO_BACK, FetchOrder.LAYERS):
        plan = LoadPlan(0, 9_999, 9_999, WAIT_MS, order)
        Worker(simulated(FAST, schedule), FixedPlanner(plan), told, ManualClock()).run(1)
    part = part_pages(LAYOUT.page_bytes)
    pages, layers = told.of(TransferKind.COPY), told.of(TransferKind.COPY_LAYERS)
    assert [copy.pages for copy in pages] == [part, part, BLOCKS - 2 * part]
    assert [copy.bytes for copy in pages] == [copy.pages * LAYOUT.page_bytes for copy in pages]
    assert [(copy.pages, copy.bytes) for copy in layers] == LAYOUT.layers * [(BLOCKS, BLOCKS * LAYOUT.page_bytes // LAYOUT.layers)]
    for copy in (*pages, *layers):
        assert copy.tier is Tier.REMOTE
        assert copy.ended_ms - copy.started_ms == pytest.approx(copy.bytes / FAST)


def test_copies_from_host_are_told_beside_a_later_step_and_nothing_waits_for_them() -> None:
    told, device = Transfers(), simulated(FAST, "late")
    worker = Worker(device, FixedPlanner(LoadPlan(0, 0, 1, 0.0)), told, ManualClock(), host=True)
    worker.run(1)
    tokens = [1_000 + at for at in range(BLOCKS * LAYOUT.block_tokens + 1)]
    table, load = worker.manager.admit(tokens, [])
    assert load.prompt.host_blocks == table.sealed == BLOCKS
    pages = worker.manager.pages
    assert isinstance(pages, DeviceBlocks)
    for _ in range(10):
        pages.times.tell()
    assert bool(pages.tensor[table.block_ids[0]].isnan().all()), "to be measured, a copy lands no sooner"
    assert told.of(TransferKind.COPY) == []
    worker.manager.before_step()  # the step waits for the copies on the device
    assert told.of(TransferKind.COPY) == []
    worker.manager.before_step()
    [copy] = told.of(TransferKind.COPY)
    assert (copy.tier, copy.pages) == (Tier.HOST, BLOCKS)
    assert copy.ended_ms - copy.started_ms == pytest.approx(copy.bytes / FAST)
    worker.manager.release(table)


def test_a_read_from_shared_memory_takes_as_long_as_its_copies_and_not_as_their_wait() -> None:
    told, device = Transfers(), simulated(FAST)
    copied = Copied(Lends(device), device, observer=told)
    assert copied.result is not None
    [read] = told.all
    assert (read.tier, read.kind, read.bytes) == (Tier.SHARED, TransferKind.READ, copied.result.bytes_read)
    assert read.ended_ms - read.started_ms >= copied.result.bytes_read / FAST
    device.copy_bytes_per_ms = SLOW
    copied.read()
    assert told.all[1].ended_ms - told.all[1].started_ms >= copied.result.bytes_read / SLOW


def test_what_is_known_of_both_tiers_of_a_store_stays_apart_and_the_last_read_says_which_is_next() -> None:
    planner, size_bytes = CostPlanner(ManualClock(), CHUNK_TOKENS), 10_000_000
    planner.stepped(Step(0.0, COST.chunk(0, 64), ((0, 64),)))
    prompt = Prompt(1, 2_049, 16, 368_640, 30, 0, 128)
    forecasts = []
    for tier, read_ms in ((Tier.REMOTE, 10.0), (Tier.SHARED, 1.0), (Tier.REMOTE, 10.0)):
        planner.transferred(Transfer(Tier.REMOTE, TransferKind.MATCH, 0.0, 0.1, 1, 1, 0, failed=False))
        planner.transferred(Transfer(tier, TransferKind.READ, 0.0, read_ms, 27, 27, size_bytes, failed=False))
        if tier is Tier.REMOTE:
            planner.transferred(Transfer(tier, TransferKind.COPY, 0.0, 20.0, 27, 27, size_bytes, failed=False))
        prefill = planner.report().prefill
        assert prefill is not None
        forecasts.append(planner.explain(prompt).forecasts["fetch"] - prefill.chunk(2_048, 2_049))
    size_bytes = 128 * prompt.page_bytes
    assert size_bytes / 5e5 < forecasts[0] < 1.25 * size_bytes / 5e5, "the copies are slower than the reads"
    assert forecasts[1] == pytest.approx(size_bytes / 1e7, rel=0.25), "these reads are copies"
    assert forecasts[2] == forecasts[0]
    assert set(planner.report().links) == {Tier.REMOTE, Tier.SHARED}


def test_hits_in_host_cost_their_copy_in_every_forecast() -> None:
    planner, size_bytes = CostPlanner(ManualClock(), CHUNK_TOKENS), 10_000_000
    planner.stepped(Step(0.0, COST.chunk(0, 64), ((0, 64),)))
    planner.transferred(Transfer(Tier.REMOTE, TransferKind.READ, 0.0, 1.0, 27, 27, size_bytes, failed=False))
    planner.transferred(Transfer(Tier.HOST, TransferKind.COPY, 0.0, 20.0, 27, 27, size_bytes, failed=False))
    in_hbm, in_host = (planner.explain(Prompt(1, 2_049, 16, 500_000, 30, 128, 128, host)) for host in (0, 100))
    prefill, copy_ms = planner.report().prefill, 100 * 500_000 / (size_bytes / 20.0)
    assert prefill is not None
    for name, forecast_ms in in_hbm.forecasts.items():
        assert in_host.forecasts[name] == pytest.approx(forecast_ms + copy_ms)
    partly = planner.explain(Prompt(1, 2_049, 16, 500_000, 30, 100, 128, 100))
    assert partly.forecasts["recompute"] == pytest.approx(copy_ms + prefill.span(1_600, 2_049, CHUNK_TOKENS))
    assert partly.forecasts["fetch"] == pytest.approx(copy_ms + prefill.chunk(2_048, 2_049)), "reads are hidden behind the copies"


def test_a_device_that_is_lost_is_not_measured_and_fails_nothing() -> None:
    told, device = Transfers(), simulated(FAST)
    worker = Worker(device, FixedPlanner(LoadPlan(0, 9_999, 9_999, WAIT_MS)), told, ManualClock())
    pages = worker.manager.pages
    assert isinstance(pages, DeviceBlocks)
    pages.times.submitted(_Lost(), Tier.HOST, 1)
    worker.run(1)
    assert eventually(lambda: len(told.of(TransferKind.COPY)) == 3)


class _Lost:
    def done(self) -> bool:
        raise DeviceLost("lost on purpose")

    def wait(self, wait: Wait) -> None:
        raise DeviceLost(f"lost on purpose: {wait}")

    def elapsed_ms(self) -> float | None:
        raise DeviceLost("lost on purpose")
