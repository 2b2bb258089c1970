"""A clock that only tests advance."""

from __future__ import annotations


class ManualClock:
    """`Clock` whose time is set by the test.

    >>> clock = ManualClock()
    >>> clock.advance_ms(250)
    >>> clock.now_ms()
    250.0
    """

    def __init__(self, start_ms: float = 0.0) -> None:
        self._now_ms = start_ms

    def now_ms(self) -> float:
        return self._now_ms

    def advance_ms(self, step_ms: float) -> None:
        """Advances the time; a negative step raises `ValueError`, because a monotonic clock never goes back."""
        if step_ms < 0:
            raise ValueError(f"step_ms is {step_ms}; a monotonic clock never goes back")
        self._now_ms += step_ms
