"""The checking wrapper of a backend: raises `InvalidArgument` for a malformed call before a kernel reads out of bounds.

Owns: the rules of the contract in `attnstore.attention.base`, as code.
Invariant: a call that passes the checks never makes a backend touch memory outside its arguments.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from attnstore.attention.base import FLOAT_DTYPES, AttentionBackend
from attnstore.attention.cpu_plan import Plan
from attnstore.errors import InvalidArgument

HEAD_DIM_MAX = 256

SLIDING_WINDOW_MAX = (1 << 31) - 1
"""Positions are int32, and the edge of a window is computed as int32."""

SOFT_CAP_MIN, SOFT_CAP_MAX = 2.0**-10, 2.0**10
"""Models have 20 to 50. An error of 1e-7 in tanh is at most 1e-4 in a score."""

SINK_MAX = 1e30
"""Largest magnitude of a sink's logit: far above any score, and fp32 can represent it in base 2."""


class CheckedAttention:
    """An `AttentionBackend` that checks every argument and then delegates.

    Values (block ids, lengths) are checked only for tensors on the CPU, because reading them back from an accelerator would stall
    it at each layer. Shapes and types are always checked. The values of one set of tensors are checked once, not once per layer,
    because a step calls every layer with the same tables.
    """

    def __init__(self, backend: AttentionBackend) -> None:
        self._backend = backend
        self._seen: tuple[object, ...] = ()

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
        """See `AttentionBackend.paged_attention`. Raises `InvalidArgument` for arguments that violate the contract."""
        _check_data(query, pool)
        _check_options(pool, layer, scale, sliding_window, out_dtype, soft_cap)
        _check_index_shapes(query, block_tables, context_lens, query_starts, query_positions)
        if sinks is not None:
            _check_sinks(query, sinks)
        if block_tables.device.type == "cpu":
            self._check_values_once(query, pool, block_tables, context_lens, query_starts)
        return self._backend.paged_attention(
            query,
            pool,
            block_tables,
            context_lens,
            query_starts,
            layer=layer,
            scale=scale,
            sliding_window=sliding_window,
            query_positions=query_positions,
            out_dtype=out_dtype,
            soft_cap=soft_cap,
            sinks=sinks,
        )

    def plan(
        self,
        query: Tensor,
        pool: Tensor,
        block_tables: Tensor,
        context_lens: Tensor,
        query_starts: Tensor,
        *,
        share_bytes_min: int,
    ) -> Plan | None:
        """Returns how the CPU kernel runs over these arguments, for a caller that runs it itself, or None for another backend.

        Of `query` and `pool` only shapes and types matter; each thread gets at least `share_bytes_min` of keys and values. Raises
        `InvalidArgument` as `paged_attention` does.
        """
        plan: Callable[..., Plan] | None = getattr(self._backend, "plan", None)
        if plan is None:
            return None
        _check_data(query, pool)
        _check_index_shapes(query, block_tables, context_lens, query_starts, None)
        self._check_values_once(query, pool, block_tables, context_lens, query_starts)
        return plan(query, pool, context_lens, query_starts, share_bytes_min=share_bytes_min)

    def _check_values_once(
        self, query: Tensor, pool: Tensor, block_tables: Tensor, context_lens: Tensor, query_starts: Tensor
    ) -> None:
        # Compared by content, because a caller may write the next step's tables into the same tensors.
        contents = tuple(tensor.numpy().tobytes() for tensor in (block_tables, context_lens, query_starts))
        seen = (query.shape[0], pool.shape[0], pool.shape[4], block_tables.shape, *contents)
        if seen != self._seen:
            _check_values(query, pool, block_tables, context_lens, query_starts)
            self._seen = seen


# The checks run at every layer of every step, so messages are built only on failure.


def _check_data(query: Tensor, pool: Tensor) -> None:
    if query.dim() != 3:
        raise InvalidArgument(f"query has shape {tuple(query.shape)}; it must be [total_q, q_heads, head_dim]")
    if pool.dim() != 6 or pool.shape[2] != 2 or pool.numel() == 0:
        raise InvalidArgument(
            f"pool has shape {tuple(pool.shape)}; it must be [blocks, layers, 2, kv_heads, block_tokens, head_dim], none of them 0"
        )
    for name, tensor in (("query", query), ("pool", pool)):
        if tensor.dtype not in FLOAT_DTYPES:
            raise InvalidArgument(f"{name} has type {tensor.dtype}; it must be bfloat16, float16 or float32")
    q_heads, kv_heads, head_dim = query.shape[1], pool.shape[3], pool.shape[5]
    if query.shape[2] != head_dim or head_dim > HEAD_DIM_MAX:
        raise InvalidArgument(
            f"query has head_dim {query.shape[2]} and the pool {head_dim}; they must be equal and at most {HEAD_DIM_MAX}"
        )
    if q_heads == 0 or q_heads % kv_heads:
        raise InvalidArgument(f"query has {q_heads} heads, which is not a positive multiple of the pool's {kv_heads} kv_heads")
    if not pool[0].is_contiguous() or (pool.shape[0] > 1 and pool.stride(0) < pool[0].numel()):
        raise InvalidArgument(
            f"pool has strides {pool.stride()}; each block must be contiguous and only the distance between blocks is free"
        )
    if query.device != pool.device:
        raise InvalidArgument(f"query is on {query.device} and pool on {pool.device}; they must be together")


