"""The decode kernel with everything that it takes: the memory of its states and of its result, and its shares.

Owns: `DecodeCall`. Invariant: `rows` and the pages stay in place from `run` to `finish`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from attnstore.attention import cpu_kernel, cpu_pages, online_softmax
from attnstore.attention.cpu_plan import Plan


class DecodeCall:
    """The decode rows of a plan over a pool, `[blocks, layers, 2, kv_heads, block_tokens, head_dim]`: everything but the layer.

    For each layer: `run` each share, `finish`, and read `outs` and `lses`. rows: fp32 `[>= last decode row + 1, q_heads, head_dim]`
    flat, scaled as `cpu_kernel.attend` takes them. cap, sinks: as `cpu_kernel.attend` and `online_softmax.finish` take them.
    """

    def __init__(
        self, plan: Plan, pool: Tensor, block_tables: Tensor, rows: Any, q_heads: int, *, cap: Any = None, sinks: Any = None
    ) -> None:
        _, _, _, kv_heads, block_tokens, head_dim = pool.shape
        states, results = plan.state_rows * q_heads, len(plan.decode_rows) * q_heads
        scratch = cpu_kernel.scratch_elements(plan.piece_rows_max, q_heads, block_tokens, head_dim)
        self._plan = plan
        self._rows = rows
        self._tables = block_tables.contiguous().numpy()
        self._flat = cpu_pages.elements(pool)
        self._block_stride, self._layer_elements = pool.stride(0), 2 * kv_heads * block_tokens * head_dim
        self._shape = kv_heads, q_heads // kv_heads, block_tokens, head_dim
        self._cap, self._sinks = cap, sinks
        self._states = torch.empty(states * head_dim).numpy(), *torch.empty(2, states).numpy()
        self._scratches = [torch.empty(scratch).numpy() for _ in plan.shares]
        self.shares = len(plan.shares)
        self.outs = self._states[0][: results * head_dim]
        """fp32 `[decode rows, q_heads, head_dim]`, flat, in the order of `plan.decode_rows`."""
        self.lses = torch.empty(results).numpy()
        """fp32 `[decode rows, q_heads]`, flat, natural logarithm."""

    def run(self, share: int, layer: int) -> None:
        """Computes one of `shares` shares; several threads may compute one each."""
        cpu_kernel.attend(
            self._plan.shares[share],
            self._tables,
            self._plan.visible,
            self._rows,
            self._flat,
            self._block_stride,
            layer * self._layer_elements,
            *self._shape,
            *self._states,
            self._scratches[share],
            self._cap,
        )

    def finish(self) -> None:
        """Joins the shares to the result."""
        plan, (kv_heads, group, _, head_dim) = self._plan, self._shape
        online_softmax.finish(plan.pieces, plan.owners, kv_heads * group, head_dim, *self._states, self.lses, self._sinks)
