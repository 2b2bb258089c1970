"""From logits to a token.

Owns: `SamplingParams` and `Sampler`. Invariant: the tokens of a sequence depend on its own logits, parameters and seed alone,
never on what else is in the batch.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from attnstore.errors import InvalidArgument


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How to continue a prompt. `temperature` 0 is greedy; generation ends after a token of `stop_token_ids`.

    Raises `InvalidArgument` for a value out of range.
    """

    max_tokens: int = 64
    temperature: float = 0.0
    seed: int = 0
    stop_token_ids: frozenset[int] = frozenset()

    def __post_init__(self) -> None:
        if self.max_tokens < 1:
            raise InvalidArgument(f"max_tokens is {self.max_tokens}; it must be at least 1")
        if not 0.0 <= self.temperature <= 100.0:
            raise InvalidArgument(f"temperature is {self.temperature}; it must be between 0 (greedy) and 100")


class Sampler:
    """Draws the tokens of one sequence."""

    def __init__(self, params: SamplingParams) -> None:
        self._params = params
        self._generator = torch.Generator().manual_seed(params.seed)

    def sample(self, logits: Tensor) -> int:
        """The next token from fp32 logits `[vocabulary]`; of equal largest ones the lowest id when greedy."""
        if self._params.temperature == 0.0:
            return int(logits.argmax())
        weights = torch.softmax(logits / self._params.temperature, dim=-1).cpu()
        return int(torch.multinomial(weights, 1, generator=self._generator))
