"""Paged attention by the formula, in fp32: every other backend is tested against it.

Owns: `ReferenceAttention` and `ReferenceLatentAttention`. Invariant: short enough to be obviously right; nothing here is fast.
"""

from __future__ import annotations

import torch
from torch import Tensor

from attnstore.attention.base import row_positions


class ReferenceAttention:
    """Gathers each sequence's keys, then masks, applies softmax and sums in fp32."""

    def paged_attention(
        self,
        query: Tensor,
        pool: Tensor,
        block_tables: Tensor,
        context_lens: Tensor,
        query_starts: Tensor,
        *,
        layer: int,
        scale: float,
        sliding_window: int | None = None,
        query_positions: Tensor | None = None,
        out_dtype: torch.dtype | None = None,
        soft_cap: float | None = None,
        sinks: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """See `AttentionBackend.paged_attention`."""
        positions = row_positions(context_lens, query_starts, query_positions)
        out = torch.zeros_like(query, dtype=out_dtype or query.dtype)
        sink = torch.full(query.shape[1:2], -torch.inf, device=query.device) if sinks is None else sinks
        lse = sink.repeat(len(query), 1)
        for sequence, context_len in enumerate(context_lens.tolist()):
            rows = slice(int(query_starts[sequence]), int(query_starts[sequence + 1]))
            if rows.start == rows.stop or context_len == 0:
                continue
            keys, values = _gather(pool, block_tables[sequence], context_len, layer)
            group = query.shape[1] // keys.shape[0]
            keys, values = keys.repeat_interleave(group, dim=0), values.repeat_interleave(group, dim=0)
            scores = torch.einsum("qhd,hkd->qhk", query[rows].float(), keys) * scale
            if soft_cap is not None:
                scores = soft_cap * torch.tanh(scores / soft_cap)
            visible = _visible(positions[rows], context_len, sliding_window).unsqueeze(1)
            scores = scores.masked_fill(~visible, -torch.inf)
            lse[rows] = torch.logaddexp(scores.logsumexp(dim=-1), sink)
            weights = (scores - lse[rows].unsqueeze(-1)).exp().masked_fill(~visible, 0.0)  # NaN for a row that sees no key
            out[rows] = torch.einsum("qhk,hkd->qhd", weights, values).to(out.dtype)
        return out, lse


class ReferenceLatentAttention:
    """`ReferenceAttention` with one KV head, whose values are the latent rows with zeros after their first `value_dim` elements."""

    def paged_attention(
        self,
        query: Tensor,
        pool: Tensor,
        block_tables: Tensor,
        context_lens: Tensor,
        query_starts: Tensor,
        *,
        layer: int,
        scale: float,
        value_dim: int,
        sliding_window: int | None = None,
        query_positions: Tensor | None = None,
        out_dtype: torch.dtype | None = None,
    ) -> tuple[Tensor, Tensor]:
        """See `LatentAttention.paged_attention`."""
        values = pool.clone()
        values[..., value_dim:] = 0.0
        out, lse = ReferenceAttention().paged_attention(
            query,
            torch.stack((pool, values), dim=2).unsqueeze(3),
            block_tables,
            context_lens,
            query_starts,
            layer=layer,
            scale=scale,
            sliding_window=sliding_window,
            query_positions=query_positions,
            out_dtype=out_dtype,
        )
        return out[..., :value_dim].contiguous(), lse


def _gather(pool: Tensor, block_table: Tensor, context_len: int, layer: int) -> tuple[Tensor, Tensor]:
    """Returns keys and values of one sequence, fp32 `[kv_heads, context_len, head_dim]` each."""
    blocks = -(-context_len // pool.shape[4])
    pages = pool[block_table[:blocks].long(), layer].float()
    keys, values = pages.permute(1, 2, 0, 3, 4).flatten(2, 3)[:, :, :context_len]
    return keys, values


def _visible(positions: Tensor, context_len: int, sliding_window: int | None) -> Tensor:
    """Returns which keys a row at each position sees, boolean `[rows, context_len]`."""
    keys = torch.arange(context_len, device=positions.device)
    visible = keys <= positions.unsqueeze(1)
    if sliding_window is not None:
        visible &= keys > positions.unsqueeze(1) - sliding_window
    return visible
