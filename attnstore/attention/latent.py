"""Attention over latent pages (MLA) on the CPU, and how a pool of pages is seen as latent rows.

Owns: `CpuLatentAttention` and `latent_rows`. A model with multi-head latent attention stores one row for each
token and layer, `[kv_lora_rank + rope_dim]` (DeepSeek V2 and V3: 512 + 64), which all heads share. The row is the key, and its
first `kv_lora_rank` elements are the value. Whoever asks has absorbed the projection of the keys into the query, and applies that
of the values to `out` (`tests/attention/test_latent_models.py` shows both).
Invariant: the results do not depend on how the work is divided, up to rounding.

Source: DeepSeek-V2 (arXiv 2405.04434); "Move the Query, Not the Cache" (arXiv 2606.01502).
"""

from __future__ import annotations

import math
from typing import Final

import torch
from torch import Tensor

from attnstore.attention import cpu_pages, latent_kernel, online_softmax, team
from attnstore.attention.cpu_plan import make_plan
from attnstore.attention.dots import ROWS
from attnstore.core.layout import PageLayout

SHARE_PRODUCTS_MIN: Final = 4_000_000
"""Multiplications that justify waking another thread: about 80 us."""


class CpuLatentAttention:
    """See `attnstore.attention.base.LatentAttention`; `threads` as in `CpuAttention`. Safe to call from several threads at once."""

    def __init__(self, threads: int | None = None) -> None:
        self._threads = threads
        self._run = team.run if threads is None else team.run_apart

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
        total_q, q_heads, row_dim = query.shape
        block_tokens = pool.shape[2]
        vectors = total_q * q_heads
        plan = make_plan(
            context_lens,
            query_starts,
            query_positions,
            sliding_window,
            block_tokens=block_tokens,
            decode_rows_max=total_q,
            block_bytes=block_tokens * (row_dim + value_dim) * (vectors // max(1, len(context_lens))),
            share_bytes_min=SHARE_PRODUCTS_MIN,
            threads=self._threads or torch.get_num_threads(),
        )
        scaled = torch.zeros(vectors + ROWS - 1, latent_kernel.query_width(row_dim))
        scaled[:vectors, :row_dim] = query.reshape(vectors, row_dim).float() * (scale * math.log2(math.e))
        width = latent_kernel.out_width(value_dim)
        outs = torch.empty(plan.state_rows, q_heads, width)
        tops, sums = torch.empty(2, plan.state_rows * q_heads).numpy()
        lse = torch.empty(total_q, q_heads)
        flat_outs, flat_query, flat = outs.view(-1).numpy(), scaled.view(-1).numpy(), cpu_pages.elements(pool)
        scratches = [torch.empty(latent_kernel.scratch_elements(row_dim)).numpy() for _ in plan.shares]
        tables = block_tables.contiguous().numpy()

        def attend(thread: int) -> None:
            latent_kernel.attend(
                plan.shares[thread],
                tables,
                plan.visible,
                flat_query,
                flat,
                pool.stride(0),
                layer * block_tokens * row_dim,
                q_heads,
                block_tokens,
                row_dim,
                value_dim,
                flat_outs,
                tops,
                sums,
                scratches[thread],
            )

        self._run(len(plan.shares), attend)
        online_softmax.finish(plan.pieces, plan.owners, q_heads, width, flat_outs, tops, sums, lse.view(-1).numpy(), None)
        return outs[:total_q, :, :value_dim].to(out_dtype or query.dtype).contiguous(), lse


def latent_rows(pool: Tensor, layout: PageLayout) -> Tensor:
    """Returns a pool of pages of `PageLayout.of_latents`, `[blocks, *layout.shape]`, as `[blocks, layers, block_tokens, row_dim]`,
    the same memory.
    """
    return pool.view(*pool.shape[:2], layout.block_tokens, layout.row_dim)
