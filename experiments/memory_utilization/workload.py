"""Requests with the lengths of conversations and the arrivals of independent users.

Owns: `Shape`, `Request` and `requests`. Invariant: the same seed gives the same requests, and every `_STRATA` consecutive ones have
exactly the distribution of the shape, so that short runs of different policies are comparable.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from dataclasses import dataclass
from statistics import NormalDist, fmean
from typing import Final

_STRATA: Final = 64
_SPREAD: Final = 1.0
"""Standard deviation of the logarithm of a length: the mean is 1.6 times the median, and one in twenty is 5 times as long."""
_FIRST_TOKEN_ID: Final = 3
"""The ids below it are the special tokens of SmolLM2."""


@dataclass(frozen=True, slots=True)
class Shape:
    """Lengths in tokens: those of ShareGPT in the paper, and for each part the limit of 1,024 of vLLM's benchmark."""

    prompt_mean: float = 161.0
    output_mean: float = 338.0
    part_max: int = 1024
    block_tokens: int = 16

    @property
    def total_max(self) -> int:
        """The longest sequence there may be."""
        return 2 * self.part_max

    def shrunk(self, divisor: int) -> Shape:
        """Divides everything, including blocks, so that the empty share of a block stays the same."""
        means = self.prompt_mean / divisor, self.output_mean / divisor
        return Shape(*means, part_max=self.part_max // divisor, block_tokens=self.block_tokens // divisor)


@dataclass(frozen=True, slots=True, eq=False)
class Request:
    """A prompt that arrives `arrival_s` after the start and requests `output_tokens` more."""

    arrival_s: float
    prompt: list[int]
    output_tokens: int

    @property
    def total_tokens(self) -> int:
        """Tokens whose KV it has at its end."""
        return len(self.prompt) + self.output_tokens


def requests(shape: Shape, rate_per_s: float, until_s: float, vocabulary: int, seed: int) -> list[Request]:
    """Returns a Poisson process of `rate_per_s` requests until `until_s`; prompts are random tokens, so that nothing is shared."""
    generator = random.Random(seed)
    prompts = _lengths(shape.prompt_mean, shape.part_max, generator)
    outputs = _lengths(shape.output_mean, shape.part_max, generator)
    arrivals: list[Request] = []
    arrival_s = generator.expovariate(rate_per_s)
    while arrival_s < until_s:
        prompt = [generator.randrange(_FIRST_TOKEN_ID, vocabulary) for _ in range(next(prompts))]
        arrivals.append(Request(arrival_s, prompt, next(outputs)))
        arrival_s += generator.expovariate(rate_per_s)
    return arrivals


def _lengths(mean: float, longest: int, generator: random.Random) -> Iterator[int]:
    """Yields log-normal lengths cut off at `longest`, one from each of `_STRATA` equal parts of the distribution, shuffled, without
    end.
    """
    normal = NormalDist()
    factors = [math.exp(_SPREAD * normal.inv_cdf((stratum + 0.5) / _STRATA)) for stratum in range(_STRATA)]
    median = _median_for(mean, longest, factors)
    lengths = [round(min(max(median * factor, 1.0), longest)) for factor in factors]
    while True:
        generator.shuffle(lengths)
        yield from lengths


def _median_for(mean: float, longest: int, factors: list[float]) -> float:
    """Returns the median whose cut-off lengths have this mean, by bisection."""
    low, high = 0.0, float(longest)
    for _ in range(50):
        middle = (low + high) / 2
        if fmean(min(max(middle * factor, 1.0), longest) for factor in factors) < mean:
            low = middle
        else:
            high = middle
    return (low + high) / 2
