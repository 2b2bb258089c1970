"""Attention over latent pages (MLA) on the CPU, and how a pool of pages is seen as latent rows.

Owns: `CpuLatentAttention`, `LatentCall` and `latent_rows`. A model with multi-head latent attention stores one row for each
token and layer, `[kv_lora_rank + rope_dim]` (DeepSeek V2 and V3: 512 + 64), which all heads share. The row is the key, and its
first `kv_lora_rank` elements are the value. Whoever asks has absorbed the projection of the keys into the query, and applies that
of the values to `out` (`tests/attention/test_latent_models.py` shows both).
Invariant: the results do not depend on how the work is divided, up to rounding.

Source: DeepSeek-V2 (arXiv 2405.04434); "Move the Query, Not the Cache" (arXiv 2606.01502).
"""

from __future__ import annotations

import math
from typing import Final

import numpy as np
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
        total_q, q_heads, _ = query.shape
        visibility = context_lens, query_starts, query_positions, sliding_window
        call = LatentCall(pool, block_tables, *visibility, q_heads=q_heads, value_dim=value_dim, threads=self._threads)
        call.rows[:] = query.float().reshape(-1).numpy() * np.float32(scale * math.log2(math.e))
        self._run(call.shares, lambda share: call.run(share, layer))
        call.finish()
        out = torch.from_numpy(call.outs).view(total_q, q_heads, value_dim)
        return out.to(out_dtype or query.dtype), torch.from_numpy(call.lses).view(total_q, q_heads)


class LatentCall:
    """The kernel for one batch of query rows: everything that it takes but the rows and the layer, and memory for the result.

    Write `rows`, `run` each share of a layer, `finish`, and read `outs` and `lses`; then the same for another layer. The arguments
    are those of `LatentAttention.paged_attention`; the pages of the pool stay in place.
    """

    def __init__(
        self,
        pool: Tensor,
        block_tables: Tensor,
        context_lens: Tensor,
        query_starts: Tensor,
        query_positions: Tensor | None,
        sliding_window: int | None,
        *,
        q_heads: int,
        value_dim: int,
        threads: int | None,
    ) -> None:
        _, _, block_tokens, row_dim = pool.shape
        total_q = int(query_starts[-1])
        self._plan = make_plan(
            context_lens,
            query_starts,
            query_positions,
            sliding_window,
            block_tokens=block_tokens,
            decode_rows_max=total_q,
            block_bytes=block_tokens * (row_dim + value_dim) * q_heads * total_q // max(1, len(context_lens)),
            share_bytes_min=SHARE_PRODUCTS_MIN,
            threads=threads or torch.get_num_threads(),
        )
        self._tables = block_tables.contiguous().numpy()
        self._flat = cpu_pages.elements(pool)
        self._block_stride, self._layer_stride = pool.stride()[:2]
        self._shape = q_heads, block_tokens, row_dim, value_dim
        self._query = torch.zeros((total_q * q_heads + ROWS - 1) * row_dim).numpy()
        states = self._plan.state_rows * q_heads
        self._state_outs = torch.empty(states * value_dim).numpy()
        self._tops, self._sums = torch.empty(2, states).numpy()
        self._scratches = [torch.empty(latent_kernel.scratch_elements(row_dim)).numpy() for _ in self._plan.shares]
        self.shares = len(self._plan.shares)
        self.rows = self._query[: total_q * q_heads * row_dim]
        """fp32 `[total_q * q_heads * row_dim]`, times `scale * log2(e)`."""
        self.outs = self._state_outs[: total_q * q_heads * value_dim]
        """fp32 `[total_q * q_heads * value_dim]`."""
        self.lses = torch.empty(total_q * q_heads).numpy()
        """fp32 `[total_q * q_heads]`, natural logarithm."""

    def run(self, share: int, layer: int) -> None:
        """Computes one of `shares` shares; several threads may compute one each."""
        latent_kernel.attend(
            self._plan.shares[share],
            self._tables,
            self._plan.visible,
            self._query,
            self._flat,
            self._block_stride,
            layer * self._layer_stride,
            *self._shape,
            self._state_outs,
            self._tops,
            self._sums,
            self._scratches[share],
        )

    def finish(self) -> None:
        """Joins the shares to the result."""
        plan, (q_heads, _, _, value_dim) = self._plan, self._shape
        states = self._state_outs, self._tops, self._sums
        online_softmax.finish(plan.pieces, plan.owners, q_heads, value_dim, *states, self.lses, None)


def latent_rows(pool: Tensor, layout: PageLayout) -> Tensor:
    """Returns a pool of pages of `PageLayout.of_latents`, `[blocks, *layout.shape]`, as `[blocks, layers, block_tokens, row_dim]`,
    the same memory.
    """
    return pool.view(*pool.shape[:2], layout.block_tokens, layout.row_dim)
