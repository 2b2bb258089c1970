"""Sampling: from logits to a token.

Owns: `SamplingParams` and `Sampler`. Invariants: the tokens of a sequence depend only on its own logits, parameters and seed, not
on the rest of the batch; no token is drawn from a row without a largest finite logit.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from attnstore.errors import InvalidArgument
from attnstore_worker.errors import LogitsNotFinite
from attnstore_worker.options import SEED_MAX, TEMPERATURE_MAX

Floats = npt.NDArray[np.float32]

STOPS_MAX: Final = 16
"""Stop strings of one sequence; each is searched for after each token."""
_TEMPERATURE_MIN: Final = torch.finfo(torch.float32).tiny


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How to continue a prompt. Generation ends after a token of `stop_token_ids`, or as soon as the text contains one of `stops`.

    `temperature` 0 is greedy. Otherwise a token is drawn from the `top_k` likeliest (None: all), and of these from the smallest set
    of the likeliest whose probabilities sum to at least `top_p` (nucleus sampling, Holtzman et al. 2020).
    `logits` asks for the logits of each token. Raises `InvalidArgument` for a value out of range.
    """

    max_tokens: int = 64
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float = 1.0
    seed: int = 0
    stop_token_ids: frozenset[int] = frozenset()
    stops: tuple[str, ...] = ()
    logits: bool = False

    def __post_init__(self) -> None:
        if self.max_tokens < 1:
            raise InvalidArgument(f"max_tokens is {self.max_tokens}; it must be at least 1")
        if not 0.0 <= self.temperature <= TEMPERATURE_MAX:
            raise InvalidArgument(f"temperature is {self.temperature}; it must be between 0 (greedy) and {TEMPERATURE_MAX:g}")
        if self.top_k is not None and self.top_k < 1:
            raise InvalidArgument(f"top_k is {self.top_k}; it must be at least 1")
        if not 0.0 < self.top_p <= 1.0:
            raise InvalidArgument(f"top_p is {self.top_p}; it must be above 0 and at most 1")
        if not 0 <= self.seed <= SEED_MAX:
            raise InvalidArgument(f"seed is {self.seed}; it must be between 0 and {SEED_MAX}")
        if len(self.stops) > STOPS_MAX or not all(self.stops):
            raise InvalidArgument(f"stops are {len(self.stops)} strings; at most {STOPS_MAX} are allowed, and no empty one")


class Peak(NamedTuple):
    """The largest logit of a row, and the first token that has it. The logit is NaN if the row contains a NaN."""

    token_id: int
    logit: float

    @property
    def is_finite(self) -> bool:
        """True if a token can be drawn from the row: it has no NaN, no positive infinity, and not only negative infinities."""
        return math.isfinite(self.logit)


class Sampler:
    """Draws the tokens of one sequence."""

    def __init__(self, params: SamplingParams) -> None:
        self._params = params
        self._generator = torch.Generator().manual_seed(params.seed)

    def sample(self, logits: Tensor, peak: Peak) -> int:
        """Returns the next token from fp32 logits `[vocabulary]` with their `peak` (see `peaks`); greedy, it is the peak's.

        Raises `LogitsNotFinite` without drawing.
        """
        if not peak.is_finite:
            raise LogitsNotFinite(f"the largest logit is {peak.logit}: the model computed no token for this sequence")
        params = self._params
        if params.temperature == 0.0:
            return peak.token_id
        values = logits.cpu().numpy()
        with np.errstate(over="ignore"):
            # Subtracts the largest first, which then stays 0 however small the divisor: the others may overflow to -inf.
            scaled = (values - np.float32(peak.logit)) / np.float32(max(params.temperature, _TEMPERATURE_MIN))
        if params.top_k is None and params.top_p == 1.0:
            return self._draw(np.exp(scaled))
        likeliest = _descending(scaled, params.top_k)
        weights = np.exp(scaled[likeliest])
        before = np.cumsum(weights) - weights
        weights[before >= params.top_p * weights.sum()] = 0.0
        return int(likeliest[self._draw(weights)])

    def _draw(self, weights: Floats) -> int:
        """Returns an index with a probability proportional to its weight; never one of weight 0."""
        borders = np.cumsum(weights, dtype=np.float64)
        drawn = torch.rand((), dtype=torch.float64, generator=self._generator).item() * borders[-1]
        return int(np.searchsorted(borders, min(drawn, np.nextafter(borders[-1], 0.0)), side="right"))


def peaks(logits: Tensor) -> list[Peak]:
    """Returns the peak of each row of fp32 logits `[n, vocabulary]`, found for all rows together.

    Not with torch on a CPU, whose threads would then spin for milliseconds on the cores that compute the next step
    (docs/decisions/0018-few-rows.md).
    """
    if logits.device.type == "cpu":
        rows = logits.numpy()
        token_ids = rows.argmax(axis=-1)  # of a NaN, if there is one
        return [Peak(token_id, row.item(token_id)) for token_id, row in zip(token_ids.tolist(), rows, strict=True)]
    values, indices = logits.max(dim=-1)
    both = torch.stack((indices.double(), values.double())).cpu()  # one transfer; doubles represent both exactly
    return [Peak(int(token_id), value) for token_id, value in both.T.tolist()]


def _descending(values: Floats, most: int | None) -> Any:
    """Returns the indices of the `most` largest values (None: all), largest first."""
    if most is None or most >= len(values):
        return np.argsort(-values, kind="stable")
    largest = np.argpartition(-values, most)[:most]
    return largest[np.argsort(-values[largest], kind="stable")]
