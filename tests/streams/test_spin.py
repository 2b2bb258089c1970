"""Which waits spin: those where it was measured to shorten the time from frame to frame, each within its bound."""

from __future__ import annotations

import math
import socket
from collections.abc import Iterator

import pytest

from attnstore.streams import spin
from attnstore.streams.spin import Spin

BOUND_MS = 1.0
RUN = 32


class Peers:
    """Two ends of a connection, and a clock that moves only when the test says so, or by `look_s` at each look."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.here, self.there = socket.socketpair()
        self.now_s = 0.0
        self.looks = 0
        self.arrives_s = math.inf
        monkeypatch.setattr(spin, "perf_counter", lambda: self.now_s)
        monkeypatch.setattr(spin, "_CORES", 2)
        monkeypatch.setattr(spin.os, "sched_yield", self._look)
        self.spin = Spin(self.here, BOUND_MS)

    def _look(self) -> None:
        self.looks += 1
        self.now_s += 1e-5
        if self.now_s >= self.arrives_s:
            self.arrives_s = math.inf
            self.there.send(b"x")

    def wait(self, spun_s: float, slept_s: float) -> bool:
        """Waits once for a peer that is that fast if this end spins, and that fast if it sleeps. Returns whether it span."""
        began_s, looks = self.now_s, self.looks
        self.arrives_s = began_s + spun_s
        self.spin.begin()
        span = self.looks > looks
        if not span or math.isfinite(self.arrives_s):  # it sleeps, at last
            self.now_s = max(self.now_s, began_s + slept_s)
        else:
            self.here.recv(1)
        self.spin.end()
        return span

    def runs(self, count: int, spun_s: float, slept_s: float) -> list[bool]:
        """Waits for that many runs. Returns whether each of them span."""
        return [[self.wait(spun_s, slept_s) for _ in range(RUN)][-1] for _ in range(count)]


@pytest.fixture
def peers(monkeypatch: pytest.MonkeyPatch) -> Iterator[Peers]:
    made = Peers(monkeypatch)
    yield made
    made.here.close()
    made.there.close()


def test_a_wait_ends_as_soon_as_bytes_are_there(peers: Peers) -> None:
    peers.there.send(b"x")
    peers.spin.begin()
    assert peers.looks == 0


def test_a_wait_spins_no_longer_than_its_bound(peers: Peers) -> None:
    peers.spin.begin()
    assert peers.now_s == pytest.approx(BOUND_MS / 1e3, abs=2e-5)


def test_waits_spin_where_that_is_faster(peers: Peers) -> None:
    assert peers.runs(12, 500e-6, 550e-6) == [True, False, True, True, True, False, *[True] * 6]


def test_waits_sleep_where_spinning_takes_the_peers_core(peers: Peers) -> None:
    assert peers.runs(12, 600e-6, 550e-6) == [True, False, False, False, True, *[False] * 7]


def test_waits_that_are_too_long_never_spin_again(peers: Peers) -> None:
    assert peers.runs(40, 5e-3, 5e-3) == [True] + [False] * 39


def test_a_change_of_the_peer_is_noticed(peers: Peers) -> None:
    assert peers.runs(100, 600e-6, 550e-6)[-1] is False
    assert peers.runs(40, 500e-6, 550e-6)[-1] is True


def test_the_pause_between_two_steps_says_nothing(peers: Peers) -> None:
    def step(spun_s: float, slept_s: float) -> list[bool]:
        span = [peers.wait(spun_s, slept_s) for _ in range(29)]
        peers.now_s += 0.2
        return [*span, peers.wait(spun_s, slept_s)]

    assert all([step(500e-6, 550e-6)[-1] for _ in range(40)][-3:])


def test_only_some_threads_spin_at_once(peers: Peers, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spin, "_spinning", spin.threading.BoundedSemaphore(1))
    assert spin._spinning.acquire(blocking=False)
    assert not peers.wait(1e-4, 1e-4)
    spin._spinning.release()
    assert peers.wait(1e-4, 1e-4)
    assert spin._spinning.acquire(blocking=False), "a spin gives its place back"


def test_nothing_spins_on_one_core(monkeypatch: pytest.MonkeyPatch, peers: Peers) -> None:
    monkeypatch.setattr(spin, "_CORES", 1)
    peers.spin = Spin(peers.here, BOUND_MS)
    assert not any(peers.runs(40, 1e-4, 2e-4))
