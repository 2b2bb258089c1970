"""The race detector against the happens-before relation of small random programs."""

from __future__ import annotations

from dataclasses import dataclass

import hypothesis.strategies as st
import pytest
from hypothesis import given

from attnstore_worker.device.races import HOST, Clock, Place, Races, Unsynchronised

ACTORS = (HOST, "compute", "up", "down")
PLACES = [Place("block", number, layer) for number in range(2) for layer in range(2)]


def test_two_reads_do_not_race() -> None:
    races = Races()
    races.accesses("up", "a", PLACES[:1], writes=False)
    races.accesses("down", "b", PLACES[:1], writes=False)
    assert races.found == []


def test_a_write_after_a_read_of_another_stream_races_until_it_waits() -> None:
    races = Races()
    races.accesses("compute", "a step reads", PLACES[:1], writes=False)
    after = races.clock("compute")
    with pytest.raises(Unsynchronised, match="block 0, layer 0: copy up writes is not ordered after a step reads"):
        races.accesses("up", "copy up writes", PLACES[:1], writes=True)
    races.joins("up", after)
    races.accesses("up", "again", PLACES[:1], writes=True)
    assert len(races.found) == 1


def test_other_layers_of_a_block_are_other_places() -> None:
    races = Races()
    races.accesses("up", "a", PLACES[:1], writes=True)
    races.accesses("compute", "b", PLACES[1:2], writes=True)
    assert races.found == []


def test_every_race_is_listed_though_its_exception_is_caught() -> None:
    races = Races()
    races.accesses("up", "a", PLACES, writes=True)
    with pytest.raises(Unsynchronised):
        races.accesses("compute", "b", PLACES, writes=False)
    assert [race.place for race in races.found] == PLACES


@dataclass(frozen=True)
class Step:
    """An access of an actor, after it has joined what another actor had done after `joins` steps of the program."""

    actor: str
    places: frozenset[int]
    writes: bool
    joins: tuple[int, ...]


STEPS = st.lists(
    st.builds(
        Step,
        st.sampled_from(ACTORS),
        st.frozensets(st.integers(0, len(PLACES) - 1), min_size=1, max_size=2),
        st.booleans(),
        st.lists(st.integers(0, 11), max_size=2).map(tuple),
    ),
    max_size=12,
)


def has_race(program: list[Step]) -> bool:
    """Returns whether two conflicting steps are unordered: neither reaches the other by an actor's order and by joins."""
    before: list[set[int]] = []
    for number, step in enumerate(program):
        direct = {other for other in step.joins if other < number}
        direct |= {other for other in range(number) if program[other].actor == step.actor}
        before.append(direct.union(*(before[other] for other in direct)))
    return any(
        first not in before[second]
        for second in range(len(program))
        for first in range(second)
        if program[first].places & program[second].places and (program[first].writes or program[second].writes)
    )


@given(program=STEPS)
def test_a_program_races_if_two_conflicting_accesses_are_unordered(program: list[Step]) -> None:
    races = Races()
    clocks: list[Clock] = []
    for step in program:
        for other in step.joins:
            if other < len(clocks):
                races.joins(step.actor, clocks[other])
        try:
            races.accesses(step.actor, "step", [PLACES[number] for number in sorted(step.places)], writes=step.writes)
        except Unsynchronised:
            assert races.found
        clocks.append(races.clock(step.actor))
    assert bool(races.found) == has_race(program)
