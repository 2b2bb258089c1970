"""A bounded spin before a thread sleeps for the peer's next frame, as long as it is measured to help.

Owns: `Spin`, one per connection, and the process's limit of threads that spin at once. To sleep and to be woken costs some 50 us on
each side of an exchange, also the one that wakes. Where the peer answers as soon as that, looking for its bytes costs less. But
where both share the cores of a host, a thread that spins may take the core on which its answer is computed; so both ways are tried,
and judged by the time from one frame to the next.
Invariants: a wait spins for at most its bound, and gives its core away between two looks; where spinning does not pay, at most one
run of each period spins, and none if the waits are too long for it.
"""

from __future__ import annotations

import os
import select
import socket
import statistics
import threading
from time import perf_counter
from typing import Final

_RUN: Final = 32
"""Waits that spin, or sleep, one after the other: the layers of a step or two. Their median leaves out the pause between steps."""

_PERIOD_LEAST: Final = 4
_PERIOD_MOST: Final = 32
"""Of so many runs, the first spins and the second sleeps, to measure; the others do what was better. The first periods are short,
because the first step of a sequence may be another than those that follow.
"""

_GAIN_MIN: Final = 0.01
"""Spinning must shorten the time from frame to frame by so much: it costs a core."""

_CORES: Final = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1  # a system without it never spins
_spinning = threading.BoundedSemaphore(max(1, _CORES - 1))


class Spin:
    """Waits of one socket, used by one thread at a time. `bound_ms` limits each spin."""

    def __init__(self, connection: socket.socket, bound_ms: float) -> None:
        self._bound_s = bound_ms / 1e3
        self._poll = select.poll()
        self._poll.register(connection, select.POLLIN)
        self._period = _PERIOD_LEAST
        self._run = 0
        self._spins = _CORES > 1
        self._pays = False
        self._spun_s = 0.0
        self._began_s = 0.0
        self._ended_s = perf_counter()
        self._cycles_s: list[float] = []
        self._waits_s: list[float] = []

    def begin(self) -> None:
        """Before a wait. If this one is to spin and few threads do, spins until bytes are there or the bound is reached."""
        self._began_s = now_s = perf_counter()
        if not self._spins or not _spinning.acquire(blocking=False):
            return
        try:
            until_s = now_s + self._bound_s
            while not self._poll.poll(0) and perf_counter() < until_s:
                os.sched_yield()
        finally:
            _spinning.release()

    def end(self) -> None:
        """After the wait that `begin` began."""
        now_s = perf_counter()
        self._cycles_s.append(now_s - self._ended_s)
        self._waits_s.append(now_s - self._began_s)
        self._ended_s = now_s
        if len(self._cycles_s) == _RUN:
            self._end_run(statistics.median(self._cycles_s), statistics.median(self._waits_s))
            self._cycles_s.clear()
            self._waits_s.clear()

    def _end_run(self, cycle_s: float, wait_s: float) -> None:
        if self._run == 0:
            self._spun_s = cycle_s
        elif self._run == 1:
            self._pays = self._spun_s < (1 - _GAIN_MIN) * cycle_s
        self._run += 1
        if self._run == self._period:
            self._run, self._period = 0, min(2 * self._period, _PERIOD_MOST)
        may = _CORES > 1 and wait_s <= 2 * self._bound_s
        self._spins = may and (self._run == 0 or (self._run > 1 and self._pays))
