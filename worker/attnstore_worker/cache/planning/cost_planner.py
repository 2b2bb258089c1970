"""The planner that measures: costs from past work, a split for each prompt, and a record of the results.

Owns: `CostPlanner`, which is both the engine's `Planner` and its `Observer`. Invariant: without measurements it computes from the
front and fetches a little at the same time, which costs no time and provides the measurements for the next decision; the engine
never waits for an unknown link.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Final

from attnstore.clock import Clock
from attnstore_worker.cache.moving.load import FetchOrder, Load, LoadPlan, Prompt, SearchPlan
from attnstore_worker.cache.planning.attend_planner import AttendForecast, ChunkForecast, ChunkWork, fetched_chunk_ms
from attnstore_worker.cache.planning.cost_book import CostBook, CostReport
from attnstore_worker.cache.planning.decisions import Decision, DecisionLog, PredictionStatistics
from attnstore_worker.cache.planning.observation import Answer, Step
from attnstore_worker.cache.planning.split import (
    Choice,
    Costs,
    Split,
    Work,
    fetch_everything,
    fetch_ms,
    idle_budget,
    recompute_ms,
    search_head,
    split,
)
from attnstore_worker.cache.store.transfer import Transfer

PROBE_MS: Final = 10_000.0
"""An unused link is measured again after this time, beside the next prompt that is computed."""
_UNKNOWN_DEADLINE_MS: Final = 5_000.0
_LATE_MS: Final = 5.0
"""A read ends at the deadline of its load; its last pages may reach the engine this much later."""


class CostPlanner:
    """Plans for prompts computed `chunk_tokens` at a time. `sink` gets every decision when its prompt has its first token."""

    def __init__(self, clock: Clock, chunk_tokens: int, sink: Callable[[Decision], None] | None = None) -> None:
        self._clock = clock
        self._chunk_tokens = chunk_tokens
        self._book = CostBook(clock)
        self._log = DecisionLog(sink)
        self._lock = threading.Lock()
        self._loading: dict[int, float] = {}
        """The loads that run, and when each began."""
        self._load_ended_ms = -math.inf
        """When the last of the others ended."""

    def search(self, prompt: Prompt) -> SearchPlan | None:
        """Searches unless that cannot pay; computes meanwhile as much as fits into the time of the answer."""
        plan = self._search(prompt)
        if plan is not None:
            with self._lock:
                self._loading[prompt.number] = self._clock.now_ms()
        return plan

    def plan(self, load: Load) -> LoadPlan | None:
        """Plans where computing and fetching meet, by the current costs."""
        costs, work = self._book.costs(), self._work(load.prompt, load.front, load.hit_end)
        if work.front >= work.back:
            return None
        if costs is None:
            self._decided(load.prompt, None, None, Choice.PROBE, load)
            return _probe(work, _UNKNOWN_DEADLINE_MS)
        slack_ms = self._slack_ms(costs, load, load.search_ms)
        work = replace(work, ahead_ms=max(0.0, -slack_ms))
        planned = split(costs, work, self._idle_budget_ms(costs, load.prompt) - max(0.0, slack_ms))
        is_stale = costs.link.age_ms > PROBE_MS
        self._decided(load.prompt, costs, planned, Choice.PROBE if is_stale and not planned.fetches else planned.choice, load)
        if planned.fetches:
            return _load_plan(planned, planned.deadline_ms)
        return _probe(work, recompute_ms(costs.prefill, work)) if is_stale else None

    def replan(self, load: Load, now_ms: float) -> LoadPlan | None:
        """Moves the meeting point as the link changes; gives up a load that is later than its idle budget allows."""
        assert load.plan is not None
        elapsed_ms = now_ms - load.planned_ms
        if elapsed_ms > load.plan.deadline_ms + _LATE_MS:
            return None
        costs = self._book.costs()
        asked = load.in_flight.start if load.in_flight else load.pending.stop
        if costs is None and load.in_flight and load.front >= asked:
            return None  # the engine does not wait for an unknown link
        is_last = load.front >= asked and not load.in_flight
        if costs is None or is_last or load.plan.order is FetchOrder.LAYERS:
            return load.plan
        slack_ms = self._slack_ms(costs, load, load.search_ms + elapsed_ms)
        work = replace(
            self._work(load.prompt, load.front, load.hit_end),
            ahead_ms=max(0.0, -slack_ms),
            asked=max(asked, load.front),
            back=load.in_flight.stop if load.in_flight else asked,
            busy_ms=_busy_ms(costs, load, now_ms),
            layers=1,  # a load that has begun page by page continues so
        )
        planned = split(costs, work, self._idle_budget_ms(costs, load.prompt) - max(0.0, slack_ms))
        if planned.fetches:
            return _load_plan(planned, elapsed_ms + planned.deadline_ms)
        if work.front < work.asked:  # computing continues anyway: the blocks in flight may still arrive in time
            spent_ms = costs.slowdown * self._compute_ms(costs, work, work.front, work.asked)
            return replace(load.plan, begin=asked, compute_before=asked, deadline_ms=elapsed_ms + spent_ms)
        return None

    def prefetches(self, prompt: Prompt) -> bool:
        """Prefetches if fetching would be part of the best split."""
        costs = self._book.costs()
        work = self._work(prompt, prompt.resident_blocks, prompt.usable_blocks)
        return costs is not None and split(costs, work, idle_budget(costs.prefill, work)).fetches

    def attend_forecast(self, prompt: Prompt, remote_blocks: int, row_bytes: int) -> AttendForecast | None:
        """Returns the forecast for a prompt whose first `remote_blocks` blocks are in the store, if a row of a query and its answer
        have `row_bytes` over all layers; None while a cost is unknown.
        """
        costs, attend = self._book.costs(), self._book.attend_costs()
        if costs is None or attend is None:
            return None
        work = self._work(prompt, prompt.resident_blocks, remote_blocks)
        loaded = split(costs, work, idle_budget(costs.prefill, work)) if work.front < work.back else None
        begin = remote_blocks * prompt.block_tokens
        tail_ms = costs.prefill.span(begin, prompt.tokens, self._chunk_tokens)
        chunks = -(-prompt.tokens // self._chunk_tokens) - begin // self._chunk_tokens
        return AttendForecast(
            attend_ttft_ms=attend.step_ms(tail_ms, chunks * prompt.layers, (prompt.tokens - begin) * row_bytes),
            attend_step_ms=attend.step_ms(attend.resident_step_ms, prompt.layers, row_bytes),
            load_ttft_ms=loaded.ttft_ms if loaded is not None else recompute_ms(costs.prefill, work),
            resident_step_ms=attend.resident_step_ms,
        )

    def chunk_forecast(self, work: ChunkWork) -> ChunkForecast | None:
        """Returns the forecast of a chunk behind blocks in the store; None while a cost is unknown."""
        costs, attend = self._book.costs(), self._book.attend_costs()
        if costs is None or attend is None:
            return None
        begin = work.blocks * work.block_tokens
        compute_ms = costs.prefill.span(begin, begin + work.rows, self._chunk_tokens)
        windows = work.layers * -(-work.blocks // work.window_blocks)
        window_ms = costs.link.transfer_ms(min(work.blocks, work.window_blocks) * work.page_bytes / work.layers)
        return ChunkForecast(
            attend_ms=attend.step_ms(compute_ms, work.layers * work.queries, work.rows * work.row_bytes),
            fetch_ms=fetched_chunk_ms(compute_ms, windows, window_ms),
        )

    def attending(self, prompt: Prompt, remote_blocks: int, forecast: AttendForecast) -> None:
        """Records that a prompt's first blocks are left in the store."""
        decision = self._decision(prompt, None, None, Choice.ATTEND, None)
        forecasts = {"attend": forecast.attend_ttft_ms, "planned": forecast.load_ttft_ms}
        self._log.opened(replace(decision, hit_end=remote_blocks, forecasts=forecasts, predicted_ttft_ms=forecast.attend_ttft_ms))

    def transferred(self, transfer: Transfer) -> None:
        """See `CostBook`."""
        self._book.transferred(transfer)

    def stepped(self, step: Step) -> None:
        """See `CostBook`. The step may have ended long ago, so the loads of now may not have run beside it."""
        with self._lock:
            disturbed = step.started_ms < self._load_ended_ms or any(at_ms <= step.ended_ms for at_ms in self._loading.values())
        self._book.stepped(step, disturbed=disturbed)

    def loaded(self, load: Load) -> None:
        """Records how a load ended."""
        with self._lock:
            if self._loading.pop(load.prompt.number, None) is not None:
                self._load_ended_ms = self._clock.now_ms()
        self._log.loaded(load)

    def answered(self, answer: Answer) -> None:
        """Compares the prediction with the actual time."""
        happened_ms = answer.ended_ms - answer.started_ms
        decision = self._log.get(answer.prompt.number)
        if decision is not None and decision.choice is Choice.LAYERS and decision.predicted_ttft_ms is not None:
            costs = self._book.costs()
            self._book.computed_behind(happened_ms, decision.predicted_ttft_ms / (costs.behind if costs is not None else 1.0))
        self._log.answered(answer.prompt.number, happened_ms)

    def report(self) -> CostReport:
        """Returns the known costs."""
        return self._book.report()

    def decisions(self, count: int) -> list[Decision]:
        """Returns the last finished decisions, the newest last."""
        return self._log.last(count)

    def predictions(self) -> PredictionStatistics:
        """Returns the statistics of the predictions."""
        return self._log.statistics()

    def explain(self, prompt: Prompt) -> Decision:
        """Returns the decision about a prompt whose usable blocks were all found at once. Has no effect."""
        costs = self._book.costs()
        work = self._work(prompt, prompt.resident_blocks, prompt.usable_blocks)
        planned = split(costs, work, idle_budget(costs.prefill, work)) if costs is not None else None
        return self._decision(prompt, costs, planned, planned.choice if planned is not None else Choice.PROBE, None)

    def _search(self, prompt: Prompt) -> SearchPlan | None:
        costs, work = self._book.costs(), self._work(prompt, prompt.resident_blocks, prompt.usable_blocks)
        self._decided(prompt, None, None, Choice.RECOMPUTE, None)  # until hits are found
        if costs is None:
            return SearchPlan(_UNKNOWN_DEADLINE_MS, work.back)
        planned = split(costs, work, idle_budget(costs.prefill, work))
        everything_ms = recompute_ms(costs.prefill, work)
        if not planned.fetches:
            self._decided(prompt, costs, planned, Choice.RECOMPUTE, None)
            return SearchPlan(everything_ms, work.back) if costs.link.age_ms > PROBE_MS else None
        head = search_head(costs, work)
        self._decided(prompt, costs, planned, planned.choice, None)
        head_ms = self._compute_ms(costs, work, work.front, head) if head < work.back else everything_ms
        return SearchPlan(head_ms + idle_budget(costs.prefill, work), head)

    def _work(self, prompt: Prompt, front: int, back: int) -> Work:
        """Returns the work of a prompt that was just admitted: computing waits for the copies from HOST."""
        page_bytes, ahead_ms = prompt.page_bytes, self._book.host_copy_ms(prompt.host_blocks * prompt.page_bytes)
        return Work(
            prompt.tokens,
            prompt.block_tokens,
            self._chunk_tokens,
            page_bytes,
            front,
            back,
            back,
            back,
            prompt.layers,
            ahead_ms=ahead_ms,
        )

    def _compute_ms(self, costs: Costs, work: Work, begin: int, end: int) -> float:
        return costs.prefill.span(begin * work.block_tokens, end * work.block_tokens, work.chunk_tokens)

    def _idle_budget_ms(self, costs: Costs, prompt: Prompt) -> float:
        return idle_budget(costs.prefill, self._work(prompt, prompt.resident_blocks, prompt.usable_blocks))

    def _slack_ms(self, costs: Costs, load: Load, elapsed_ms: float) -> float:
        """Returns the time since the search began that was not spent on computing, or on the copies from HOST before it; negative
        while the last chunk is being computed.
        """
        work = self._work(load.prompt, load.front, load.hit_end)
        computed_ms = costs.slowdown * self._compute_ms(costs, work, load.prompt.resident_blocks, load.front)
        return elapsed_ms - work.ahead_ms - computed_ms

    def _decided(self, prompt: Prompt, costs: Costs | None, planned: Split | None, choice: Choice, load: Load | None) -> None:
        decision = self._decision(prompt, costs, planned, choice, load)
        earlier = self._log.get(prompt.number)
        self._log.opened(decision if earlier is None else replace(decision, at_ms=earlier.at_ms))

    def _decision(self, prompt: Prompt, costs: Costs | None, planned: Split | None, choice: Choice, load: Load | None) -> Decision:
        decision = Decision(
            prompt.number, self._clock.now_ms(), prompt.tokens, prompt.resident_blocks, prompt.usable_blocks, choice
        )
        if load is not None:
            decision = replace(decision, hit_end=load.hit_end)
        if costs is None or planned is None:
            return decision
        spent_ms = load.search_ms if load is not None else costs.link.rtt_ms if planned.fetches else 0.0
        forecasts = {
            "recompute": spent_ms + planned.recompute_ms,
            "fetch": spent_ms + fetch_everything(costs, planned.work).ttft_ms,
            "planned": spent_ms + planned.ttft_ms,
        }
        return replace(
            decision,
            meet=planned.meet,
            rtt_ms=costs.link.rtt_ms,
            gbit_per_s=costs.link.gbit_per_s,
            copy_gbit_per_s=costs.copy.gbit_per_s if costs.copy is not None else None,
            spread=costs.link.spread,
            slowdown=costs.slowdown,
            forecasts=forecasts,
            predicted_ttft_ms=forecasts["planned"],
        )


def _busy_ms(costs: Costs, load: Load, now_ms: float) -> float:
    """Returns when the running read will end: as expected, or, if it is late already, after as long again as it is late."""
    if not load.in_flight:
        return 0.0
    pages = len(load.in_flight)
    return abs(fetch_ms(costs.link, load.prompt.page_bytes, pages, pages, costs.copy) - (now_ms - load.asked_ms))


def _load_plan(planned: Split, deadline_ms: float) -> LoadPlan:
    meet, order = planned.meet, FetchOrder.LAYERS if planned.by_layers else FetchOrder.BACK_TO_FRONT
    return LoadPlan(meet, planned.work.hit_end, planned.batch_blocks, deadline_ms, order, meet)


def _probe(work: Work, deadline_ms: float) -> LoadPlan:
    """Plans one page from the end, while everything before it is computed."""
    last = work.back - 1
    return LoadPlan(last, work.back, 1, deadline_ms, FetchOrder.BACK_TO_FRONT, last)
