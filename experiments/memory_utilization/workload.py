"""Requests with the lengths of conversations and the arrivals of independent users.

Owns: `Shape`, `Request` and `requests`. Invariant: the same seed gives the same requests, and every `_STRATA` of them in a row have
exactly the shape's lengths, so that short runs of different policies compare.
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
"""Standard deviation of the logarithm of a length: a mean of 1.6 times the median, and one in twenty 5 times as long."""
_FIRST_TOKEN_ID: Final = 3
"""Below are the special tokens of SmolLM2."""


@dataclass(frozen=True, slots=True)
class Shape:
    """Lengths in tokens: those of ShareGPT in the paper, and for each part vLLM's benchmark's limit of 1,024."""

    prompt_mean: float = 161.0
    output_mean: float = 338.0
    part_max: int = 1024
    block_tokens: int = 16

    @property
    def total_max(self) -> int:
        """The longest sequence there may be."""
        return 2 * self.part_max

    def shrunk(self, divisor: int) -> Shape:
        """Everything divided, blocks included, so that the share of a block that stays empty is the same."""
        means = self.prompt_mean / divisor, self.output_mean / divisor
        return Shape(*means, part_max=self.part_max // divisor, block_tokens=self.block_tokens // divisor)


@dataclass(frozen=True, slots=True, eq=False)
class Request:
    """A prompt that arrives `arrival_s` after the start and wants `output_tokens` more."""

    arrival_s: float
    prompt: list[int]
    output_tokens: int

    @property
    def total_tokens(self) -> int:
        """Tokens whose KV it will have at its end."""
        return len(self.prompt) + self.output_tokens


def requests(shape: Shape, rate_per_s: float, until_s: float, vocabulary: int, seed: int) -> list[Request]:
    """A Poisson process of `rate_per_s` requests until `until_s`; prompts are random tokens, so that nothing is shared."""
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
    """Log-normal lengths cut off at `longest`, one from each of `_STRATA` equal parts of the distribution, shuffled, for ever."""
    normal = NormalDist()
    factors = [math.exp(_SPREAD * normal.inv_cdf((stratum + 0.5) / _STRATA)) for stratum in range(_STRATA)]
    median = _median_for(mean, longest, factors)
    lengths = [round(min(max(median * factor, 1.0), longest)) for factor in factors]
    while True:
        generator.shuffle(lengths)
        yield from lengths


def _median_for(mean: float, longest: int, factors: list[float]) -> float:
    """The median whose cut-off lengths have this mean, by bisection."""
    low, high = 0.0, float(longest)
    for _ in range(50):
        middle = (low + high) / 2
        if fmean(min(max(middle * factor, 1.0), longest) for factor in factors) < mean:
            low = middle
        else:
            high = middle
    return (low + high) / 2
