"""The cost of a link, learned from the transfers that use it anyway: time = round trip + bytes / bandwidth.

Owns: `LinkEstimator`, a window of recent transfers, and `LinkEstimate`, the result. Invariant: no sequence of samples, however
absurd, makes it raise or return a number that is not finite and positive; without enough samples it returns None.

Estimates are weighted medians, which are wrong only if half of the samples are; weights halve with every few newer samples and with
age. Three samples in a row that are all far slower, or all far faster, than expected mean that the link itself has changed: earlier
samples are dropped. The distance of slow transfers from the median, few samples and age make an estimate less certain; `spread`
expresses it, for a planner that must be safe. Robust fits by medians are Theil's and Sen's (1950, 1968); dropping samples after a
run of similar residuals is the idea of a CUSUM chart (Page, 1954).
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass
from itertools import combinations
from typing import Final

from attnstore.clock import Clock

_WINDOW: Final = 64
_HALF_LIFE_SAMPLES: Final = 8.0
_HALF_LIFE_MS: Final = 120_000.0
_STALE_MS: Final = 600_000.0
"""Older samples are ignored."""
_ELAPSED_MS_RANGE: Final = (1e-4, 86_400_000.0)
_SIZE_BYTES_MAX: Final = 1 << 48
"""Samples outside this range come from a broken clock or a bug: no transfer ends in 100 ns or takes a day."""
_BULK_BYTES: Final = 4 << 10
"""Smaller messages measure the round trip, larger ones the bandwidth."""
_CHANGE_RUN: Final = 3
_CHANGE_LOG: Final = math.log(2.0)
_UNLIKE: Final = 2.0
"""Two transfers separate the time of a request from that of the bytes if one is this many times larger than the other."""
_PAIRED: Final = 16
_SLOPES_MIN: Final = 6
_SLOW_QUANTILE: Final = 0.9
_LOG_SPREAD_MAX: Final = math.log(100.0)


@dataclass(frozen=True, slots=True)
class LinkEstimate:
    """A link at one moment. `spread` >= 1 is a factor: a transfer is expected to take at most `transfer_ms` times `spread`.

    `rtt_ms` is the time of a small exchange, `request_ms` the time of a bulk transfer besides its bytes. `samples` counts bulk
    transfers, decayed by number and age; `age_ms` is that of the newest.
    """

    rtt_ms: float
    request_ms: float
    bytes_per_ms: float
    spread: float
    samples: float
    age_ms: float

    @property
    def gbit_per_s(self) -> float:
        """The bandwidth in 10^9 bits per second."""
        return self.bytes_per_ms * 8 / 1e6

    def transfer_ms(self, size_bytes: float) -> float:
        """Returns the expected time of a read of that many bytes, including the request."""
        return self.request_ms + size_bytes / self.bytes_per_ms

    def transfer_ms_high(self, size_bytes: float) -> float:
        """Returns the time if the link is as slow as `spread` allows."""
        return self.transfer_ms(size_bytes) * self.spread


@dataclass(frozen=True, slots=True)
class _Sample:
    size_bytes: int
    elapsed_ms: float
    at_ms: float


class _Recent:
    """The newest samples of one kind, since the last change of the link."""

    def __init__(self) -> None:
        self._samples: deque[_Sample] = deque(maxlen=_WINDOW)
        self._drift: deque[float] = deque(maxlen=_CHANGE_RUN)

    def add(self, sample: _Sample, expected_ms: float | None) -> None:
        self._drift.append(0.0 if expected_ms is None else math.log(sample.elapsed_ms / expected_ms))
        self._samples.append(sample)
        slower, faster = (all(sign * drift > _CHANGE_LOG for drift in self._drift) for sign in (1, -1))
        if len(self._drift) == _CHANGE_RUN and (slower or faster):
            while len(self._samples) > _CHANGE_RUN:
                self._samples.popleft()
            self._drift.clear()

    def clear(self) -> None:
        self._samples.clear()
        self._drift.clear()

    def weighted(self, now_ms: float) -> list[tuple[_Sample, float]]:
        """Returns the samples that are not stale, the newest first, with their weights."""
        found = []
        for newer, sample in enumerate(reversed(self._samples)):
            age_ms = max(0.0, now_ms - sample.at_ms)  # a clock that went back makes a sample new, not wrong
            if age_ms <= _STALE_MS:
                found.append((sample, 0.5 ** (newer / _HALF_LIFE_SAMPLES + age_ms / _HALF_LIFE_MS)))
        return found


class LinkEstimator:
    """Learns one link from consecutive transfers. Not thread-safe."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._questions = _Recent()
        self._bulk = _Recent()
        self.rejected = 0

    def observe(self, size_bytes: int, elapsed_ms: float) -> None:
        """Records that a request for `size_bytes` (0: a small exchange) took `elapsed_ms`. Impossible values are only counted."""
        shortest_ms, longest_ms = _ELAPSED_MS_RANGE
        if not (0 <= size_bytes <= _SIZE_BYTES_MAX and shortest_ms <= elapsed_ms <= longest_ms):
            self.rejected += 1
            return
        sample = _Sample(size_bytes, elapsed_ms, self._clock.now_ms())
        if size_bytes < _BULK_BYTES:
            self._questions.add(sample, self._round_trip_ms(sample.at_ms))
        else:
            expected = self.estimate()
            self._bulk.add(sample, expected.transfer_ms(size_bytes) if expected is not None else None)

    def forget(self) -> None:
        """Drops all samples, because the link failed."""
        self._questions.clear()
        self._bulk.clear()

    def estimate(self) -> LinkEstimate | None:
        """Returns the current cost of the link; None without a bulk transfer in the last ten minutes."""
        now_ms = self._clock.now_ms()
        bulk = self._bulk.weighted(now_ms)
        if not bulk:
            return None
        rtt_ms = self._round_trip_ms(now_ms)
        request_ms, bytes_per_ms = _line(bulk, rtt_ms or 0.0)
        samples = sum(weight for _, weight in bulk)
        age_ms = max(0.0, now_ms - bulk[0][0].at_ms)
        # A transfer faster than expected does not mean that the next one may be slower.
        errors = [(max(0.0, math.log(s.elapsed_ms / (request_ms + s.size_bytes / bytes_per_ms))), w) for s, w in bulk]
        seen = weighted_quantile(errors, _SLOW_QUANTILE)
        assert seen is not None
        # A single sample, or one as old as a half-life, could be wrong by a factor of two.
        unseen = math.log(2.0) * (1 / max(samples, 1e-3) + age_ms / _HALF_LIFE_MS)
        spread = math.exp(min(seen + unseen, _LOG_SPREAD_MAX))
        return LinkEstimate(request_ms if rtt_ms is None else rtt_ms, request_ms, bytes_per_ms, spread, samples, age_ms)

    def _round_trip_ms(self, now_ms: float) -> float | None:
        return weighted_median([(sample.elapsed_ms, weight) for sample, weight in self._questions.weighted(now_ms)])


