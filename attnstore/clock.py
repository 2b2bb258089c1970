"""Clocks and deadlines. Everything that measures time or waits takes a `Clock`, so that tests can inject one that they advance."""

from __future__ import annotations

import math
import time
from typing import Protocol

from attnstore.errors import DeadlineExceeded


class Clock(Protocol):
    """A monotonic clock in milliseconds."""

    def now_ms(self) -> float:
        """Returns milliseconds since an arbitrary start; never decreases."""
        ...


class MonotonicClock:
    """The machine's monotonic clock."""

    def now_ms(self) -> float:
        return time.monotonic_ns() / 1e6


class Deadline:
    """A point in time that a call must not exceed."""

    def __init__(self, clock: Clock, deadline_ms: float) -> None:
        self._clock = clock
        self._end_ms = clock.now_ms() + deadline_ms

    def left_ms(self) -> float:
        """Returns the time left. Raises `DeadlineExceeded` if there is none."""
        left = self._end_ms - self._clock.now_ms()
        if left <= 0:
            raise DeadlineExceeded("the deadline of the call passed")
        return left

    @property
    def is_over(self) -> bool:
        """True if no time is left."""
        return self._clock.now_ms() >= self._end_ms

    def sooner(self, limit_ms: float = math.inf, *, last: bool = False) -> Deadline:
        """Returns the deadline of one attempt: half of the time left, so that the next attempt has time too, or all of it for the
        `last` one; at most `limit_ms`. Raises `DeadlineExceeded` if no time is left.
        """
        left_ms = self.left_ms()
        return Deadline(self._clock, min(left_ms if last else left_ms / 2, limit_ms))
