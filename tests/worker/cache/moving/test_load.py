"""A load, transition by transition: the table that its module draws is read and played, then what each command does beside."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable
from dataclasses import fields
from typing import Any

import pytest

from attnstore_worker.cache.moving import load as module
from attnstore_worker.cache.moving.load import FetchOrder, Load, LoadEnd, LoadPlan, LoadState, Prompt, SearchPlan

PROMPT = Prompt(7, 49, 4, 64, 2, resident_blocks=2, usable_blocks=12)
SEARCH = SearchPlan(100.0, compute_before=4)
PLAN = LoadPlan(4, 10, 3, 50.0, compute_before=5)
ALL = 99
"""More blocks than there are."""


def searching() -> Load:
    return Load(PROMPT, SEARCH, 10.0)


def found() -> Load:
    load = searching()
    load.found(8, 15.0)
    return load


def planned(plan: LoadPlan = PLAN) -> Load:
    load = found()
    load.begin(plan, 20.0)
    return load


def reading(plan: LoadPlan = PLAN) -> Load:
    load = planned(plan)
    assert load.next_batch(25.0, ALL)
    return load


def untaken() -> Load:
    load = reading()
    load.arrived([4, 5], 128)
    return load


def finished() -> Load:
    load = reading(LoadPlan(4, 7, 3, 50.0))
    load.arrived([4, 6], 128)
    assert load.next_batch(30.0, ALL) == range(0)
    return load


def cancelled() -> Load:
    load = reading()
    assert load.cancel(LoadEnd.RELEASED, 35.0) == range(4, 7)
    return load


STATES = {
    LoadState.SEARCHING: searching,
    LoadState.FOUND: found,
    LoadState.READING: reading,
    LoadState.FINISHED: finished,
    LoadState.ENDED: cancelled,
}
BETWEEN_READS = {"next_batch": planned, "take": untaken}
COMMANDS: dict[str, Callable[[Load], object]] = {
    "found(0)": lambda load: load.found(0, 40.0),
    "found(n)": lambda load: load.found(3, 40.0),
    "lent(n)": lambda load: load.lent(3, 40.0),
    "begin(plan)": lambda load: load.begin(PLAN, 40.0),
    "begin(None)": lambda load: load.begin(None, 40.0),
    "next_batch": lambda load: load.next_batch(40.0, ALL),
    "arrived": lambda load: load.arrived([4], 64),
    "replan(plan)": lambda load: load.replan(LoadPlan(4, 8, 3, 60.0)),
    "replan(None)": lambda load: load.replan(None),
    "finish": lambda load: load.finish(),
    "take": lambda load: load.take(40.0),
    "cancel(end)": lambda load: load.cancel(LoadEnd.LATE, 40.0),
}


def drawn() -> dict[tuple[str, LoadState], str]:
    """The cells of the table in the module's docstring."""
    assert module.__doc__ is not None
    lines = module.__doc__.split("    command ")[1].split("\n\n")[0].splitlines()
    assert [LoadState[name] for name in lines[0].split()] == list(LoadState)
    rows = [re.split(r"  +", line.strip()) for line in lines[1:]]
    return {(row[0], state): cell for row in rows for state, cell in zip(LoadState, row[1:], strict=True)}


def contents(load: Load) -> dict[str, Any]:
    return {each.name: copy.copy(getattr(load, each.name)) for each in fields(load)}


def test_the_table_has_every_command() -> None:
    assert {command for command, _ in drawn()} == COMMANDS.keys()


@pytest.mark.parametrize(("command", "state"), drawn())
def test_every_cell_of_the_table_is_true(command: str, state: LoadState) -> None:
    load = BETWEEN_READS[command]() if command in BETWEEN_READS and state is LoadState.READING else STATES[state]()
    assert load.state is state
    before, cell = contents(load), drawn()[command, state]
    COMMANDS[command](load)
    if cell == "-":
        assert contents(load) == before
    elif cell == "none in flight":
        assert (load.state, load.in_flight, load.arrived_blocks) == (state, range(0), before["arrived_blocks"])
    else:
        assert load.state is LoadState[cell.split(",")[0]]
        assert contents(load) != before