def _line(bulk: list[tuple[_Sample, float]], rtt_ms: float) -> tuple[float, float]:
    """Returns the time of a transfer besides its bytes, and its bytes per ms.

    From the slopes between transfers of different sizes if there are enough; else from each transfer without a round trip.
    """
    pairs = list(combinations(bulk[:_PAIRED], 2))
    slopes = [
        ((one.elapsed_ms - other.elapsed_ms) / (one.size_bytes - other.size_bytes), weight * other_weight)
        for (one, weight), (other, other_weight) in pairs
        if not 1 / _UNLIKE < one.size_bytes / other.size_bytes < _UNLIKE
    ]
    fastest_ms = min(sample.elapsed_ms for sample, _ in bulk)
    ms_per_byte = weighted_median(slopes) if len(slopes) >= _SLOPES_MIN else None
    if ms_per_byte is not None and ms_per_byte > 0:
        request_ms = weighted_median([(s.elapsed_ms - s.size_bytes * ms_per_byte, w / s.elapsed_ms) for s, w in bulk]) or 0.0
        request_ms = max(request_ms, 0.0)
    else:
        request_ms = rtt_ms
    request_ms = min(request_ms, max(rtt_ms, fastest_ms / 2), fastest_ms * 0.99)
    # The bandwidth of a transfer is computed from the part of its time that its bytes took.
    rates = [(s.size_bytes / (s.elapsed_ms - request_ms), w * (1 - request_ms / s.elapsed_ms)) for s, w in bulk]
    bytes_per_ms = weighted_median(rates)
    assert bytes_per_ms is not None
    return request_ms, bytes_per_ms


def weighted_median(values: list[tuple[float, float]]) -> float | None:
    """Returns the median of `(value, weight)`; None if there is no weight."""
    return weighted_quantile(values, 0.5)


def weighted_quantile(values: list[tuple[float, float]], quantile: float) -> float | None:
    """Returns the smallest value that at least `quantile` of the weight does not exceed; None if there is no weight."""
    total = sum(weight for _, weight in values)
    if total <= 0:
        return None
    reached = 0.0
    ordered = sorted(values)
    for value, weight in ordered:
        reached += weight
        if reached >= quantile * total:
            return value
    return ordered[-1][0]
