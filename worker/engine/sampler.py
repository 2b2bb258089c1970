"""From logits to a token.

Owns: `SamplingParams` and `Sampler`. Invariant: the tokens of a sequence depend on its own logits, parameters and seed alone,
never on what else is in the batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from attnstore.errors import InvalidArgument

STOPS_MAX: Final = 16
"""Stop strings of one sequence; each is searched for after each token."""
SEED_MAX: Final = (1 << 63) - 1
_TEMPERATURE_MIN: Final = torch.finfo(torch.float32).tiny


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How to continue a prompt. Generation ends after a token of `stop_token_ids`, or as soon as the text has one of `stops`.

    `temperature` 0 is greedy. Otherwise a token is drawn from the `top_k` likeliest (None: all), of these from the smallest set
    of the likeliest whose probabilities sum up to `top_p` (nucleus sampling, Holtzman et al. 2020).
    Raises `InvalidArgument` for a value out of range.
    """

    max_tokens: int = 64
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float = 1.0
    seed: int = 0
    stop_token_ids: frozenset[int] = frozenset()
    stops: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.max_tokens < 1:
            raise InvalidArgument(f"max_tokens is {self.max_tokens}; it must be at least 1")
        if not 0.0 <= self.temperature <= 100.0:
            raise InvalidArgument(f"temperature is {self.temperature}; it must be between 0 (greedy) and 100")
        if self.top_k is not None and self.top_k < 1:
            raise InvalidArgument(f"top_k is {self.top_k}; it must be at least 1")
        if not 0.0 < self.top_p <= 1.0:
            raise InvalidArgument(f"top_p is {self.top_p}; it must be above 0 and at most 1")
        if not 0 <= self.seed <= SEED_MAX:
            raise InvalidArgument(f"seed is {self.seed}; it must be between 0 and {SEED_MAX}")
        if len(self.stops) > STOPS_MAX or not all(self.stops):
            raise InvalidArgument(f"stops are {len(self.stops)} strings; at most {STOPS_MAX} are allowed, and no empty one")


class Sampler:
    """Draws the tokens of one sequence."""

    def __init__(self, params: SamplingParams) -> None:
        self._params = params
        self._generator = torch.Generator().manual_seed(params.seed)

    def sample(self, logits: Tensor) -> int:
        """The next token from fp32 logits `[vocabulary]`; of equal largest ones the lowest id when greedy."""
        params = self._params
        if self.greedy:
            return int(logits.argmax())
        # Less the largest one first, which then stays 0 however small the divisor: the others may overflow to -inf.
        scaled = ((logits - logits.max()) / max(params.temperature, _TEMPERATURE_MIN)).cpu()
        if params.top_k is None and params.top_p == 1.0:
            return self._draw(torch.softmax(scaled, dim=-1))
        likeliest, token_ids = scaled.topk(min(params.top_k or scaled.numel(), scaled.numel()))
        weights = torch.softmax(likeliest, dim=-1)
        outside = weights.cumsum(-1) - weights >= params.top_p
        return int(token_ids[self._draw(weights.masked_fill(outside, 0.0))])

    @property
    def greedy(self) -> bool:
        """It takes the largest logit and draws nothing."""
        return self._params.temperature == 0.0

    def _draw(self, weights: Tensor) -> int:
        return int(torch.multinomial(weights, 1, generator=self._generator))


def sample_rows(samplers: Sequence[Sampler], logits: Tensor) -> list[int]:
    """The next token of each row of fp32 logits `[n, vocabulary]` from its own sampler; all greedy rows are looked at together."""
    largest: list[int] = logits.argmax(dim=-1).tolist()
    return [
        token_id if sampler.greedy else sampler.sample(row)
        for sampler, token_id, row in zip(samplers, largest, logits, strict=True)
    ]