def _check_options(
    pool: Tensor,
    layer: int,
    scale: float,
    sliding_window: int | None,
    out_dtype: torch.dtype | None,
    soft_cap: float | None,
) -> None:
    if not 0 <= layer < pool.shape[1]:
        raise InvalidArgument(f"layer is {layer}; the pool has layers 0 to {pool.shape[1] - 1}")
    if not math.isfinite(scale):
        raise InvalidArgument(f"scale is {scale}; it must be finite")
    if sliding_window is not None and not 1 <= sliding_window <= SLIDING_WINDOW_MAX:
        raise InvalidArgument(f"sliding_window is {sliding_window}; it must be 1 to {SLIDING_WINDOW_MAX} or None")
    if out_dtype is not None and out_dtype not in FLOAT_DTYPES:
        raise InvalidArgument(f"out_dtype is {out_dtype}; it must be bfloat16, float16, float32 or None")
    if soft_cap is not None and not SOFT_CAP_MIN <= soft_cap <= SOFT_CAP_MAX:
        raise InvalidArgument(f"soft_cap is {soft_cap}; it must be {SOFT_CAP_MIN:g} to {SOFT_CAP_MAX:g} or None")


def _check_sinks(query: Tensor, sinks: Tensor) -> None:
    if sinks.dtype != torch.float32 or sinks.shape != query.shape[1:2] or not sinks.is_contiguous():
        raise InvalidArgument(
            f"sinks are {sinks.dtype} of shape {tuple(sinks.shape)}; they must be contiguous float32 of shape ({query.shape[1]},)"
        )
    if sinks.device != query.device:
        raise InvalidArgument(f"sinks are on {sinks.device} and query on {query.device}; they must be together")
    if sinks.device.type == "cpu" and not np.abs(sinks.detach().numpy()).max() <= SINK_MAX:  # false for NaN
        raise InvalidArgument(f"sinks must be numbers of magnitude up to {SINK_MAX:g}")


def _check_index_shapes(
    query: Tensor, block_tables: Tensor, context_lens: Tensor, query_starts: Tensor, query_positions: Tensor | None
) -> None:
    if block_tables.dim() != 2:
        raise InvalidArgument(f"block_tables has shape {tuple(block_tables.shape)}; it must be [seqs, max_blocks]")
    seqs, max_blocks = block_tables.shape
    for name, tensor, shape in (
        ("block_tables", block_tables, (seqs, max_blocks)),
        ("context_lens", context_lens, (seqs,)),
        ("query_starts", query_starts, (seqs + 1,)),
        ("query_positions", query_positions, (query.shape[0],)),
    ):
        if tensor is None:
            continue
        if tensor.dtype != torch.int32 or tensor.shape != shape or not tensor.is_contiguous():
            raise InvalidArgument(
                f"{name} is {tensor.dtype} of shape {tuple(tensor.shape)}; it must be contiguous int32 of shape {shape}"
            )
        if tensor.device != query.device:
            raise InvalidArgument(f"{name} is on {tensor.device} and query on {query.device}; they must be together")


def _check_values(query: Tensor, pool: Tensor, block_tables: Tensor, context_lens: Tensor, query_starts: Tensor) -> None:
    # With numpy, because torch may wake its threads for these few numbers, and they then spin for milliseconds on cores that the
    # kernels need.
    tables, lengths, starts = block_tables.numpy(), context_lens.numpy(), query_starts.numpy()
    block_tokens = pool.shape[4]
    keys_max = tables.shape[1] * block_tokens
    if starts[0] != 0 or starts[-1] != query.shape[0] or (np.diff(starts) < 0).any():
        raise InvalidArgument(f"query_starts must rise from 0 to total_q = {query.shape[0]}")
    if lengths.size == 0:
        return
    low, high = int(lengths.min()), int(lengths.max())
    if low < 0 or high > keys_max:
        raise InvalidArgument(
            f"context_lens lie in [{low}, {high}]; {tables.shape[1]} blocks of {block_tokens} tokens hold 0 to {keys_max}"
        )
    ids = tables[np.arange(tables.shape[1]) * block_tokens < lengths[:, None]]
    if ids.size == 0:
        return
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= pool.shape[0]:
        raise InvalidArgument(f"block_tables name blocks [{low}, {high}]; the pool has blocks 0 to {pool.shape[0] - 1}")
