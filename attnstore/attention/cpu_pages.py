"""Access of compiled code to the elements of a pool of pages on the CPU.

Owns: `elements`, and the copies between a layer of scattered pages and packed rows: `put` and `gather`, compiled by numba.
Invariant: every address lies in a block that the caller names; arrays are one-dimensional and contiguous unless stated otherwise.
"""

# mypy: disable-error-code="untyped-decorator,no-untyped-call,no-untyped-def"

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from attnstore.attention.simd import ELEMENTS, LANES, move
from attnstore.copying.compiled import compiled


def elements(rows: Tensor) -> Any:
    """Returns the elements of a pool, or of other contiguous rows, as the kernels take them: one flat range from the first to the
    last, including the gaps.
    """
    count = (rows.shape[0] - 1) * rows.stride(0) + math.prod(rows.shape[1:])
    return rows.as_strided((count,), (1,)).view(ELEMENTS[rows.dtype]).numpy()


@compiled
def put(flat, blocks, offsets, block_stride, layer_at, kv_heads, block_tokens, head_dim, rows, row_stride):
    """Writes each row's own keys and values of one layer into the pool.

    blocks, offsets: int64 `[rows]`, the destination; rows: `[rows, 2, kv_heads, head_dim]` of the pool's type, `row_stride`
    elements apart; `head_dim` is a multiple of LANES.
    """
    for row in range(blocks.shape[0]):
        begin = blocks[row] * block_stride + layer_at + offsets[row] * head_dim
        for plane in range(2 * kv_heads):
            source, target = row * row_stride + plane * head_dim, begin + plane * block_tokens * head_dim
            for dim in range(0, head_dim, LANES):
                move(flat, target + dim, rows, source + dim)


@compiled
def gather(flat, table, block0, block1, block_stride, layer_at, kv_heads, run, gathered):
    """Copies one layer of blocks `[block0, block1)` to `gathered`, `[2, kv_heads, blocks * run]` flat, element type unchanged."""
    blocks = block1 - block0
    for block in range(blocks):
        begin = table[block0 + block] * block_stride + layer_at
        for plane in range(2 * kv_heads):
            target = (plane * blocks + block) * run
            gathered[target : target + run] = flat[begin + plane * run : begin + (plane + 1) * run]
