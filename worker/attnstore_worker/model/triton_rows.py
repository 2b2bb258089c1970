"""The operations of a decoder layer on its rows between two matrix products, as Triton kernels: one launch each.

Owns: the kernels `normalize_rows`, `rotate_and_put` and `gate_rows`, and the functions that launch them. Invariant: results equal
those of torch's operations in fp32, rounded once to the type of the rows; no argument is a count of rows or tokens, so kernels are
compiled once for a model, whatever its steps look like.

Elements are bf16, fp16 or fp32, rows are contiguous. Sizes need not be powers of two.
"""

# mypy: disable-error-code="untyped-decorator,no-untyped-call,no-untyped-def"

from __future__ import annotations

from typing import Final

import torch
import triton
import triton.language as tl
from torch import Tensor

GATE_BLOCK: Final = 1024
"""Elements of a row of `gate_rows` for one program."""

TILE_HEADS: Final = 8
"""Heads of a row of `rotate_and_put` for one program: a decode step of one row still occupies several multiprocessors."""

_WARP_ELEMENTS: Final = 256
_WARPS_MIN, _WARPS_MAX = 4, 16


def normalized(hidden: Tensor, weight: Tensor, epsilon: float, delta: Tensor | None = None) -> Tensor:
    """`hidden / sqrt(mean(hidden ** 2) + epsilon) * weight` by row (RMSNorm, Zhang and Sennrich 2019): `[rows, hidden_size]`.

    With `delta`, of the same shape, adds `hidden += delta` in place first.
    """
    assert hidden.is_contiguous()
    assert delta is None or delta.is_contiguous()
    rows, width = hidden.shape
    result = torch.empty_like(hidden)
    block = int(triton.next_power_of_2(width))
    warps = min(max(block // _WARP_ELEMENTS, _WARPS_MIN), _WARPS_MAX)
    normalize_rows[(rows,)](hidden, delta, weight, result, epsilon, WIDTH=width, BLOCK=block, num_warps=warps)
    return result


def rotated_and_put(
    heads: Tensor, rotation: tuple[Tensor, Tensor], positions: Tensor, slots: tuple[Tensor, Tensor], pool: Tensor, layer: int
) -> Tensor:
    """Rotates queries and keys (RoPE in the order of GPT-NeoX), and stores keys and values into a layer of the pool.

    heads: `[rows, q_heads + 2 * kv_heads, head_dim]`: queries, keys, values. rotation: fp32 cosines and sines of all positions,
    `[context_tokens, head_dim / 2]`, of the angle between element `i` and element `i + head_dim / 2`. positions: int64 `[rows]`.
    slots: `slot_blocks` and `slot_offsets` of `PagedStep`; a row whose block is negative stores nothing. pool: `[blocks, layers, 2,
    kv_heads, block_tokens, head_dim]`.
    Returns the rotated queries `[rows, q_heads, head_dim]`.
    """
    assert heads.is_contiguous()
    rows, count, head_dim = heads.shape
    _, _, _, kv_heads, block_tokens, _ = pool.shape
    q_heads = count - 2 * kv_heads
    query = torch.empty(rows, q_heads, head_dim, dtype=heads.dtype, device=heads.device)
    rotate_and_put[(rows, triton.cdiv(count, TILE_HEADS))](
        heads,
        *rotation,
        positions,
        *slots,
        query,
        pool,
        pool.stride(0),
        layer * pool.stride(1),
        Q_HEADS=q_heads,
        KV_HEADS=kv_heads,
        HEAD_DIM=head_dim,
        BLOCK_TOKENS=block_tokens,
        TILE=TILE_HEADS,
        BLOCK_HALF=int(triton.next_power_of_2(head_dim // 2)),
    )
    return query


def gated(gate_up: Tensor) -> Tensor:
    """Returns `silu(gate) * up`, `[rows, intermediate]`, of `gate_up`, `[rows, 2 * intermediate]`: the inner part of a gated MLP
    (Shazeer 2020, SwiGLU).
    """
    assert gate_up.is_contiguous()
    rows, both = gate_up.shape
    result = torch.empty(rows, both // 2, dtype=gate_up.dtype, device=gate_up.device)
    gate_rows[(rows, triton.cdiv(both // 2, GATE_BLOCK))](gate_up, result, WIDTH=both // 2, BLOCK=GATE_BLOCK)
    return result


@triton.jit
def normalize_rows(
    hidden,
    delta,
    weight,
    result,
    epsilon,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program normalizes one row, after adding the row of `delta` unless that is None. Grid `(rows,)`."""
    at = tl.program_id(0).to(tl.int64) * WIDTH
    dim = tl.arange(0, BLOCK)
    own = dim < WIDTH
    row = tl.load(hidden + at + dim, mask=own, other=0.0).to(tl.float32)
    if delta is not None:
        row += tl.load(delta + at + dim, mask=own, other=0.0).to(tl.float32)
        rounded = row.to(hidden.dtype.element_ty)
        tl.store(hidden + at + dim, rounded, mask=own)
        row = rounded.to(tl.float32)
    factor = tl.rsqrt(tl.sum(row * row, 0) / WIDTH + epsilon)
    row = row * factor * tl.load(weight + dim, mask=own, other=0.0).to(tl.float32)
    tl.store(result + at + dim, row.to(result.dtype.element_ty), mask=own)


@triton.jit(do_not_specialize_on_alignment=["positions", "slot_blocks", "slot_offsets"])
def rotate_and_put(
    heads,
    cosines,
    sines,
    positions,
    slot_blocks,
    slot_offsets,
    query,
    pool,
    block_stride,
    layer_at,
    Q_HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
):
    """One program takes `TILE` heads of one row. Grid `(rows, cdiv(Q_HEADS + 2 * KV_HEADS, TILE))`."""
    HALF: tl.constexpr = HEAD_DIM // 2
    HEADS: tl.constexpr = Q_HEADS + 2 * KV_HEADS
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * TILE + tl.arange(0, TILE)
    dim = tl.arange(0, BLOCK_HALF)
    own = (head < HEADS)[:, None] & (dim < HALF)[None, :]
    source = heads + (row * HEADS + head)[:, None] * HEAD_DIM + dim[None, :]
    low = tl.load(source, mask=own, other=0.0).to(tl.float32)
    high = tl.load(source + HALF, mask=own, other=0.0).to(tl.float32)
    angle = tl.load(positions + row).to(tl.int64) * HALF + dim
    cosine = tl.load(cosines + angle, mask=dim < HALF, other=0.0)[None, :]
    sine = tl.load(sines + angle, mask=dim < HALF, other=0.0)[None, :]
    turns = (head < Q_HEADS + KV_HEADS)[:, None]
    turned_low = tl.where(turns, low * cosine - high * sine, low)
    turned_high = tl.where(turns, high * cosine + low * sine, high)

    asks = own & (head < Q_HEADS)[:, None]
    target = query + (row * Q_HEADS + head)[:, None] * HEAD_DIM + dim[None, :]
    tl.store(target, turned_low.to(query.dtype.element_ty), mask=asks)
    tl.store(target + HALF, turned_high.to(query.dtype.element_ty), mask=asks)

    # A layer of a page has the heads of the keys and then those of the values, as a row does after its queries.
    block = tl.load(slot_blocks + row).to(tl.int64)
    stores = own & (head >= Q_HEADS)[:, None] & (block >= 0)
    slot = block * block_stride + layer_at + tl.load(slot_offsets + row) * HEAD_DIM
    stored = pool + slot + (head - Q_HEADS)[:, None] * (BLOCK_TOKENS * HEAD_DIM) + dim[None, :]
    tl.store(stored, turned_low.to(pool.dtype.element_ty), mask=stores)
    tl.store(stored + HALF, turned_high.to(pool.dtype.element_ty), mask=stores)


@triton.jit
def gate_rows(gate_up, result, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """One program computes `BLOCK` elements of one row. Grid `(rows, cdiv(WIDTH, BLOCK))`."""
    row = tl.program_id(0).to(tl.int64)
    dim = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    own = dim < WIDTH
    gate = tl.load(gate_up + row * (2 * WIDTH) + dim, mask=own, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * (2 * WIDTH) + WIDTH + dim, mask=own, other=0.0).to(tl.float32)
    tl.store(result + row * WIDTH + dim, (gate * tl.sigmoid(gate) * up).to(result.dtype.element_ty), mask=own)
