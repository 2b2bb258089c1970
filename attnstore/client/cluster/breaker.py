"""A circuit breaker for one node: when calls to it are made, and when they are not worth making.

Invariants: pure; time comes in through the clock. A node that fails `FAILURES_MAX` times in a row is left alone; a probe, never a
user's call, finds out whether it is back. (Nygard, Release It!, 2007.) A deadline that passes counts as a failure of the node only
where the node had a fair time: a caller in a hurry says nothing about the node.
"""

from __future__ import annotations

import enum
from typing import Final

from attnstore.clock import Clock
from attnstore.limits import NODE_FAIR_BYTES_PER_MS, NODE_FAIR_MS

FAILURES_MAX: Final = 2
"""Failures in a row that open the circuit."""
PROBE_MS_FIRST: Final = 250.0
PROBE_MS_MAX: Final = 5_000.0
"""Time to the first probe of an open circuit; it doubles with each probe that fails, up to the second number."""


class CircuitState(enum.StrEnum):
    """What becomes of a call."""

    CLOSED = "closed"
    """It is made."""
    OPEN = "open"
    """It is not made."""


def had_fair_time(given_ms: float, size_bytes: int = 0) -> bool:
    """Whether a node that was given so long for a call that moves `size_bytes` should have answered."""
    return given_ms >= NODE_FAIR_MS + size_bytes / NODE_FAIR_BYTES_PER_MS


class CircuitBreaker:
    """Counts how calls to one node end."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._failures = 0
        self._probe_ms = PROBE_MS_FIRST
        self._probe_at_ms: float | None = None

    @property
    def state(self) -> CircuitState:
        """OPEN from the failure that is one too many to the next success."""
        return CircuitState.CLOSED if self._probe_at_ms is None else CircuitState.OPEN

    def succeeded(self) -> None:
        """A call or a probe was answered."""
        self._failures = 0
        self._probe_ms = PROBE_MS_FIRST
        self._probe_at_ms = None

    def failed(self) -> None:
        """A call was not answered."""
        self._failures += 1
        if self._failures >= FAILURES_MAX and self._probe_at_ms is None:
            self._probe_at_ms = self._clock.now_ms() + self._probe_ms

    def probe_failed(self) -> None:
        """The probe of an open circuit was not answered: the next one comes later."""
        self._probe_ms = min(2 * self._probe_ms, PROBE_MS_MAX)
        self._probe_at_ms = self._clock.now_ms() + self._probe_ms

    def probe_in_ms(self) -> float:
        """Time until an open circuit is to be probed; 0 where that is due."""
        return 0.0 if self._probe_at_ms is None else max(0.0, self._probe_at_ms - self._clock.now_ms())
