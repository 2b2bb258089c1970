"""The measuring planner at work: in simulated time on links that flap and collapse, and on a real link through a relay."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator

import pytest

from attnstore.clock import MonotonicClock
from attnstore.limits import CHANNEL_READ_HASHES_MAX
from attnstore.testing import ManualClock, StoreProcess
from attnstore.testing.link import Link
from attnstore_worker.cache import CostPlanner, open_store
from attnstore_worker.cache.moving.load import Load, LoadEnd, LoadState, Prompt, SearchPlan
from attnstore_worker.cache.planning.estimators import PrefillCost
from attnstore_worker.cache.planning.observation import Answer, Step
from attnstore_worker.cache.planning.split import IDLE_SHARE
from attnstore_worker.cache.pool.tier import Tier
from attnstore_worker.cache.store.transfer import Transfer, TransferKind
from attnstore_worker.engine import Engine, EngineOptions, SamplingParams
from attnstore_worker.model import LoadedModel

PAGE_BYTES = 368_640
COST = PrefillCost(chunk_ms=50.0, token_ms=0.4, pair_ms=3e-4)
CHUNK_TOKENS = 256
CHUNK_BLOCKS = CHUNK_TOKENS // 16
TICK_MS = 1.0
Bandwidth = Callable[[float], float]
"""Bytes per ms at a time."""


class Simulation:
    """One worker on one link: plays the mover's thread and the engine's, a tick at a time."""

    def __init__(self, bandwidth: Bandwidth, rtt_ms: float) -> None:
        self.clock = ManualClock()
        self.planner = CostPlanner(self.clock, CHUNK_TOKENS)
        self.bandwidth, self.rtt_ms = bandwidth, rtt_ms
        self._prompts = 0

    def learn_computing(self) -> None:
        for begin in range(0, 2048, CHUNK_TOKENS):
            end = begin + CHUNK_TOKENS
            self.planner.stepped(Step(0.0, COST.chunk(begin, end), ((begin, end),)))

    def first_token(self, tokens: int) -> float:
        """Returns the time to the first token of a prompt whose usable blocks are all in the store."""
        self._prompts += 1
        usable = (tokens - 1) // 16
        prompt = Prompt(self._prompts, tokens, 16, PAGE_BYTES, 30, 0, usable)
        began_ms = self.clock.now_ms()
        run = _Run(self, prompt, self.planner.search(prompt))
        while not run.is_over:
            self.clock.advance_ms(TICK_MS)
            run.tick()
        ended_ms = self.clock.now_ms()
        self.planner.answered(Answer(prompt, began_ms, ended_ms))
        return ended_ms - began_ms


class _Run:
    """A prompt on its way, whose `Load` is commanded as the mover and the engine do."""

    def __init__(self, simulation: Simulation, prompt: Prompt, search: SearchPlan | None) -> None:
        self.simulation, self.clock, self.planner = simulation, simulation.clock, simulation.planner
        self.prompt, self.load = prompt, Load(prompt, search, self.clock.now_ms())
        self.computed, self.computing, self.chunk_ends_ms = 0, 0, 0.0
        self.missing_bytes = 0.0
        self.is_over = False

    def tick(self) -> None:
        if self.load.state in {LoadState.SEARCHING, LoadState.READING}:
            self._transfer()
        if self.clock.now_ms() >= self.chunk_ends_ms:
            self._compute()

    def _transfer(self) -> None:
        load, now_ms = self.load, self.clock.now_ms()
        if load.state is LoadState.SEARCHING:
            if now_ms - load.started_ms >= self.simulation.rtt_ms:
                self._tell(TransferKind.MATCH, load.started_ms, 0)
                load.found(self.prompt.usable_blocks, now_ms)
                load.begin(self.planner.plan(load), now_ms)
                self._ask()
            elif now_ms > load.due_ms:
                self._cancel(LoadEnd.LATE)
            return
        if now_ms > load.due_ms:
            self._tell(TransferKind.READ, load.asked_ms, 0, failed=True)
            self._cancel(LoadEnd.LATE)
            return
        if now_ms - load.asked_ms > self.simulation.rtt_ms:
            self.missing_bytes -= self.simulation.bandwidth(now_ms) * TICK_MS
        if self.missing_bytes <= 0:
            size_bytes = len(load.in_flight) * PAGE_BYTES
            self._tell(TransferKind.READ, load.asked_ms, size_bytes)
            load.arrived(load.in_flight, size_bytes)
            if self._replan():
                self._ask()

    def _ask(self) -> None:
        batch = self.load.next_batch(self.clock.now_ms(), CHANNEL_READ_HASHES_MAX)
        assert not self.load.ready & set(batch), "no block is fetched twice"
        self.missing_bytes = len(batch) * PAGE_BYTES

    def _replan(self) -> bool:
        if self.load.state is not LoadState.READING:
            return True
        plan = self.planner.replan(self.load, self.clock.now_ms())
        assert plan is None or (self.load.plan and plan.order is self.load.plan.order), "what has begun page by page goes on so"
        if not self.load.replan(plan):
            self._cancel(LoadEnd.LATE)
            return False
        return True

    def _compute(self) -> None:
        load = self.load
        self.computed = self.computing
        if load.running:
            load.take(self.clock.now_ms())
            if not load.running:
                self.planner.loaded(load)
            elif self.computed >= self.prompt.usable_blocks:
                self._cancel(LoadEnd.MET)
            elif not self._replan():
                return
        self.computed = load.pass_ready(self.computed)
        boundary = (self.computed // CHUNK_BLOCKS + 1) * CHUNK_BLOCKS
        begin, end = self.computed * 16, min(load.claim(boundary) * 16, self.prompt.tokens)
        if begin >= self.prompt.tokens:
            self.is_over = True
        elif end > begin:
            self.computing = -(-end // 16)
            self.chunk_ends_ms = self.clock.now_ms() + COST.chunk(begin, end)
        else:
            self.computing = self.computed

    def _cancel(self, end: LoadEnd) -> None:
        self.load.cancel(end, self.clock.now_ms())
        self.load.take(self.clock.now_ms())
        self.planner.loaded(self.load)

    def _tell(self, kind: TransferKind, started_ms: float, size_bytes: int, *, failed: bool = False) -> None:
        pages = size_bytes // PAGE_BYTES
        self.planner.transferred(Transfer(Tier.REMOTE, kind, started_ms, self.clock.now_ms(), pages, pages, size_bytes, failed))


def steady(gbit_per_s: float) -> Bandwidth:
    return lambda _: gbit_per_s * 1e6 / 8


def flapping(gbit_per_s: float, period_ms: float) -> Bandwidth:
    """Nothing moves in every other period."""
    return lambda now_ms: gbit_per_s * 1e6 / 8 if now_ms // period_ms % 2 else 1e-9


def collapsing(gbit_per_s: float, at_ms: float, factor: float) -> Bandwidth:
    return lambda now_ms: gbit_per_s * 1e6 / 8 * (factor if now_ms > at_ms else 1)


def unsteady(gbit_per_s: float, seed: int) -> Bandwidth:
    """The bandwidth changes every quarter of a second, by a factor of up to a hundred."""
    return lambda now_ms: gbit_per_s * 1e6 / 8 * 10 ** random.Random(f"{seed} {now_ms // 250}").uniform(-2, 2)


LINKS = {
    **{f"steady at {rate} Gb/s": steady(rate) for rate in (0.001, 0.03, 0.1, 0.3, 1.0, 10.0)},
    "flaps every 100 ms": flapping(1.0, 100.0),
    "flaps every second": flapping(10.0, 1000.0),
    **{f"unsteady, seed {seed}": unsteady(0.3, seed) for seed in range(6)},
}


@pytest.mark.parametrize("tokens", [512, 2048, 4096])
@pytest.mark.parametrize("rtt_ms", [0.5, 50.0])
@pytest.mark.parametrize("name", LINKS)
def test_no_prompt_takes_much_longer_than_computing_it_whatever_the_link_does(name: str, rtt_ms: float, tokens: int) -> None:
    simulation = Simulation(LINKS[name], rtt_ms)
    simulation.learn_computing()
    recompute_ms = COST.span(0, tokens, CHUNK_TOKENS)
    for _ in range(6):
        # Splitting elsewhere than at a chunk's boundary costs one more chunk at each end.
        assert simulation.first_token(tokens) <= (1 + IDLE_SHARE) * recompute_ms + 3 * COST.chunk_ms
        simulation.clock.advance_ms(37.0)


@pytest.mark.parametrize("factor", [0.01, 1e-12])
@pytest.mark.parametrize("gbit_per_s", [0.1, 1.0, 10.0])
def test_a_link_that_collapses_during_a_fetch_costs_no_more_than_the_idle_budget(gbit_per_s: float, factor: float) -> None:
    tokens = 4096
    simulation = Simulation(steady(gbit_per_s), 1.0)
    simulation.learn_computing()
    for _ in range(4):
        simulation.first_token(tokens)
    fetch_ms = tokens // 16 * PAGE_BYTES / simulation.bandwidth(0.0)
    simulation.bandwidth = collapsing(gbit_per_s, simulation.clock.now_ms() + 0.3 * fetch_ms, factor)
    recompute_ms = COST.span(0, tokens, CHUNK_TOKENS)
    assert simulation.first_token(tokens) <= (1 + IDLE_SHARE) * recompute_ms + 2 * COST.chunk_ms
    later_ms = [simulation.first_token(tokens) for _ in range(3)]
    assert max(later_ms[1:]) <= 1.1 * recompute_ms, "by then the link is known"


def test_between_fast_and_slow_links_both_ends_beat_either() -> None:
    tokens = 4096
    simulation = Simulation(steady(0.12), 1.0)
    simulation.learn_computing()
    times_ms = [simulation.first_token(tokens) for _ in range(4)]
    fetch_ms = tokens // 16 * PAGE_BYTES / simulation.bandwidth(0.0)
    assert times_ms[-1] * 1.3 <= min(fetch_ms, COST.span(0, tokens, CHUNK_TOKENS))


def test_a_fast_link_is_found_out_beside_the_first_prompt_and_used_from_then_on() -> None:
    simulation = Simulation(steady(10.0), 0.5)
    simulation.learn_computing()
    times_ms = [simulation.first_token(2048) for _ in range(4)]
    assert times_ms[0] <= COST.span(0, 2048, CHUNK_TOKENS)
    assert times_ms[-1] <= 0.2 * COST.span(0, 2048, CHUNK_TOKENS)


def test_predictions_on_a_steady_link_are_true() -> None:
    simulation = Simulation(steady(0.3), 5.0)
    simulation.learn_computing()
    for _ in range(8):
        simulation.first_token(2048)
    predictions = simulation.planner.predictions()
    assert predictions.median_error is not None
    assert predictions.median_error <= 0.15
    assert sum(predictions.choices.values()) == 8


@pytest.fixture(scope="module")
def node() -> Iterator[StoreProcess]:
    with StoreProcess("--capacity", "64MiB") as process:
        yield process


def test_tokens_are_the_same_over_a_real_link_whatever_becomes_of_it(tiny: LoadedModel, node: StoreProcess) -> None:
    draw = random.Random(5)
    token_ids = [draw.randrange(3, 40_000) for _ in range(400)]
    how = SamplingParams(max_tokens=4, stop_token_ids=frozenset())
    options = EngineOptions(pool_bytes=60 * tiny.layout(16).page_bytes, chunk_tokens=64)
    with open_store(node.url, deadline_ms=30_000, transport="tcp") as store, Engine(tiny, options, store=store) as engine:
        expected = engine.generate(token_ids, how).generated
        assert engine.flush(30_000)
    with Link.to_node(node.url, "1g@4ms") as link, open_store(link.url, deadline_ms=30_000, transport="tcp") as store:
        planner = CostPlanner(MonotonicClock(), options.chunk_tokens)
        for act in (lambda: None, lambda: None, lambda: link.change("1m@4ms"), lambda: link.change("1g@4ms"), link.stall):
            with Engine(tiny, options, store=store, planner=planner, observer=planner) as engine:
                engine.warm_up()
                act()
                assert engine.generate(token_ids, how).generated == expected
                engine.drop_cached()
                engine.check()
        link.restore()
    decisions = planner.decisions(9)
    assert len(decisions) == 5
    assert all(decision.happened_ttft_ms for decision in decisions)
