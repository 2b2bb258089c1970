"""Every decision of the planner: the predicted cost of each choice, the choice, and the outcome.

Owns: `Decision`, and `DecisionLog` with the last decisions and the errors of their predictions. Invariant: a prediction is made
when a load is planned, before it begins; later plans of the same load do not change it.
"""

from __future__ import annotations

import math
import threading
from bisect import bisect_left
from collections import deque
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from statistics import median
from typing import Any, Final

from attnstore_worker.cache.moving.load import Load, LoadEnd
from attnstore_worker.cache.planning.split import Choice

_KEPT: Final = 256
ERROR_BOUNDS: Final = (0.02, 0.05, 0.1, 0.15, 0.25, 0.5, 1.0, 2.0)
"""Upper bounds of the histogram of relative prediction errors."""


@dataclass(frozen=True, slots=True)
class Decision:
    """One prompt. Times in ms from its admission to its first token; None if unknown or not yet reached.

    `forecasts` has the predicted time of some choices, and of the plan. Blocks `[resident_blocks, hit_end)` were found below HBM:
    those from `meet` on were to be fetched, and `arrived_blocks` of them arrived. `copy_gbit_per_s` is the rate of their copies up
    to a device, None without such copies. `end` is why the load ended.
    """

    number: int
    at_ms: float
    tokens: int
    resident_blocks: int
    usable_blocks: int
    choice: Choice = Choice.RECOMPUTE
    hit_end: int | None = None
    meet: int | None = None
    rtt_ms: float | None = None
    gbit_per_s: float | None = None
    copy_gbit_per_s: float | None = None
    spread: float | None = None
    slowdown: float | None = None
    forecasts: dict[str, float] = field(default_factory=dict)
    predicted_ttft_ms: float | None = None
    happened_ttft_ms: float | None = None
    arrived_blocks: int = 0
    end: str | None = None

    @property
    def error(self) -> float | None:
        """|predicted - actual| / actual."""
        if self.predicted_ttft_ms is None or not self.happened_ttft_ms:
            return None
        return abs(self.predicted_ttft_ms - self.happened_ttft_ms) / self.happened_ttft_ms

    def as_json(self) -> dict[str, Any]:
        """Returns all fields, and `error`."""
        return {**asdict(self), "error": self.error}


@dataclass(frozen=True, slots=True)
class PredictionStatistics:
    """A snapshot. `choices` and `errors_at_most[i]` (errors up to `ERROR_BOUNDS[i]`, the last: any) count since the start;
    `median_error` is over the last decisions, None before the first.
    """

    choices: dict[str, int] = field(default_factory=dict)
    errors_at_most: tuple[int, ...] = (0,) * (len(ERROR_BOUNDS) + 1)
    error_sum: float = 0.0
    median_error: float | None = None


class DecisionLog:
    """Keeps the last finished decisions; `sink` gets each of them once. Thread-safe."""

    def __init__(self, sink: Callable[[Decision], None] | None = None) -> None:
        self._sink = sink
        self._lock = threading.Lock()
        self._open: dict[int, Decision] = {}
        self._closed: deque[Decision] = deque(maxlen=_KEPT)
        self._choices: dict[str, int] = {}
        self._errors = [0] * (len(ERROR_BOUNDS) + 1)
        self._error_sum = 0.0

    def opened(self, decision: Decision) -> None:
        """Records a decision about an admitted prompt, or a new one after its hits were known."""
        with self._lock:
            while len(self._open) >= _KEPT:  # cancelled before their first token
                del self._open[next(iter(self._open))]
            self._open[decision.number] = decision

    def get(self, number: int) -> Decision | None:
        """Returns the open decision about a prompt."""
        with self._lock:
            return self._open.get(number)

    def loaded(self, load: Load) -> None:
        """Records the end of its load."""
        with self._lock:
            decision = self._open.get(load.prompt.number)
            if decision is None:
                return
            if load.end is LoadEnd.NOT_FOUND:  # the prediction assumed hits
                decision = replace(decision, choice=Choice.RECOMPUTE, meet=None, predicted_ttft_ms=None)
            assert load.end is not None
            self._open[decision.number] = replace(decision, arrived_blocks=load.arrived_blocks, end=load.end.value)

    def answered(self, number: int, ttft_ms: float) -> None:
        """Records its first token."""
        with self._lock:
            decision = self._open.pop(number, None)
            if decision is None:
                return
            decision = replace(decision, happened_ttft_ms=ttft_ms)
            self._closed.append(decision)
            self._choices[decision.choice] = self._choices.get(decision.choice, 0) + 1
            if decision.error is not None and math.isfinite(decision.error):
                self._errors[bisect_left(ERROR_BOUNDS, decision.error)] += 1
                self._error_sum += decision.error
        if self._sink is not None:
            self._sink(decision)

    def last(self, count: int) -> list[Decision]:
        """Returns the newest finished decisions, the newest last."""
        with self._lock:
            return list(self._closed)[-count:] if count > 0 else []

    def statistics(self) -> PredictionStatistics:
        """A snapshot."""
        with self._lock:
            errors = [decision.error for decision in self._closed if decision.error is not None]
            counts = tuple(sum(self._errors[: index + 1]) for index in range(len(self._errors)))
            return PredictionStatistics(dict(self._choices), counts, self._error_sum, median(errors) if errors else None)
