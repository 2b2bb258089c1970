"""The state of an attending sequence: each row of its table, and random histories compared with a model of plain flags."""

from __future__ import annotations

import pytest
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from attnstore_worker.cache.attending.contexts import AttendedPrefix
from attnstore_worker.engine.attend_state import LOSSES_MAX, AttendEvent, AttendPhase, AttendState

R, A, M, B, G = AttendPhase.RESIDENT, AttendPhase.ATTENDING, AttendPhase.MOVED, AttendPhase.RETURNED, AttendPhase.GIVEN_UP
BEGIN, LOAD, MOVE, GIVE_UP = AttendEvent.BEGIN, AttendEvent.LOAD, AttendEvent.MOVE, AttendEvent.GIVE_UP
PREFIX = AttendedPrefix(1, (), 0.0)
TABLE = {
    R: {BEGIN: A, LOAD: R},
    A: {BEGIN: A, LOAD: R, MOVE: M, GIVE_UP: G},
    M: {BEGIN: B, LOAD: M},
    B: {BEGIN: B, LOAD: M, MOVE: M, GIVE_UP: G},
    G: {LOAD: G},
}


def follow(state: AttendState, event: AttendEvent) -> None:
    match event:
        case AttendEvent.BEGIN:
            state.begin(7)
        case AttendEvent.LOAD:
            state.load()
        case AttendEvent.MOVE:
            state.move()
        case AttendEvent.GIVE_UP:
            state.give_up()


@pytest.mark.parametrize("event", AttendEvent)
@pytest.mark.parametrize("phase", AttendPhase)
def test_an_event_leads_where_the_table_says_and_nowhere_else(phase: AttendPhase, event: AttendEvent) -> None:
    state = AttendState(phase)
    after = TABLE[phase].get(event)
    if after is None:
        with pytest.raises(AssertionError, match=f"{event.value} does not follow in {phase.value}"):
            follow(state, event)
        assert state.phase is phase
    else:
        follow(state, event)
        assert state.phase is after


@pytest.mark.parametrize(
    ("phase", "attends", "has_moved", "may_begin"),
    [(R, False, False, True), (A, True, False, True), (M, False, True, True), (B, True, True, True), (G, False, False, False)],
)
def test_what_a_phase_says(phase: AttendPhase, attends: bool, has_moved: bool, may_begin: bool) -> None:
    state = AttendState(phase)
    assert (state.attends, state.has_moved, state.may_begin) == (attends, has_moved, may_begin)


@pytest.mark.parametrize("event", [LOAD, MOVE, GIVE_UP])
def test_no_prefix_outlives_attending(event: AttendEvent) -> None:
    with pytest.raises(AssertionError, match="outlived"):
        follow(AttendState(A, PREFIX), event)


def test_a_sequence_gives_up_after_the_loss_that_is_one_too_many() -> None:
    state = AttendState()
    state.begin(0)
    for _ in range(LOSSES_MAX):
        state.lose()
        assert state.attends
    state.lose()
    assert state.phase is G


def test_a_resident_sequence_loses_nothing() -> None:
    with pytest.raises(AssertionError):
        AttendState().lose()


class Life(RuleBasedStateMachine):
    """The history of a sequence, and a model with one flag for each question that the table answers."""

    def __init__(self) -> None:
        super().__init__()
        self.state = AttendState()
        self.attends = self.has_moved = self.given_up = False
        self.losses = 0

    @precondition(lambda self: not self.given_up)
    @rule()
    def begin(self) -> None:
        self.state.begin(3)
        self.attends = True

    @rule()
    def load(self) -> None:
        self.state.prefix = None
        self.state.load()
        self.attends = False

    @precondition(lambda self: self.attends)
    @rule()
    def find(self) -> None:
        self.state.prefix = PREFIX

    @precondition(lambda self: self.attends)
    @rule()
    def move(self) -> None:
        self.state.prefix = None
        self.state.move()
        self.attends, self.has_moved = False, True

    @precondition(lambda self: self.attends)
    @rule()
    def lose(self) -> None:
        self.state.prefix = None
        self.state.lose()
        self.losses += 1
        if self.losses > LOSSES_MAX:
            self.given_up, self.attends = True, False

    @precondition(lambda self: self.attends)
    @rule()
    def give_up(self) -> None:
        self.state.prefix = None
        self.state.give_up()
        self.given_up, self.attends = True, False

    @invariant()
    def agrees(self) -> None:
        assert self.state.attends == self.attends
        assert self.state.may_begin == (not self.given_up)
        assert self.state.has_moved == (self.has_moved and not self.given_up)
        assert self.state.prefix is None or self.attends


TestLife = Life.TestCase
