"""Probes for the lag of an event loop and the time that a lock is held: the maximum of each since the last query.

Owns: `LoopProbe` and `TimedLock`. Both report the elapsed time and the CPU time that their own thread used in it. If other
processes use the cores, only the first grows, so that a busy machine is not taken for a slow node.
"""

from __future__ import annotations

import asyncio
import threading
import time
from types import TracebackType
from typing import Final

_PERIOD_S: Final = 0.001


class LoopProbe:
    """`run` runs on the observed event loop; `take` may be called from any thread."""

    def __init__(self) -> None:
        self._lag_s = self._busy_s = 0.0

    async def run(self) -> None:
        """Measures every millisecond how late it is, until it is cancelled."""
        while True:
            due_s, busy_s = time.perf_counter() + _PERIOD_S, time.thread_time()
            await asyncio.sleep(_PERIOD_S)
            self._lag_s = max(self._lag_s, time.perf_counter() - due_s)
            self._busy_s = max(self._busy_s, time.thread_time() - busy_s)

    def take(self) -> tuple[float, float]:
        """Returns the longest lag and the maximum CPU time between two measurements, in milliseconds, since the last call."""
        lag_s, busy_s, self._lag_s, self._busy_s = self._lag_s, self._busy_s, 0.0, 0.0
        return 1e3 * lag_s, 1e3 * busy_s


class TimedLock:
    """Replaces a `threading.Lock` that is used in `with` blocks."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._began_s = self._held_s = 0.0

    def __enter__(self) -> None:
        self._lock.acquire()
        self._began_s = time.thread_time()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self._held_s = max(self._held_s, time.thread_time() - self._began_s)
        self._lock.release()

    def take(self) -> float:
        """Returns the maximum CPU time used while it was held, in milliseconds, since the last call."""
        with self._lock:
            held_s, self._held_s = self._held_s, 0.0
        return 1e3 * held_s
