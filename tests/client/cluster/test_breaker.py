"""The circuit breaker: which nodes are skipped, and when they are tried again."""

from __future__ import annotations

import pytest

from attnstore.client.cluster.breaker import FAILURES_MAX, PROBE_MS_FIRST, PROBE_MS_MAX, CircuitBreaker, CircuitState, had_fair_time
from attnstore.limits import MIB, NODE_FAIR_MS
from attnstore.testing import ManualClock


def failing(clock: ManualClock, times: int) -> CircuitBreaker:
    breaker = CircuitBreaker(clock)
    for _ in range(times):
        breaker.failed()
    return breaker


def test_a_node_is_left_alone_after_the_failure_that_is_one_too_many() -> None:
    assert failing(ManualClock(), FAILURES_MAX - 1).state is CircuitState.CLOSED
    assert failing(ManualClock(), FAILURES_MAX).state is CircuitState.OPEN


def test_only_failures_in_a_row_count() -> None:
    breaker = failing(ManualClock(), FAILURES_MAX - 1)
    breaker.succeeded()
    breaker.failed()
    assert breaker.state is CircuitState.CLOSED


def test_time_alone_closes_no_circuit_but_a_probe_that_succeeds_does() -> None:
    clock = ManualClock()
    breaker = failing(clock, FAILURES_MAX)
    clock.advance_ms(10 * PROBE_MS_MAX)
    assert breaker.state is CircuitState.OPEN
    breaker.succeeded()
    assert breaker.state is CircuitState.CLOSED


def test_probes_come_later_and_later_up_to_a_maximum() -> None:
    clock = ManualClock()
    breaker = failing(clock, FAILURES_MAX)
    waits = []
    for _ in range(8):
        waits.append(breaker.probe_in_ms())
        clock.advance_ms(waits[-1])
        assert breaker.probe_in_ms() == 0
        breaker.probe_failed()
    assert waits[:3] == [PROBE_MS_FIRST, 2 * PROBE_MS_FIRST, 4 * PROBE_MS_FIRST]
    assert waits[-1] == PROBE_MS_MAX
    breaker.succeeded()
    for _ in range(FAILURES_MAX):
        breaker.failed()
    assert breaker.probe_in_ms() == PROBE_MS_FIRST


@pytest.mark.parametrize(
    ("given_ms", "size_bytes", "is_fair"),
    [(2, 0, False), (NODE_FAIR_MS - 1, 0, False), (NODE_FAIR_MS, 0, True), (NODE_FAIR_MS, MIB, False), (10_000, 64 * MIB, True)],
)
def test_a_deadline_says_something_of_a_node_only_if_it_left_time_for_an_answer_and_for_what_is_moved(
    given_ms: float, size_bytes: int, is_fair: bool
) -> None:
    assert had_fair_time(given_ms, size_bytes) is is_fair
