"""Random calls of the attention contract, on which backends are compared with the reference."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from attnstore.attention import AttentionBackend

TOLERANCE = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
"""Largest absolute difference of `out`, by its type: two of its own roundings at magnitude 1 to 2."""


LSE_TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-4, torch.bfloat16: 2e-4}
"""By the result's type: torch's flash attention takes a shorter exponential series for 16-bit inputs."""


@dataclass(frozen=True)
class Case:
    """One call: the tensors in order, and the keywords."""

    tensors: tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
    keywords: dict[str, Any]

    def run(self, backend: AttentionBackend) -> tuple[Tensor, Tensor]:
        return backend.paged_attention(*self.tensors, **self.keywords)

    def on(self, device: str) -> Case:
        """The same call with its tensors on a device."""
        moved = {name: value.to(device) for name, value in self.keywords.items() if isinstance(value, Tensor)}
        query, pool, block_tables, context_lens, query_starts = (tensor.to(device) for tensor in self.tensors)
        return Case((query, pool, block_tables, context_lens, query_starts), {**self.keywords, **moved})


def paged(keys: Tensor, values: Tensor, rows: int, block_tokens: int = 16) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One sequence's `[kv_heads, keys, head_dim]` as a pool, block table, context length and query starts of `rows` rows."""
    kv_heads, tokens, head_dim = keys.shape
    blocks = -(-tokens // block_tokens)
    padded = torch.zeros(2, kv_heads, max(1, blocks) * block_tokens, head_dim, dtype=keys.dtype)
    padded[:, :, :tokens] = torch.stack([keys, values])
    pool = padded.unflatten(2, (-1, block_tokens)).permute(2, 0, 1, 3, 4).unsqueeze(1).contiguous()
    order = torch.randperm(len(pool))
    shuffled = torch.empty_like(pool)
    shuffled[order] = pool
    return (
        shuffled,
        order[:blocks].int().unsqueeze(0),
        torch.tensor([tokens], dtype=torch.int32),
        torch.tensor([0, rows], dtype=torch.int32),
    )


def random_case(seed: int, *, context_tokens_max: int = 150, rows_max: int = 70) -> Case:
    """Varies geometry, type, window, cap, sinks, positions, and mixes empty parts, one-token parts, decodes and prefill chunks in a
    batch.
    """
    rng = random.Random(seed)
    torch.manual_seed(seed)
    dtype = rng.choice([torch.float32, torch.bfloat16, torch.float16])
    head_dim = rng.choice([64, 64, 80, 96, 128, 256])
    block_tokens = rng.choice([4, 8, 16, 16, 32])
    kv_heads, group = rng.choice([(1, 1), (1, 8), (3, 1), (3, 3), (2, 7)])
    max_blocks = -(-context_tokens_max // block_tokens)
    context_lens = [rng.choice([0, 1, context_tokens_max, rng.randint(1, context_tokens_max)]) for _ in range(rng.randint(1, 5))]
    query_lens = [min(keys, rng.choice([0, 1, 1, 3, rows_max])) for keys in context_lens]
    total_q = sum(query_lens)
    positions = torch.randint(-2, context_tokens_max + 9, (total_q,), dtype=torch.int32) if rng.random() < 0.4 else None
    return Case(
        (
            torch.randn(total_q, kv_heads * group, head_dim).to(dtype),
            torch.randn(64, 2, 2, kv_heads, block_tokens, head_dim).to(dtype),
            torch.randint(0, 64, (len(context_lens), max_blocks), dtype=torch.int32),
            torch.tensor(context_lens, dtype=torch.int32),
            torch.tensor([0, *query_lens], dtype=torch.int32).cumsum(0).int(),
        ),
        {
            "layer": rng.randint(0, 1),
            "scale": head_dim**-0.5,
            "sliding_window": rng.choice([None, None, 1, 5, 40]),
            "query_positions": positions,
            "soft_cap": rng.choice([None, None, 1.5, 50.0]),
            "sinks": torch.randn(kv_heads * group) if rng.random() < 0.4 else None,
        },
    )


@dataclass(frozen=True)
class Scoring:
    """The features that a model may apply to its scores."""

    sliding_window: int | None
    soft_cap: float | None
    has_sinks: bool
    dtype: torch.dtype


SCORINGS = [
    Scoring(*each)
    for each in itertools.product(
        (None, 1, 5, 40, 100), (None, 1.5, 50.0), (False, True), (torch.float32, torch.bfloat16, torch.float16)
    )
]
"""Every combination. Windows smaller and larger than a block, and than the context of some sequences; caps low and mild."""


def scored_case(scoring: Scoring, phases: Sequence[tuple[int, int]], *, kv_heads: int, group: int, head_dim: int = 64) -> Case:
    """Sequences of `(context tokens, query rows)` each, in blocks of 16; scores reach 8, so that caps count."""
    torch.manual_seed(sum(map(sum, phases)))
    block_tokens = 16
    context_lens, query_lens = zip(*phases, strict=True)
    max_blocks = -(-max(context_lens) // block_tokens)
    blocks = len(phases) * max_blocks
    return Case(
        (
            (4 * torch.randn(sum(query_lens), kv_heads * group, head_dim)).to(scoring.dtype),
            (torch.randn(blocks, 1, 2, kv_heads, block_tokens, head_dim) / 2).to(scoring.dtype),
            torch.randperm(blocks, dtype=torch.int32).view(len(phases), max_blocks),
            torch.tensor(context_lens, dtype=torch.int32),
            torch.tensor([0, *query_lens], dtype=torch.int32).cumsum(0).int(),
        ),
        {
            "layer": 0,
            "scale": head_dim**-0.5,
            "sliding_window": scoring.sliding_window,
            "soft_cap": scoring.soft_cap,
            "sinks": torch.randn(kv_heads * group) if scoring.has_sinks else None,
        },
    )


def assert_close(got: tuple[Tensor, Tensor], want: tuple[Tensor, Tensor]) -> None:
    """`out` and `lse` within the rounding of the type of `out`, and exactly the same rows empty."""
    assert got[0].dtype == want[0].dtype
    torch.testing.assert_close(got[0], want[0], rtol=0, atol=TOLERANCE[want[0].dtype])
    torch.testing.assert_close(got[1], want[1], rtol=1e-6, atol=LSE_TOLERANCE[want[0].dtype])
