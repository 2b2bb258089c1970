"""The wire's schedule, on a clock that the test advances."""

from __future__ import annotations

import math
import threading

import pytest

from attnstore.testing.link_relay import Gate, Wire

_BURST_S = 0.001


class _Time:
    now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def time() -> _Time:
    return _Time()


def test_bytes_leave_at_the_rate_of_the_wire(time: _Time) -> None:
    wire = Wire(8_000, 0, 0, time)  # 1,000 bytes per second
    assert wire.admit(500) == pytest.approx(100.5)
    assert wire.admit(500) == pytest.approx(101.0), "the second piece waits for the first"
    assert wire.moved_bytes == 1_000


def test_a_silent_wire_saves_up_a_millisecond_and_no_more(time: _Time) -> None:
    wire = Wire(8_000, 0, 0, time)
    time.now_s += 3_600
    assert wire.admit(1_000) == pytest.approx(time.now_s + 1 - _BURST_S)


def test_nothing_leaves_before_it_came(time: _Time) -> None:
    wire = Wire(8e12, 0, 0, time)
    time.now_s += 1
    assert wire.admit(1) == time.now_s


def test_a_wire_without_a_limit_delays_nothing(time: _Time) -> None:
    wire = Wire(math.inf, 0, 0, time)
    assert [wire.admit(1 << 30) for _ in range(3)] == [time.now_s] * 3


def test_another_rate_holds_for_what_comes_from_then_on(time: _Time) -> None:
    wire = Wire(8_000, 0, 0, time)
    wire.admit(10_000)  # ten seconds' worth
    wire.change(80_000, 0, 0)
    assert wire.admit(10_000) == pytest.approx(time.now_s + 1), "what was admitted at the old rate does not hold up the new"


def test_pieces_take_about_a_millisecond_of_the_wire(time: _Time) -> None:
    assert Wire(1e9, 0, 0, time).piece_bytes == 125_000
    assert Wire(1e6, 0, 0, time).piece_bytes == 1460, "not less than a packet"
    assert Wire(math.inf, 0, 0, time).piece_bytes == 1 << 20


def test_a_gate_that_opens_lets_those_who_waited_go_on() -> None:
    gate = Gate()
    gate.wait()
    gate.close()
    waiting = threading.Thread(target=gate.wait, daemon=True)
    waiting.start()
    waiting.join(0.05)
    assert waiting.is_alive()
    gate.open()
    waiting.join(30)
    assert not waiting.is_alive()


def test_a_flapping_gate_opens_by_itself() -> None:
    gate = Gate()
    gate.flap(0.01)
    for _ in range(3):
        gate.wait()
