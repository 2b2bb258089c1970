"""The checking wrapper around a backend: turns a malformed call into `InvalidArgument` before a kernel reads out of bounds.

Owns: the rules of the contract in `attnstore.attention.base`, as code.
Invariant: what passes here never makes a backend touch memory outside of its arguments.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from attnstore.attention.base import FLOAT_DTYPES, AttentionBackend
from attnstore.errors import InvalidArgument

HEAD_DIM_MAX = 256


class CheckedAttention:
    """An `AttentionBackend` that checks every argument and then delegates.

    Values (block ids, lengths) are checked where the tensors are on the CPU; on an accelerator reading them back would stall the
    device at each layer, so there only shapes and types are. The value checks of one set of tensors run once, not once per
    layer: a step calls every layer with the same tables.
    """

    def __init__(self, backend: AttentionBackend) -> None:
        self._backend = backend
        # The tensors are kept so that their identity cannot be reused while it is remembered here.
        self._seen: tuple[tuple[Tensor | None, ...], tuple[int, ...]] = ((), ())

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
    ) -> tuple[Tensor, Tensor]:
        """See `AttentionBackend.paged_attention`. Raises `InvalidArgument` for what the contract does not allow."""
        _check_data(query, pool)
        _check_options(pool, layer, scale, sliding_window, out_dtype)
        _check_index_shapes(query, block_tables, context_lens, query_starts, query_positions)
        if block_tables.device.type == "cpu":
            self._check_values_once(query, pool, block_tables, context_lens, query_starts, query_positions)
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
        )

    def _check_values_once(
        self,
        query: Tensor,
        pool: Tensor,
        block_tables: Tensor,
        context_lens: Tensor,
        query_starts: Tensor,
        query_positions: Tensor | None,
    ) -> None:
        tensors = (block_tables, context_lens, query_starts)
        facts = (query.shape[0], pool.shape[0], pool.shape[4], *(tensor._version for tensor in tensors))
        seen_tensors, seen_facts = self._seen
        if facts == seen_facts and all(a is b for a, b in zip(tensors, seen_tensors, strict=True)):
            return
        _check_values(query, pool, block_tables, context_lens, query_starts)
        self._seen = (tensors, facts)


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise InvalidArgument(message)


def _check_data(query: Tensor, pool: Tensor) -> None:
    _require(query.dim() == 3, f"query has shape {tuple(query.shape)}; it must be [total_q, q_heads, head_dim]")
    _require(
        pool.dim() == 6 and pool.shape[2] == 2,
        f"pool has shape {tuple(pool.shape)}; it must be [blocks, layers, 2, kv_heads, block_tokens, head_dim]",
    )
    for name, tensor in (("query", query), ("pool", pool)):
        _require(tensor.dtype in FLOAT_DTYPES, f"{name} has type {tensor.dtype}; it must be bfloat16, float16 or float32")
    head_dim, kv_heads = pool.shape[5], pool.shape[3]
    _require(query.shape[2] == head_dim, f"query has head_dim {query.shape[2]} and the pool {head_dim}; they must be equal")
    _require(1 <= head_dim <= HEAD_DIM_MAX, f"head_dim is {head_dim}; it must be between 1 and {HEAD_DIM_MAX}")
    _require(
        kv_heads > 0 and query.shape[1] > 0 and query.shape[1] % kv_heads == 0,
        f"query has {query.shape[1]} heads, which is no positive multiple of the pool's {kv_heads} kv_heads",
    )
    _require(min(pool.shape) > 0, f"pool has shape {tuple(pool.shape)}; every dimension must be at least 1")
    page = math.prod(pool.shape[1:])
    inner = tuple(page // math.prod(pool.shape[1 : dim + 1]) for dim in range(1, 6))
    _require(
        all(size == 1 or got == want for size, got, want in zip(pool.shape[1:], pool.stride()[1:], inner, strict=True)),
        f"pool has strides {pool.stride()}; each block must be contiguous (only the distance between blocks is free)",
    )


def _check_options(pool: Tensor, layer: int, scale: float, sliding_window: int | None, out_dtype: torch.dtype | None) -> None:
    _require(0 <= layer < pool.shape[1], f"layer is {layer}; the pool has layers 0 to {pool.shape[1] - 1}")
    _require(math.isfinite(scale), f"scale is {scale}; it must be finite")
    _require(sliding_window is None or sliding_window >= 1, f"sliding_window is {sliding_window}; it must be at least 1 or None")
    _require(
        out_dtype is None or out_dtype in FLOAT_DTYPES,
        f"out_dtype is {out_dtype}; it must be bfloat16, float16, float32 or None",
    )


def _check_index_shapes(
    query: Tensor, block_tables: Tensor, context_lens: Tensor, query_starts: Tensor, query_positions: Tensor | None
) -> None:
    _require(block_tables.dim() == 2, f"block_tables has shape {tuple(block_tables.shape)}; it must be [seqs, max_blocks]")
    seqs = block_tables.shape[0]
    expected = {
        "block_tables": (block_tables, tuple(block_tables.shape)),
        "context_lens": (context_lens, (seqs,)),
        "query_starts": (query_starts, (seqs + 1,)),
    }
    if query_positions is not None:
        expected["query_positions"] = (query_positions, (query.shape[0],))
    for name, (tensor, shape) in expected.items():
        _require(tensor.dtype == torch.int32, f"{name} has type {tensor.dtype}; it must be int32")
        _require(tuple(tensor.shape) == shape, f"{name} has shape {tuple(tensor.shape)}; it must be {shape}")
        _require(tensor.device == query.device, f"{name} is on {tensor.device} and query on {query.device}; they must be together")


def _check_values(query: Tensor, pool: Tensor, block_tables: Tensor, context_lens: Tensor, query_starts: Tensor) -> None:
    block_tokens = pool.shape[4]
    keys_max = block_tables.shape[1] * block_tokens
    _require(
        int(query_starts[0]) == 0 and int(query_starts[-1]) == query.shape[0] and bool((query_starts.diff() >= 0).all()),
        f"query_starts must rise from 0 to total_q = {query.shape[0]}",
    )
    if context_lens.numel() == 0:
        return
    low, high = (int(bound) for bound in context_lens.aminmax())
    _require(
        low >= 0 and high <= keys_max,
        f"context_lens lie in [{low}, {high}]; a table of {block_tables.shape[1]} blocks of {block_tokens} tokens holds 0 to {keys_max}",
    )
    used = torch.arange(block_tables.shape[1]) * block_tokens < context_lens.unsqueeze(1)
    ids = block_tables[used]
    if ids.numel():
        low, high = (int(bound) for bound in ids.aminmax())
        _require(
            low >= 0 and high < pool.shape[0],
            f"block_tables name blocks [{low}, {high}]; the pool has blocks 0 to {pool.shape[0] - 1}",
        )
