"""Time as a seam: everything that measures or waits takes a `Clock`, and tests inject one that they move by hand."""

from __future__ import annotations

import time
from typing import Protocol


class Clock(Protocol):
    """A monotonic clock in milliseconds."""

    def now_ms(self) -> float:
        """Milliseconds since an arbitrary start; never goes back."""
        ...


class MonotonicClock:
    """The machine's monotonic clock."""

    def now_ms(self) -> float:
        return time.monotonic_ns() / 1e6
