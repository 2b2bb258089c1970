"""Sampling on a device: one draw for each row of logits, without a loop over rows and without a read by the host.

Owns: `draw`. Invariant: the token of a row depends on its own logits, parameters, seed and position only: random numbers are a
function of seed and position, so neither the batch nor the order of steps changes them.
The distribution is that of `attnstore_worker.engine.sampler.Sampler`; its random numbers are others.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from attnstore_worker.engine.step_tables import Inputs

NOT_FINITE: Final = -1
"""In place of a token: the row has a NaN, a positive infinity, or only negative infinities."""

_GAMMA: Final = 0x9E3779B97F4A7C15 - (1 << 64)
_FIRST: Final = 0xBF58476D1CE4E5B9 - (1 << 64)
_SECOND: Final = 0x94D049BB133111EB - (1 << 64)
"""As signed numbers: torch's products of int64 wrap."""
_MANTISSA_BITS: Final = 53


def draw(logits: Tensor, inputs: Inputs, *, greedy: bool) -> Tensor:
    """Returns int64 `[n]`: the next token of each row of fp32 `logits` `[n, vocabulary]`, or `NOT_FINITE`. `greedy` says that all
    temperatures are 0.
    """
    highest, likeliest = logits.max(dim=-1)
    tokens = likeliest if greedy else torch.where(inputs.temperatures == 0.0, likeliest, _drawn(logits, highest, inputs))
    return torch.where(torch.isfinite(highest), tokens, NOT_FINITE)


def uniforms(seeds: Tensor, positions: Tensor) -> Tensor:
    """Returns fp64 numbers in [0, 1) for int64 seeds and positions, by SplitMix64 (Steele, Lea and Flood 2014), once over the seed
    and once over the position.
    """
    bits = _mixed(_mixed(seeds) + positions)
    return _shifted(bits, 64 - _MANTISSA_BITS).double() * 2.0**-_MANTISSA_BITS


def _drawn(logits: Tensor, highest: Tensor, inputs: Inputs) -> Tensor:
    tiny = torch.finfo(torch.float32).tiny
    temperatures = inputs.temperatures.float().clamp_min(tiny)
    # Subtracts the largest first, which then stays 0 however small the divisor.
    scaled = (logits - highest[:, None]) / temperatures[:, None]
    ordered, token_ids = scaled.sort(dim=-1, descending=True, stable=True)
    weights = ordered.exp().double()
    ranks = torch.arange(logits.shape[-1], device=logits.device)
    top_k = torch.where(inputs.top_ks > 0, inputs.top_ks, logits.shape[-1])
    weights = weights.masked_fill(ranks[None, :] >= top_k[:, None], 0.0)
    before = weights.cumsum(dim=-1) - weights
    weights = weights.masked_fill(before >= inputs.top_ps[:, None] * weights.sum(dim=-1, keepdim=True), 0.0)
    borders = weights.cumsum(dim=-1)
    total = borders[:, -1:]
    drawn = uniforms(inputs.seeds, inputs.drawn_at)[:, None] * total
    # Below the total, however the product was rounded: the last of positive weight is the last that may be drawn.
    drawn = torch.minimum(drawn, torch.nextafter(total, torch.zeros_like(total)))
    at = torch.searchsorted(borders, drawn, right=True).clamp_max(logits.shape[-1] - 1)
    return token_ids.gather(1, at)[:, 0]


def _mixed(bits: Tensor) -> Tensor:
    bits = bits + _GAMMA
    bits = (bits ^ _shifted(bits, 30)) * _FIRST
    bits = (bits ^ _shifted(bits, 27)) * _SECOND
    return bits ^ _shifted(bits, 31)


def _shifted(bits: Tensor, by: int) -> Tensor:
    """Returns the bits shifted to the right, with zeros from the left."""
    return (bits >> by) & ((1 << (64 - by)) - 1)
