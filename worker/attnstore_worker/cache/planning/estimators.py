"""Estimators of computing costs, which learn from the steps that the engine runs anyway.

Owns: `PrefillEstimator` and `PrefillCost` (a chunk's time as a function of its length and its context), `FactorEstimator` (how much
a running transfer slows computing down) and `DurationEstimator` (a decode step). `link` has the costs of links and of copies
between tiers. Invariant: no sequence of samples makes an estimator raise, or return a cost that is negative or not finite. Pure:
time is passed as numbers.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import Final

import numpy as np
from numpy.typing import NDArray

from attnstore_worker.cache.planning.link import weighted_median

_WINDOW: Final = 96
_HALF_LIFE_SAMPLES: Final = 32.0
_FIT_ROUNDS: Final = 4
_HUBER: Final = 0.1
"""Relative errors beyond this count in proportion, not squared."""
_RIDGE: Final = 1e-3
_SETS: Final = np.array([used for used in product((1.0, 0.0), repeat=3) if any(used)])
"""Each set of unknowns that are not 0."""
_PRIOR_SHARES: Final = np.array([0.4, 1.0, 0.3])
"""If the chunks do not determine the three terms separately, each gets its part of the time in proportion to its square here."""
_ELAPSED_MS_MIN: Final = 1e-4
_ELAPSED_MS_MAX: Final = 86_400_000.0
_TOKENS_MAX: Final = 1 << 30


@dataclass(frozen=True, slots=True)
class PrefillCost:
    """Computing tokens `[begin, end)` of a sequence in one chunk takes, with n = end - begin,

        chunk_ms + token_ms * n + pair_ms * n * (begin + end) / 2

    for the step itself, the matrices that each token passes, and the attention of each token to those before it.
    """

    chunk_ms: float
    token_ms: float
    pair_ms: float

    def chunk(self, begin: int, end: int) -> float:
        """Returns the time of one chunk."""
        return self.chunk_ms + (end - begin) * (self.token_ms + self.pair_ms * (begin + end) / 2) if end > begin else 0.0

    def span(self, begin: int, end: int, chunk_tokens: int) -> float:
        """Returns the time of tokens `[begin, end)` in chunks that end at the multiples of `chunk_tokens`."""
        if end <= begin:
            return 0.0
        chunks = -(-end // chunk_tokens) - begin // chunk_tokens
        return self.chunk_ms * chunks + (end - begin) * (self.token_ms + self.pair_ms * (begin + end) / 2)


class PrefillEstimator:
    """Fits `PrefillCost` to recent steps: least squares of relative errors with Huber's weights (1964), no coefficient below 0."""

    def __init__(self) -> None:
        self._steps: deque[tuple[float, float, float]] = deque(maxlen=_WINDOW)  # tokens, pairs, ms
        self._fitted: PrefillCost | None = None

    def observe(self, begin: int, end: int, elapsed_ms: float) -> None:
        """Records a step that computed only tokens `[begin, end)` of one sequence, with no transfer at the same time."""
        self.observe_step(((begin, end),), elapsed_ms)

    def observe_step(self, chunks: Sequence[tuple[int, int]], elapsed_ms: float) -> None:
        """A step computed these token ranges `(begin, end)` of several sequences. They share the cost of one chunk."""
        are_sane = bool(chunks) and all(0 <= begin < end <= _TOKENS_MAX for begin, end in chunks)
        if are_sane and _ELAPSED_MS_MIN <= elapsed_ms <= _ELAPSED_MS_MAX:
            tokens = sum(end - begin for begin, end in chunks)
            pairs = sum((end - begin) * (begin + end) / 2 for begin, end in chunks)
            self._steps.append((tokens, pairs, elapsed_ms))
            self._fitted = None

    def estimate(self) -> PrefillCost | None:
        """Returns the current costs of chunks; None before the first sample."""
        if self._fitted is None and self._steps:
            self._fitted = _fit(list(self._steps))
        return self._fitted


def _fit(steps: list[tuple[float, float, float]]) -> PrefillCost:
    tokens, pairs, elapsed_ms = np.array(steps, dtype=np.float64).T
    # Each row is divided by its time, so that errors are relative and the target is a vector of ones.
    features = np.stack([np.ones_like(tokens), tokens, pairs], axis=1) / elapsed_ms[:, None]
    scale = np.maximum(np.linalg.norm(features, axis=0), 1e-300) / _PRIOR_SHARES
    features = features / scale
    age = np.arange(len(steps))[::-1]
    recent = 0.5 ** (age / _HALF_LIFE_SAMPLES)
    weights = recent
    solution = np.zeros(3)
    for _ in range(_FIT_ROUNDS):
        solution = _non_negative_least_squares(features, weights)
        error = np.abs(features @ solution - 1)
        weights = recent * np.minimum(1.0, _HUBER / np.maximum(error, 1e-12))
    chunk_ms, token_ms, pair_ms = (solution / scale).tolist()
    return PrefillCost(chunk_ms, token_ms, pair_ms)


def _non_negative_least_squares(features: NDArray[np.float64], weights: NDArray[np.float64]) -> NDArray[np.float64]:
    """Tries every set of the three unknowns that are not 0. A slight ridge decides between solutions for equal chunks.

    By the normal equations, in a fraction of a millisecond: an engine waits for a fit. The columns are scaled and the ridge is
    added, so the condition of the equations is at most about 1 / ridge^2.
    """
    weighted = features * weights[:, None]
    products, target = features.T @ weighted + _RIDGE**2 * np.eye(3), weighted.sum(axis=0)
    # An unknown that is 0 in a set gets the equation x = 0 there.
    equations = products * (_SETS[:, :, None] * _SETS[:, None, :]) + np.eye(3) * (1 - _SETS)[:, :, None]
    found = np.linalg.solve(equations, (target * _SETS)[:, :, None])[:, :, 0]
    error_less_weights = np.where((found >= 0).all(axis=1), -found @ target, np.inf)
    return np.asarray(found[np.argmin(error_less_weights)])


class DurationEstimator:
    """The median of recent durations in ms."""

    def __init__(self) -> None:
        self._durations: deque[float] = deque(maxlen=_WINDOW)

    def observe(self, elapsed_ms: float) -> None:
        """Records a duration."""
        if _ELAPSED_MS_MIN <= elapsed_ms <= _ELAPSED_MS_MAX:
            self._durations.append(elapsed_ms)

    def estimate(self) -> float | None:
        """Returns the current estimate; None before the first sample."""
        return weighted_median([(value, 1.0) for value in self._durations])


class FactorEstimator:
    """The median of recent ratios of measured to expected time, between `least` and `most`; `prior` before the first sample."""

    def __init__(self, prior: float, *, least: float = 1.0, most: float = 4.0) -> None:
        self._prior = prior
        self._least = least
        self._most = most
        self._ratios: deque[float] = deque([prior], maxlen=_WINDOW // 4)

    def observe(self, measured_ms: float, expected_ms: float) -> None:
        """Records that work expected to take `expected_ms` took `measured_ms`."""
        if measured_ms > 0 and expected_ms > 0 and math.isfinite(measured_ms / expected_ms):
            self._ratios.append(measured_ms / expected_ms)

    def estimate(self) -> float:
        """Returns the current factor."""
        return min(max(weighted_median([(ratio, 1.0) for ratio in self._ratios]) or self._prior, self._least), self._most)
