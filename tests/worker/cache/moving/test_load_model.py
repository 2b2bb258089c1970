"""A load against a model that is too simple to be wrong, through random histories. The model keeps a word for every block.

`test_load_mutants.py` shows that the histories find a bug in each transition.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import hypothesis.strategies as st
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule, run_state_machine_as_test

from attnstore_worker.cache.moving.load import FetchOrder, Load, LoadEnd, LoadPlan, LoadState, Prompt, SearchPlan

BLOCKS = 10
READ_MAX = 3
LIVE = {LoadState.SEARCHING, LoadState.FOUND, LoadState.READING}

limits = st.integers(-1, BLOCKS + 2)
hit_counts = st.just(BLOCKS) | st.integers(0, BLOCKS)
plans = st.builds(
    LoadPlan,
    st.integers(-1, 4) | limits,
    st.integers(5, BLOCKS + 2) | limits,
    st.integers(0, 5),
    st.just(50.0),
    st.sampled_from(FetchOrder),
    st.just(BLOCKS) | limits,
)


class LoadMachine(RuleBasedStateMachine):
    """Rules draw commands; each compares the answer with the model's. Commands that change nothing in most states, and those that
    end a load, are drawn at some times only: otherwise little would be left of most histories.
    """

    load_class: type[Load] = Load

    @initialize(
        resident=st.integers(0, 3), compute_before=limits, hits=st.just(BLOCKS) | st.integers(0, BLOCKS), plan=plans | st.none()
    )
    def search(self, resident: int, compute_before: int, hits: int, plan: LoadPlan | None) -> None:
        """Most loads are found and planned soon."""
        self.resident = self.front = self.passed = self.hit_end = resident
        prompt = Prompt(1, 4 * BLOCKS + 1, 4, 64, 2, resident, BLOCKS)
        self.load = self.load_class(prompt, SearchPlan(100.0, compute_before), 0.0)
        self.now_ms = 1.0
        self.state = LoadState.SEARCHING
        self.compute_before = compute_before
        self.blocks = ["resident" if block < resident else "missing" for block in range(BLOCKS)]
        self.low = self.high = 0  # what is pending, where it is not claimed
        self.plan: LoadPlan | None = None
        self.in_flight: list[int] = []
        self.arrived_blocks = self.bytes_read = 0
        self.stopped = self.met = self.is_lent = False
        self.end: LoadEnd | None = None
        self.ended_ms = 0.0
        if hits > resident:
            self.find(hits - resident)
            if plan is not None:
                self.begin(plan)

    @rule(step_ms=st.integers(1, 9))
    def time_passes(self, step_ms: int) -> None:
        self.now_ms += step_ms

    @precondition(lambda self: self.state is LoadState.SEARCHING or self.now_ms % 5 == 0)
    @rule(data=st.data())
    def found(self, data: st.DataObject) -> None:
        self.find(data.draw(st.integers(0, BLOCKS - self.resident)))

    def find(self, hits: int) -> None:
        self.load.found(hits, self.now_ms)
        if self.state is LoadState.SEARCHING:
            self.state = LoadState.FOUND if hits else LoadState.FINISHED
            self.hit_end += hits

    @precondition(lambda self: self.state is LoadState.SEARCHING or self.now_ms % 5 == 0)
    @rule(data=st.data())
    def lent(self, data: st.DataObject) -> None:
        hits = data.draw(st.integers(1, BLOCKS - self.resident))
        assert self.load.lent(hits, self.now_ms) is (self.state is LoadState.SEARCHING)
        if self.state is LoadState.SEARCHING:
            self.state, self.is_lent = LoadState.FINISHED, True
            self.hit_end += hits
            for block in range(self.front, self.hit_end):
                self.blocks[block] = "arrived"
                self.arrived_blocks += 1

    @precondition(lambda self: self.state is LoadState.FOUND or self.now_ms % 5 == 0)
    @rule(plan=plans | st.none())
    def begin(self, plan: LoadPlan | None) -> None:
        self.load.begin(plan, self.now_ms)
        if self.state is not LoadState.FOUND:
            return
        if plan is None:
            self.state = LoadState.FINISHED
        else:
            self.state, self.plan, self.compute_before = LoadState.READING, plan, plan.compute_before
            self.low, self.high = max(plan.begin, self.resident), min(plan.end, self.hit_end)

    @precondition(lambda self: not self.in_flight)
    @rule()
    def next_batch(self) -> None:
        self.now_ms += 1
        batch = list(self.load.next_batch(self.now_ms, READ_MAX))
        if self.state is not LoadState.READING or self.plan is None:
            assert batch == []
            return
        self.met |= any(self.low <= block < self.high for block in range(self.front))
        wanted = [block for block in range(self.low, self.high) if block >= self.front]
        size = READ_MAX if self.plan.order is FetchOrder.LAYERS else min(READ_MAX, max(1, self.plan.batch_blocks))
        is_backward = self.plan.order is FetchOrder.BACK_TO_FRONT
        assert batch == (wanted[-size:] if is_backward else wanted[:size])
        for block in batch:
            assert self.blocks[block] == "missing", "read twice, or computed"
            self.blocks[block] = "in flight"
        if not batch:
            self.state = LoadState.FINISHED
            self.low = self.high = 0
        elif is_backward:
            self.low, self.high = max(self.low, self.front), batch[0]
        else:
            self.low = batch[-1] + 1
        self.in_flight = batch

    @rule(data=st.data(), shared=st.booleans())
    def arrived(self, data: st.DataObject, shared: bool) -> None:
        hits = data.draw(st.lists(st.sampled_from(self.in_flight), unique=True).map(sorted)) if self.in_flight else []
        self.load.arrived(hits, 64 * len(hits), shared=shared)
        self.bytes_read += 64 * len(hits)
        is_live = self.state is LoadState.READING
        for block in self.in_flight:
            self.blocks[block] = "arrived" if is_live and block in hits else "missing" if is_live else "replaced"
        if is_live and self.in_flight:
            self.arrived_blocks += len(hits)
            if not hits:
                self.stopped, self.low, self.high = True, 0, 0
        self.in_flight = []

    @rule(plan=plans | plans | st.none())
    def replan(self, plan: LoadPlan | None) -> None:
        kept = self.load.replan(plan)
        if self.state is not LoadState.READING or self.plan is None:
            assert kept
            return
        assert kept is (plan is not None)
        if plan is None:
            self.stopped, self.low, self.high = True, 0, 0
        elif not self.stopped:
            self.plan, self.compute_before = replace(plan, order=self.plan.order), plan.compute_before
            if self.plan.order is FetchOrder.BACK_TO_FRONT:
                self.low = max(plan.begin, self.resident)
            else:
                self.high = min(plan.end, self.hit_end)
        assert self.load.plan is not None
        assert self.load.plan.order is self.plan.order

    @rule(end=st.just(BLOCKS) | st.integers(0, BLOCKS))
    def claim(self, end: int) -> None:
        first = self.front
        while self.front < end and self.blocks[self.front] not in {"in flight", "arrived", "ready"}:
            if self.state in LIVE and self.front >= self.compute_before:
                break
            self.front += 1
        for block in range(first, self.front):
            if self.blocks[block] == "missing":
                self.blocks[block] = "claimed"
        assert self.load.claim(end) == self.front

    @rule()
    def take(self) -> None:
        arrived = {block for block, word in enumerate(self.blocks) if word == "arrived"}
        taken = self.load.take(self.now_ms)
        assert (set(taken), len(taken)) == (arrived, len(arrived))
        for block in taken:
            self.blocks[block] = "ready"
        if self.state is LoadState.FINISHED:
            self.state, self.ended_ms = LoadState.ENDED, self.now_ms
            if self.is_lent:
                self.end = LoadEnd.LENT
            elif self.hit_end == self.resident:
                self.end = LoadEnd.NOT_FOUND
            elif self.plan is None:
                self.end = LoadEnd.DECLINED
            else:
                self.end = LoadEnd.MET if self.met else LoadEnd.COMPLETE

    @rule()
    def pass_ready(self) -> None:
        """The computed front comes as far as it can: over claimed blocks and over those that are ready."""
        while self.passed < BLOCKS and self.blocks[self.passed] in {"claimed", "passed"}:
            self.passed += 1
        first = self.passed
        while self.passed < BLOCKS and self.blocks[self.passed] == "ready":
            self.blocks[self.passed] = "passed"
            self.passed += 1
        assert self.load.pass_ready(first) == self.passed

    @precondition(lambda self: self.now_ms % (3 if self.in_flight else 7) == 0)
    @rule(end=st.sampled_from([LoadEnd.MET, LoadEnd.LATE, LoadEnd.RELEASED]))
    def cancel(self, end: LoadEnd) -> None:
        in_flight = list(self.load.cancel(end, self.now_ms))
        if self.state is LoadState.ENDED:
            assert in_flight == []
            return
        assert in_flight == self.in_flight, "what may still be written must be held"
        self.state, self.end, self.ended_ms = LoadState.ENDED, end, self.now_ms
        self.low = self.high = 0
        for block in in_flight:
            self.blocks[block] = "replaced"

    @precondition(lambda self: self.now_ms % (4 if self.in_flight else 7) == 0)
    @rule()
    def finish(self) -> None:
        self.load.finish()
        if self.state in LIVE:
            self.state = LoadState.FINISHED
            for block in self.in_flight:
                self.blocks[block] = "missing"
        self.in_flight = []
        self.low = self.high = 0

    @invariant()
    def the_load_says_what_the_model_says(self) -> None:
        load = self.load
        assert load.state is self.state
        assert load.running is (self.state is not LoadState.ENDED)
        assert (load.end, load.ended_ms) == (self.end, self.ended_ms)
        assert (load.front, load.hit_end) == (self.front, self.hit_end)
        assert list(load.in_flight) == self.in_flight
        assert list(load.pending) == [block for block in range(self.low, self.high) if block >= self.front]
        assert load.ready == {block for block, word in enumerate(self.blocks) if word == "ready"}
        assert (load.arrived_blocks, load.bytes_read) == (self.arrived_blocks, self.bytes_read)
        assert load.used_blocks == self.blocks.count("passed")
        assert load.over is (self.state is LoadState.ENDED and not load.ready)


def run(load_class: type[Load], *, steps: int = 40, **options: Any) -> None:
    machine = type("Machine", (LoadMachine,), {"load_class": load_class})
    run_state_machine_as_test(machine, settings=settings(stateful_step_count=steps, **options))


def test_a_load_agrees_with_the_model_through_random_histories() -> None:
    run(Load, max_examples=200)