def test_the_table_s_second_cases() -> None:
    load = planned(LoadPlan(4, 4, 3, 50.0))
    assert load.next_batch(30.0, ALL) == range(0)
    assert load.state is LoadState.FINISHED
    load = reading()
    assert not load.replan(None)
    assert (load.state, len(load.pending)) == (LoadState.READING, 0)


def test_a_load_without_a_search_has_ended() -> None:
    load = Load(PROMPT, None, 10.0)
    assert (load.running, load.over, load.due_ms, load.ended_ms) == (False, True, math.inf, 10.0)
    assert load.claim(12) == 12


@pytest.mark.parametrize(
    ("order", "batches"),
    [
        (FetchOrder.FRONT_TO_BACK, [range(4, 7), range(7, 10)]),
        (FetchOrder.BACK_TO_FRONT, [range(7, 10), range(4, 7)]),
        (FetchOrder.LAYERS, [range(4, 10)]),
    ],
)
def test_batches_follow_the_order_of_the_plan(order: FetchOrder, batches: list[range]) -> None:
    load = planned(LoadPlan(4, 12, 3, 50.0, order))
    taken = []
    while batch := load.next_batch(30.0, ALL):
        taken.append(batch)
        load.arrived(batch, 64)
    assert taken == batches, "the plan ends where the hits do"
    assert load.take(40.0) == [block for batch in batches for block in batch]
    assert (load.end, load.ended_ms, load.arrived_blocks) == (LoadEnd.COMPLETE, 40.0, 6)


def test_a_batch_is_never_larger_than_a_read_may_be() -> None:
    assert planned(LoadPlan(2, 10, 99, 50.0, FetchOrder.LAYERS)).next_batch(30.0, 5) == range(2, 7)
    assert planned(LoadPlan(2, 10, 99, 50.0)).next_batch(30.0, 5) == range(2, 7)
    assert len(planned(LoadPlan(2, 10, 0, 50.0)).next_batch(30.0, 5)) == 1, "and never empty while blocks are pending"


def test_a_claim_is_bounded_by_the_plan_until_the_load_is_finished() -> None:
    load = searching()
    assert load.claim(12) == SEARCH.compute_before
    load.found(8, 15.0)
    load.begin(LoadPlan(8, 10, 2, 50.0, compute_before=6), 20.0)
    assert load.claim(12) == 6
    load.finish()
    assert load.claim(9) == 9
    assert load.claim(3) == 9, "a claim is never taken back"


def test_a_claim_stops_before_blocks_in_flight_and_before_those_that_arrived() -> None:
    load = reading(LoadPlan(5, 10, 3, 50.0, compute_before=99))
    assert load.claim(12) == 5
    load.arrived([6], 64)
    assert load.next_batch(30.0, ALL) == range(8, 10)
    assert load.claim(12) == 6, "it arrived and was not taken"
    assert load.take(30.0) == [6]
    assert load.claim(12) == 6, "it is ready"
    assert load.pass_ready(6) == 7
    assert load.claim(12) == 8


def test_what_is_claimed_is_not_read_and_the_load_has_met() -> None:
    load = planned(LoadPlan(2, 10, 2, 50.0, FetchOrder.BACK_TO_FRONT, compute_before=99))
    assert load.next_batch(30.0, ALL) == range(8, 10)
    assert load.claim(7) == 7
    load.arrived([8, 9], 128)
    assert load.next_batch(35.0, ALL) == range(7, 8)
    load.arrived([7], 64)
    assert load.next_batch(40.0, ALL) == range(0)
    load.take(40.0)
    assert load.end is LoadEnd.MET


def test_after_a_cancel_nothing_arrives_and_bytes_are_still_counted() -> None:
    load = cancelled()
    load.arrived([4, 5, 6], 192)
    assert (load.take(50.0), load.arrived_blocks, load.bytes_read, load.end) == ([], 0, 192, LoadEnd.RELEASED)


def test_what_arrived_before_a_cancel_can_still_be_taken() -> None:
    load = reading()
    load.arrived([4, 5], 128)
    assert load.cancel(LoadEnd.MET, 30.0) == range(0)
    assert load.take(40.0) == [4, 5]
    assert (load.ended_ms, load.over) == (30.0, False)
    assert load.pass_ready(4) == 6
    assert (load.over, load.used_blocks) == (True, 2)


