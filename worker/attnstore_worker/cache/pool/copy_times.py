"""The durations of copies up to a device, by the device's own timer.

Owns: `CopyTimes`. Invariant: nothing waits to be measured. A copy is told of once it has ended: beside a later copy or step, or
when its load ends, which has waited for it anyway.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from attnstore_worker.cache.pool.tier import Tier
from attnstore_worker.device.base import Copy
from attnstore_worker.errors import DeviceLost

_UNTOLD_COPIES_MAX: Final = 64
"""More than are in flight; those of a device that answers no more are dropped."""


@dataclass(frozen=True, slots=True)
class CopyTime:
    """A copy of `pages` pages that came from `tier`, or of `layers` layers of each of them (None: all), took `elapsed_ms`."""

    tier: Tier
    pages: int
    layers: int | None
    elapsed_ms: float


class CopyTimes:
    """Calls `told` for each copy. Thread-safe."""

    def __init__(self, told: Callable[[CopyTime], None]) -> None:
        self._told = told
        self._lock = threading.Lock()
        self._untold: deque[tuple[Copy, Tier, int, int | None]] = deque(maxlen=_UNTOLD_COPIES_MAX)

    def submitted(self, copy: Copy, tier: Tier, pages: int, layers: int | None = None) -> None:
        """Adds a copy; the arguments are as in `CopyTime`. Tells of those before it that have ended."""
        self.tell()
        with self._lock:
            self._untold.append((copy, tier, pages, layers))

    def tell(self) -> None:
        """Tells of the copies that have ended, in their order. Waits for none."""
        while (ended := self._next()) is not None:
            self._told(ended)

    def _next(self) -> CopyTime | None:
        with self._lock:
            if not self._untold:
                return None
            copy, tier, pages, layers = self._untold[0]
            try:
                elapsed_ms = copy.elapsed_ms()
            except DeviceLost:
                self._untold.clear()
                return None
            if elapsed_ms is None:
                return None
            self._untold.popleft()
            return CopyTime(tier, pages, layers, elapsed_ms)
