"""Compilation before the first request, so that neither a request nor an estimate of this machine's speed includes it."""

from __future__ import annotations

import torch
from torch import Tensor

from attnstore.attention.base import AttentionBackend, LatentAttention

_ROWS_OF_PHASES = (1, 256)
"""Query rows of a decode step and of a prefill chunk, as every backend distinguishes them."""


def warm_up_latents(attention: LatentAttention, pool: Tensor) -> None:
    """Makes an implementation compile its kernel for latent rows of the pool's type, by a call on the pool's first row.

    `pool` as in `LatentAttention.paged_attention`; its contents are read and not changed.
    """
    attention.paged_attention(
        torch.zeros(1, 1, pool.shape[3]),
        pool,
        torch.zeros(1, 1, dtype=torch.int32),
        torch.tensor([1], dtype=torch.int32),
        torch.tensor([0, 1], dtype=torch.int32),
        layer=0,
        scale=1.0,
        value_dim=pool.shape[3],
    )


def warm_up(backend: AttentionBackend, pool: Tensor, q_heads: int) -> None:
    """Makes a backend compile (and tune) the kernels for this pool, by a decode and a prefill call on its first block.

    `pool` as in `AttentionBackend.paged_attention`; its contents are read and not changed. Takes seconds the first time on a
    machine and little afterwards, because compiled kernels are cached on disk.
    """
    _, _, _, _, block_tokens, head_dim = pool.shape
    for rows in _ROWS_OF_PHASES:
        backend.paged_attention(
            torch.zeros(rows, q_heads, head_dim, dtype=pool.dtype, device=pool.device),
            pool,
            torch.zeros(1, -(-rows // block_tokens), dtype=torch.int32, device=pool.device),
            torch.tensor([rows], dtype=torch.int32, device=pool.device),
            torch.tensor([0, rows], dtype=torch.int32, device=pool.device),
            layer=0,
            scale=head_dim**-0.5,
        )
