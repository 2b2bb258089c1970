"""The scheduler by itself: order, budget, admission and the choice of a victim."""

from __future__ import annotations

import pytest

from attnstore.errors import InvalidArgument, Overloaded
from attnstore_worker.cache.pool.block_table import BlockTable
from attnstore_worker.engine import SamplingParams, Sequence
from attnstore_worker.engine.scheduler import Scheduler
from attnstore_worker.options import SchedulerLimits

BLOCK_TOKENS = 4
PLENTY = 1_000


def scheduler(*, chunk_tokens: int = 8, step_tokens: int = 12, sequences_max: int = 4, waiting_max: int = 4) -> Scheduler:
    return Scheduler(SchedulerLimits(chunk_tokens, step_tokens, sequences_max, waiting_max), BLOCK_TOKENS)


def sequence(sequence_id: int, tokens: int, priority: int = 0) -> Sequence:
    return Sequence(sequence_id, [0] * tokens, tokens, SamplingParams(), 0.0, priority)


def start(plan: Scheduler, sequence: Sequence, *, computed_tokens: int = 0) -> Sequence:
    """Runs a sequence with blocks for its computed tokens."""
    plan.enqueue(sequence)
    sequence.table = BlockTable(BLOCK_TOKENS, list(range(-(-computed_tokens // BLOCK_TOKENS))))
    sequence.computed_tokens = computed_tokens
    plan.start(sequence)
    return sequence


def planned(plan: Scheduler) -> list[tuple[int, int, int]]:
    return [(chunk.sequence.sequence_id, chunk.begin, chunk.end) for chunk in plan.chunks()]


def test_decodes_come_first_and_prefill_takes_what_is_left_of_the_budget() -> None:
    plan = scheduler()
    start(plan, sequence(1, 20), computed_tokens=8)
    start(plan, sequence(2, 9), computed_tokens=8)
    start(plan, sequence(3, 20))
    start(plan, sequence(4, 3))
    assert planned(plan) == [(2, 8, 9), (1, 8, 16), (4, 0, 3)], "a chunk that does not fit waits whole, a shorter one may pass"


def test_one_chunk_of_prefill_fits_beside_all_decodes() -> None:
    plan = scheduler(step_tokens=11)
    for number in range(1, 4):
        start(plan, sequence(number, 9), computed_tokens=8)
    start(plan, sequence(4, 20))
    assert planned(plan)[-1] == (4, 0, 8)


def test_a_budget_that_could_starve_prefill_is_refused() -> None:
    with pytest.raises(InvalidArgument, match="step_tokens is 10; 11 are needed"):
        scheduler(step_tokens=10)


@pytest.mark.parametrize("limit", ["sequences_max", "waiting_max"])
def test_an_engine_for_no_sequence_is_refused(limit: str) -> None:
    with pytest.raises(InvalidArgument, match=limit):
        scheduler(**{limit: 0})


def test_the_highest_priority_is_admitted_first_and_equals_in_order_of_arrival() -> None:
    plan = scheduler()
    for number, priority in ((1, 0), (2, 5), (3, 0), (4, 5)):
        plan.enqueue(sequence(number, 4, priority))
    assert [waiting.sequence_id for waiting in plan.waiting] == [2, 4, 1, 3]
    first = plan.admissible(PLENTY)
    assert first is not None
    assert first.sequence_id == 2


def test_a_full_queue_refuses_but_takes_a_preempted_sequence_back_in_its_old_place() -> None:
    plan = scheduler(waiting_max=2)
    running = start(plan, sequence(1, 4))
    plan.enqueue(sequence(2, 4))
    plan.enqueue(sequence(3, 4))
    assert plan.full
    with pytest.raises(Overloaded, match="2 sequences are waiting"):
        plan.enqueue(sequence(4, 4))
    plan.preempt(running)
    assert [waiting.sequence_id for waiting in plan.waiting] == [1, 2, 3]


def test_a_prompt_is_admitted_once_it_fits_beside_the_growth_of_all_that_run() -> None:
    plan = scheduler()
    plan.enqueue(sequence(1, 16))
    assert plan.admissible(0) is not None, "nothing runs, so what is missing is on its way back"
    start(plan, sequence(2, 4))
    assert plan.admissible(4) is None
    assert plan.admissible(5) is not None


def test_a_prompt_that_does_not_fit_is_not_overtaken() -> None:
    plan = scheduler()
    start(plan, sequence(1, 4))
    plan.enqueue(sequence(2, 40))
    plan.enqueue(sequence(3, 4))
    assert plan.admissible(5) is None


def test_no_more_than_the_limit_run() -> None:
    plan = scheduler(sequences_max=2)
    for number in (1, 2):
        start(plan, sequence(number, 4))
    plan.enqueue(sequence(3, 4))
    assert plan.admissible(PLENTY) is None


def test_the_latest_sequence_of_the_lowest_priority_is_preempted() -> None:
    plan = scheduler()
    start(plan, sequence(1, 5, priority=1), computed_tokens=4)
    low = start(plan, sequence(2, 5), computed_tokens=4)
    start(plan, sequence(3, 5, priority=1), computed_tokens=4)
    assert plan.victim(3) is None
    assert plan.victim(2) is low
    plan.preempt(low)
    assert plan.victim(2) is None


def test_the_last_one_running_is_never_preempted() -> None:
    plan = scheduler()
    start(plan, sequence(1, 5), computed_tokens=4)
    assert plan.victim(0) is None


def test_a_sequence_is_removed_from_wherever_it_is() -> None:
    plan = scheduler()
    running, waiting = start(plan, sequence(1, 4)), sequence(2, 4)
    plan.enqueue(waiting)
    plan.remove(waiting)
    plan.remove(running)
    assert plan.running == plan.waiting == ()
