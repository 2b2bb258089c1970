"""Random histories of an engine on a simulated device: prompts that share prefixes are submitted, preempted, cancelled, evicted and
loaded again, while copies fail, the store stalls, and pages are not whole.

Whatever happens, each sequence has the processor's tokens, blocks and slots are conserved after every step, and no access races.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Sequence
from functools import cache
from typing import NamedTuple

import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis.errors import Flaky
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule, run_state_machine_as_test
from torch import Tensor

from attnstore.attention import create_attention
from attnstore.core.eviction import EVICTION_POLICIES
from attnstore.core.layout import DType
from attnstore.types import PageStatus
from attnstore_worker.cache.moving.load import FetchOrder, LoadPlan
from attnstore_worker.device.base import Copies, Wait
from attnstore_worker.device.simulated import Schedule, SimulatedDevice
from attnstore_worker.engine import Engine, EngineOptions, FinishReason, SamplingParams
from attnstore_worker.engine import Sequence as Prompted
from attnstore_worker.errors import DeviceLost
from attnstore_worker.model import LoadedModel
from attnstore_worker.options import WRITE_POLICIES
from attnstore_worker.random_models import LlamaShape, random_model
from attnstore_worker.testing import FixedPlanner, MemoryStore
from tests.samples import eventually
from tests.worker.device.watched_copies import WatchedCopies

SHAPE = LlamaShape("histories", 2, 64, 128, 4, 2, 32, 1024, 256, 10_000.0, tied=True)
"""A small vocabulary, because most of a step of so small a model is its output layer."""
BLOCK_TOKENS = 4
POOL_BLOCKS = 10
FAMILIES = 3
BLOCKS_MAX = 5
HOW = SamplingParams(max_tokens=6)
DEADLINE_MS = 20
TICK_MS = 1e-3
END_STEPS_MAX = 2_000
"""Steps in which everything ends once the store works: each waits for pages for at most `DEADLINE_MS`."""


class Submitted(NamedTuple):
    """A prompt. Those of a family share their beginning."""

    family: int
    blocks: int
    tail: int
    priority: int

    @property
    def token_ids(self) -> list[int]:
        return [(31 * position + 97 * self.family) % 900 + 5 for position in range(self.blocks * BLOCK_TOKENS + self.tail)]


prompts = st.lists(
    st.builds(Submitted, st.integers(0, FAMILIES - 1), st.integers(1, BLOCKS_MAX), st.integers(1, 2), st.integers(0, 1)),
    max_size=2,
)
steps = st.integers(0, 6)
statuses = st.sampled_from([PageStatus.CORRUPT, PageStatus.MISSING])


class TickingClock:
    """Advances by `tick_ms` at each look of the thread that made it, so that no history depends on how busy the machine is: time
    passes while the store stalls.
    """

    def __init__(self) -> None:
        self.tick_ms = TICK_MS
        self._now_ms = 0.0
        self._owner = threading.get_ident()

    def now_ms(self) -> float:
        if threading.get_ident() == self._owner:
            self._now_ms += self.tick_ms
        return self._now_ms


class FailsCopies(SimulatedDevice):
    """A device on which one copy in a direction fails, after `passes` others."""

    def __init__(self, schedule: Schedule, *, uses_triton: bool, without: Wait | None) -> None:
        super().__init__(schedule, uses_triton=uses_triton, without=without)
        self.direction = ""
        self.passes = 0
        self.failed = 0

    def copies(self, blocks: Tensor) -> Copies:
        return WatchedCopies(super().copies(blocks), self._submitting)

    def _submitting(self, direction: str, block_ids: Sequence[int], layers: range | None) -> None:
        del block_ids, layers
        if direction == self.direction:
            self.passes -= 1
            if self.passes < 0:
                self.direction = ""
                self.failed += 1
                raise DeviceLost("a copy fails on purpose")


class DeviceHistory(RuleBasedStateMachine):
    """Each rule does one thing to the engine, submits prompts and runs steps. No draw depends on the state, in which threads have a
    part: a rule without an object only submits and steps.
    """

    model: LoadedModel
    expected: Callable[[tuple[int, ...]], list[int]]
    pages: dict[bytes, bytes]
    without: Wait | None
    reached: Counter[str]

    @initialize(
        schedule=st.sampled_from(["early", "late"]),
        draws_on_device=st.booleans(),
        order=st.sampled_from(FetchOrder),
        batch_blocks=st.integers(1, 3),
        host_blocks=st.sampled_from([0, 4, 16]),
        warm=st.booleans(),
        write_policy=st.sampled_from(WRITE_POLICIES),
        eviction=st.sampled_from(EVICTION_POLICIES),
        speculate=st.booleans(),
    )
    def start(
        self,
        schedule: Schedule,
        draws_on_device: bool,
        order: FetchOrder,
        batch_blocks: int,
        host_blocks: int,
        warm: bool,
        write_policy: str,
        eviction: str,
        speculate: bool,
    ) -> None:
        page_bytes = self.model.layout(BLOCK_TOKENS).page_bytes
        options = EngineOptions(
            pool_bytes=POOL_BLOCKS * page_bytes,
            host_pool_bytes=host_blocks * page_bytes,
            block_tokens=BLOCK_TOKENS,
            chunk_tokens=2 * BLOCK_TOKENS,
            sequences_max=4,
            store_deadline_ms=DEADLINE_MS,
            write_policy=write_policy,
            eviction=eviction,
            speculate=speculate,
        )
        self.store, self.clock, self.submitted = MemoryStore(), TickingClock(), list[Prompted]()
        self.store.pages = dict(self.pages) if warm else {}
        self.layers_come = threading.Event()
        self.store.before_layer = self.before_layer
        self.resume()
        self.device = FailsCopies(schedule, uses_triton=draws_on_device, without=self.without)
        self.engine = Engine(
            self.model,
            options,
            store=self.store,
            clock=self.clock,
            planner=FixedPlanner(LoadPlan(0, POOL_BLOCKS, batch_blocks, 5 * DEADLINE_MS, order)),
            device=self.device,
            attention=create_attention("cpu"),
        )

    @rule(prompts=prompts, steps=steps)
    def compute(self, prompts: list[Submitted], steps: int) -> None:
        self.go_on(prompts, steps)

    @rule(index=st.integers(0, 9), prompts=prompts, steps=steps)
    def cancel(self, index: int, prompts: list[Submitted], steps: int) -> None:
        """One of the last prompts ends, in any state."""
        if self.submitted:
            self.engine.cancel(self.submitted[-1 - index % len(self.submitted)])
        self.go_on(prompts, steps)

    @rule(prompts=prompts, steps=steps)
    def evict(self, prompts: list[Submitted], steps: int) -> None:
        """Everything that nobody holds leaves the pool, and fills HOST if there is one."""
        self.engine.drop_cached()
        self.go_on(prompts, steps)

    @rule(direction=st.sampled_from(["up", "down"]), passes=st.integers(0, 2), prompts=prompts, steps=steps)
    def fail_a_copy(self, direction: str, passes: int, prompts: list[Submitted], steps: int) -> None:
        self.device.passes, self.device.direction = passes, direction
        self.go_on(prompts, steps)

    @rule(in_layer=st.booleans(), cancels=st.booleans(), prompts=prompts, steps=steps)
    def stall(self, in_layer: bool, cancels: bool, prompts: list[Submitted], steps: int) -> None:
        """The store stalls, perhaps between two layers. When it goes on, the sequences that waited for it may be gone."""
        self.engine.drop_cached()
        (self.layers_come if in_layer else self.store.gate).clear()
        self.clock.tick_ms = DEADLINE_MS
        self.go_on(prompts, steps)
        for sequence in self.submitted if cancels else ():
            self.engine.cancel(sequence)
        self.reached["quarantined"] += self.engine.statistics().quarantined
        self.resume()
        self.go_on([], 1)

    @rule(
        position=st.integers(0, 3), status=st.sampled_from([PageStatus.CORRUPT, PageStatus.MISSING]), prompts=prompts, steps=steps
    )
    def spoil(self, position: int, status: PageStatus, prompts: list[Submitted], steps: int) -> None:
        """One page of each read is not whole."""
        self.store.read_status = lambda index: status if index == position else PageStatus.OK
        self.go_on(prompts, steps)
        self.store.read_status = lambda _: PageStatus.OK

    def before_layer(self, layer: int) -> None:
        if layer:
            self.layers_come.wait()

    def resume(self) -> None:
        """The store works."""
        self.clock.tick_ms = TICK_MS
        self.store.gate.set()
        self.layers_come.set()

    def go_on(self, prompts: list[Submitted], steps: int) -> None:
        self.submitted += [self.engine.submit(each.token_ids, HOW, priority=each.priority) for each in prompts]
        self.check()
        for _ in range(steps):
            self.step()

    def step(self) -> None:
        """A step, which raises only if a copy fails in it."""
        failed = self.device.failed
        try:
            self.engine.step()
        except DeviceLost:
            assert self.device.failed > failed
        self.check()

    def check(self) -> None:
        self.engine.check()
        assert self.device.races.found == []

    def teardown(self) -> None:
        if not hasattr(self, "engine"):
            return
        self.resume()
        self.device.direction = ""
        with self.engine:
            for _ in range(END_STEPS_MAX):
                if self.engine.idle:
                    break
                self.step()
            assert self.engine.idle
            assert eventually(lambda: self.engine.flush(1) and self.engine.statistics().pool.held == 0), "the last transfers end"
        self.device.close()
        self.check()
        for sequence in self.submitted:
            right = self.expected(tuple(sequence.token_ids[: sequence.prompt_tokens]))
            assert sequence.generated == right[: len(sequence.generated)]
            assert (sequence.finish_reason is FinishReason.LENGTH) == (len(sequence.generated) == len(right))
            assert sequence.finish_reason is not None
            self.reached[sequence.finish_reason.name] += 1
        statistics = self.engine.statistics()
        assert (statistics.pool.held, statistics.quarantined) == (0, 0)
        self.reached += Counter({f"{tier.value} hits": counts.hit_tokens for tier, counts in statistics.tiers.items()})
        counts = self.engine.batching()
        self.reached += Counter(drafts=counts.drafts_accepted, preemptions=counts.preemptions, failed_copies=self.device.failed)


def run(model: LoadedModel, *, without: Wait | None = None, examples: int, rules: int) -> Counter[str]:
    """Returns how often the histories reached what they are about. Raises what the first one raises that fails.

    A history that fails is not made shorter, because each attempt may wait for its time limits.
    """
    options = EngineOptions(pool_bytes=64 * model.layout(BLOCK_TOKENS).page_bytes, block_tokens=BLOCK_TOKENS)
    reached: Counter[str] = Counter()
    store = MemoryStore()
    with Engine(model, options, store=store) as processor:
        processor.generate_all([Submitted(family, BLOCKS_MAX, 2, 0).token_ids for family in range(FAMILIES)], HOW)
        assert processor.flush(10_000)
        expected = staticmethod(cache(lambda token_ids: processor.generate(list(token_ids), HOW).generated))
        owned = {"model": model, "expected": expected, "pages": dict(store.pages), "without": without, "reached": reached}
        run_state_machine_as_test(
            type("History", (DeviceHistory,), owned),
            settings=settings(
                max_examples=examples,
                stateful_step_count=rules,
                phases=[Phase.generate],
                report_multiple_bugs=False,
                derandomize=True,
                deadline=None,
                suppress_health_check=list(HealthCheck),
            ),
        )
    return reached


@pytest.fixture(scope="module")
def model() -> LoadedModel:
    return random_model(SHAPE, DType.FP32)


def test_every_sequence_gets_the_processors_tokens_and_nothing_is_lost_or_raced(model: LoadedModel) -> None:
    reached = run(model, examples=40, rules=12)
    wanted = [
        "hbm hits",
        "host hits",
        "remote hits",
        "drafts",
        "preemptions",
        "failed_copies",
        "quarantined",
        "LENGTH",
        "CANCELLED",
    ]
    assert all(reached[each] for each in wanted), reached


@pytest.mark.parametrize("wait", [Wait.UP_AFTER_DOWN, Wait.COMPUTE_AFTER_DOWN, Wait.COMPUTE_AFTER_UP])
def test_histories_notice_a_wait_that_is_missing(model: LoadedModel, wait: Wait) -> None:
    """Those that the first few notice; `experiments.device_faults` has a scenario for each wait."""
    with pytest.raises((AssertionError, Flaky)):
        run(model, without=wait, examples=40, rules=12)
