"""A circuit breaker for one node: whether calls to it are made.

Invariants: pure; time comes from the clock. A node that fails `FAILURES_MAX` times in a row gets no more calls; a probe, never a
user's call, finds out whether it is back (Nygard, Release It!, 2007). A passed deadline counts as a failure of the node only if the
node had enough time: a short deadline says nothing about the node.
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
"""Time to the first probe of an open circuit; it doubles with each failed probe, up to the second number."""


class CircuitState(enum.StrEnum):
    """Whether calls are made."""

    CLOSED = "closed"
    """Calls are made."""
    OPEN = "open"
    """Calls are not made."""


def had_fair_time(given_ms: float, size_bytes: int = 0) -> bool:
    """Returns whether a node that had this much time for a call that moves `size_bytes` should have answered."""
    return given_ms >= NODE_FAIR_MS + size_bytes / NODE_FAIR_BYTES_PER_MS


class CircuitBreaker:
    """Counts the results of calls to one node."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._failures = 0
        self._probe_ms = PROBE_MS_FIRST
        self._probe_at_ms: float | None = None

    @property
    def state(self) -> CircuitState:
        """OPEN from the failure that exceeds the limit until the next success."""
        return CircuitState.CLOSED if self._probe_at_ms is None else CircuitState.OPEN

    def succeeded(self) -> None:
        """Records an answer to a call or a probe."""
        self._failures = 0
        self._probe_ms = PROBE_MS_FIRST
        self._probe_at_ms = None

    def failed(self) -> None:
        """Records a call without an answer."""
        self._failures += 1
        if self._failures >= FAILURES_MAX and self._probe_at_ms is None:
            self._probe_at_ms = self._clock.now_ms() + self._probe_ms

    def probe_failed(self) -> None:
        """Records an unanswered probe of an open circuit: the next one comes later."""
        self._probe_ms = min(2 * self._probe_ms, PROBE_MS_MAX)
        self._probe_at_ms = self._clock.now_ms() + self._probe_ms

    def probe_in_ms(self) -> float:
        """Returns the time until an open circuit must be probed; 0 if that is due."""
        return 0.0 if self._probe_at_ms is None else max(0.0, self._probe_at_ms - self._clock.now_ms())