def test_a_read_without_a_hit_is_the_last_one() -> None:
    load = reading()
    load.arrived([], 0)
    assert load.replan(LoadPlan(2, 10, 3, 50.0))
    assert load.next_batch(30.0, ALL) == range(0)
    assert load.state is LoadState.FINISHED


@pytest.mark.parametrize("order", [FetchOrder.FRONT_TO_BACK, FetchOrder.BACK_TO_FRONT])
def test_a_new_plan_moves_the_end_that_is_not_reached_and_keeps_the_order(order: FetchOrder) -> None:
    load = reading(LoadPlan(2, 10, 2, 50.0, order))
    load.arrived(load.in_flight, 128)
    assert load.replan(LoadPlan(5, 7, 1, 80.0, FetchOrder.LAYERS, compute_before=3))
    assert load.plan == LoadPlan(5, 7, 1, 80.0, order, compute_before=3)
    assert load.pending == (range(4, 7) if order is FetchOrder.FRONT_TO_BACK else range(5, 8))


def test_lent_pages_arrive_at_once_through_shared_memory() -> None:
    load = searching()
    assert load.claim(4) == 4
    assert load.lent(8, 15.0)
    assert load.take(20.0) == [4, 5, 6, 7, 8, 9], "what was claimed is computed"
    assert (load.end, load.shared, load.pass_ready(4), load.shared_blocks) == (LoadEnd.LENT, set(range(4, 10)), 10, 6)
    assert not cancelled().lent(8, 15.0)


def test_ends_that_come_by_themselves() -> None:
    nothing = searching()
    nothing.found(0, 15.0)
    declined = found()
    declined.begin(None, 20.0)
    broken = searching()
    broken.finish()
    for load in (nothing, declined, broken):
        load.take(30.0)
    assert [load.end for load in (nothing, declined, broken)] == [LoadEnd.NOT_FOUND, LoadEnd.DECLINED, LoadEnd.NOT_FOUND]


def test_a_stage_is_due_its_deadline_after_it_began() -> None:
    assert [load.due_ms for load in (searching(), found(), reading(), cancelled())] == [110.0, 110.0, 70.0, math.inf]


def test_a_snapshot_keeps_its_numbers() -> None:
    load = reading()
    seen = load.snapshot()
    load.arrived([4], 64)
    load.claim(5)
    assert (seen.in_flight, seen.front, seen.arrived_blocks, seen.bytes_read) == (range(4, 7), 2, 0, 0)


def test_a_table_that_is_cut_forgets_what_is_ready_behind() -> None:
    load = reading()
    load.arrived([4, 5, 6], 192)
    load.take(30.0)
    load.cut(5)
    assert load.ready == {4}


def test_blocks_by_layers_can_be_computed_behind_from_their_first_layer_on() -> None:
    load = reading(LoadPlan(2, 10, 99, 50.0, FetchOrder.LAYERS))
    assert load.layered == range(2, 10)
    assert not load.may_compute_behind(8)
    load.layer_arrived(0, 8)
    assert load.may_compute_behind(8)
    assert not load.may_compute_behind(4), "the computed front is elsewhere"
    assert [load.has_layer(layer) for layer in (0, 1, None)] == [True, False, False]
    load.arrived(range(2, 10), 512)
    assert [load.has_layer(layer) for layer in (0, 1, None)] == [True, True, True]


@pytest.mark.parametrize(
    "lose",
    [
        lambda load: load.layer_arrived(1, 7),
        lambda load: load.arrived([2, 3], 128),
        lambda load: load.cancel(LoadEnd.RELEASED, 30.0),
        Load.finish,
    ],
)
def test_a_layer_that_is_not_whole_is_lost_for_good(lose: Callable[[Load], object]) -> None:
    load = reading(LoadPlan(2, 10, 99, 50.0, FetchOrder.LAYERS))
    load.layer_arrived(0, 8)
    lose(load)
    assert load.layers_lost
    assert not load.may_compute_behind(8)
