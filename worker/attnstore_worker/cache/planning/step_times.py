"""The durations of steps, told to the observer.

Owns: `StepTimes`. Invariant: a step never waits to be measured. The host's clock measures what the host computes itself. A device
computes behind the host, so it is measured by its own timer, and told once that has ended: beside one of the next steps.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, replace
from typing import Final

from attnstore.clock import Clock
from attnstore_worker.cache.planning.observation import Observer, Step
from attnstore_worker.device.base import Device, Timer

_UNTOLD_STEPS_MAX: Final = 64
"""More than ever are in flight; those of a device that answers no more are dropped."""


@dataclass(slots=True)
class Started:
    """A step that has started. `timer` is None if the host computes it."""

    at_ms: float
    timer: Timer | None


class StepTimes:
    """Tells `observer` of the steps that the model runs on `device`."""

    def __init__(self, device: Device, clock: Clock, observer: Observer) -> None:
        self._device = device
        self._clock = clock
        self._observer = observer
        self._untold: deque[tuple[Timer, Step]] = deque(maxlen=_UNTOLD_STEPS_MAX)

    def start(self) -> Started:
        """Starts a step, before anything of it is submitted."""
        timer = None if self._device.addressable else self._device.timer()
        return Started(self._clock.now_ms(), timer)

    def end(self, started: Started, chunks: tuple[tuple[int, int], ...], round_trips: int = 0, attend_bytes: int = 0) -> None:
        """Ends a step after all of it is submitted; the arguments are the fields of `Step`."""
        step = Step(started.at_ms, self._clock.now_ms(), chunks, round_trips, attend_bytes)
        if started.timer is None:
            self._observer.stepped(step)
            return
        started.timer.stop()
        self._untold.append((started.timer, step))
        while self._untold and (elapsed_ms := self._untold[0][0].elapsed_ms()) is not None:
            _, done = self._untold.popleft()
            self._observer.stepped(replace(done, ended_ms=done.started_ms + elapsed_ms))
