"""The CPU kernel over latent pages (MLA): every query head attends to the same rows, and a row's first elements are its value.

Owns: `attend`, compiled by numba. Invariant: the rows of a page are read in place, each once for VECTORS query vectors, and only
those that one of these vectors sees; every address lies in a block that a table names. Arrays are one-dimensional and contiguous.

Two things differ from `cpu_kernel`. All heads share one row, so each element takes part in many products, and arithmetic is the
limit: a chunk of rows is widened into the L2 cache once, and ROWS query vectors at a time compute their scores, their softmax and
their sums over it. And a row is long, so a chunk is a number of rows, wherever blocks end, and prefetching the rows of the next
chunk gains nothing (measured with 4 to 128 heads).

Source: multi-head latent attention with absorbed projections (DeepSeek-V2, arXiv 2405.04434); the online softmax of FlashAttention.
"""

# mypy: disable-error-code="untyped-decorator,no-untyped-call,no-untyped-def"

from __future__ import annotations

from typing import Final

import numpy as np

from attnstore.attention.dots import COLUMNS, OUTPUTS, ROWS, dot_rows
from attnstore.attention.online_softmax import NOTHING_SEEN, weigh
from attnstore.attention.simd import LANES, load, store
from attnstore.attention.weighted_sums import sum_row, sum_rows
from attnstore.copying.compiled import compiled, inlined
from attnstore.limits import LATENT_DIM_STEP

CHUNK: Final = 64
"""Keys per softmax. 64 rows of 576 elements are 147 KB in fp32."""

VECTORS: Final = 128
"""Query vectors (rows times heads) that read a chunk together: they and their sums fit the L2 cache beside it."""

_ZERO: Final = np.float32(0.0)
_HIDDEN: Final = np.float32(-np.inf)

assert CHUNK % LANES == 0 == CHUNK % OUTPUTS
assert LATENT_DIM_STEP % COLUMNS == 0 == LATENT_DIM_STEP % LANES


def scratch_elements(row_dim: int) -> int:
    """fp32 elements of scratch that `attend` needs."""
    return CHUNK * row_dim + ROWS * (CHUNK + 1)


@inlined
def _widen(tile, flat, table, key0, tokens, block_stride, layer_at, block_tokens, row_dim):
    """Copies the rows of keys `[key0, key0 + tokens)` into the tile, as fp32."""
    for token in range(tokens):
        key = key0 + token
        source = table[key // block_tokens] * block_stride + layer_at + key % block_tokens * row_dim
        for dim in range(0, row_dim, LANES):
            store(tile, token * row_dim + dim, load(flat, source + dim))


@inlined
def _attend_some(tile, row_dim, query, first, count, seen, key0, tokens, outs, value_dim, tops, sums, state, scores, keeps):
    """Adds a chunk of `tokens` keys to the states of `count` query vectors, at most ROWS, from `first` on.

    seen: `[ROWS, 2]`, the keys that each of them sees.
    """
    for token in range(0, tokens, OUTPUTS):
        dot_rows(tile, token * row_dim, query, first * row_dim, row_dim, scores, token, CHUNK)
    end = (tokens + LANES - 1) // LANES * LANES
    for row in range(count):
        visible0 = min(max(seen[row, 0] - key0, 0), tokens)
        visible1 = min(max(seen[row, 1] - key0, visible0), tokens)
        for at in range(row * CHUNK, row * CHUNK + visible0):
            scores[at] = _HIDDEN
        for at in range(row * CHUNK + visible1, row * CHUNK + end):
            scores[at] = _HIDDEN
        keeps[row] = weigh(scores, row * CHUNK, end, tops, sums, state + row)
    if count == ROWS:
        sum_rows(outs, state * value_dim, value_dim, keeps, scores, 0, CHUNK, tile, row_dim, 0, tokens, value_dim)
    else:
        for row in range(count):
            at, kept = (state + row) * value_dim, keeps[row : row + 1]
            sum_row(outs, at, value_dim, kept, scores, row * CHUNK, CHUNK, tile, row_dim, 0, tokens, value_dim)


@compiled
def attend(
    pieces,
    tables,
    visible,
    query,
    flat,
    block_stride,
    layer_at,
    q_heads,
    block_tokens,
    row_dim,
    value_dim,
    outs,
    tops,
    sums,
    scratch,
):
    """Computes attention for each of `pieces`, a run of blocks of one sequence. Leaves unnormalised results in `outs`, `tops`,
    `sums`.

    pieces, tables, visible: as `cpu_kernel.attend` takes them. tops, sums: fp32 `[state rows * q_heads]`.
    query: fp32 `[(rows * q_heads + ROWS - 1) * row_dim]`, times `scale * log2(e)`; what follows the last row is read, and not used.
    flat: the pool's elements, as `simd.load` takes them.
    block_stride, layer_at: elements from block to block, and from a block's start to the layer's.
    row_dim, value_dim: multiples of LATENT_DIM_STEP.
    outs: fp32 `[state rows * q_heads * value_dim]`. scratch: fp32 `[scratch_elements(row_dim)]`.
    """
    tile, rest = scratch[: CHUNK * row_dim], scratch[CHUNK * row_dim :]
    scores, keeps = rest[: ROWS * CHUNK], rest[ROWS * CHUNK :]
    seen = np.zeros((ROWS, 2), np.int64)
    for piece in range(pieces.shape[0]):
        sequence, row0, rows, block0, block1, state0 = pieces[piece]
        table, vectors = tables[sequence], rows * q_heads
        tops[state0 * q_heads : state0 * q_heads + vectors] = NOTHING_SEEN
        sums[state0 * q_heads : state0 * q_heads + vectors] = _ZERO
        outs[state0 * q_heads * value_dim : (state0 * q_heads + vectors) * value_dim] = _ZERO
        for vector0 in range(0, vectors, VECTORS):
            vector1 = min(vector0 + VECTORS, vectors)
            first, last = block1 * block_tokens, block0 * block_tokens
            for row in range(vector0 // q_heads, (vector1 - 1) // q_heads + 1):
                if visible[row0 + row, 0] < visible[row0 + row, 1]:
                    first, last = min(first, visible[row0 + row, 0]), max(last, visible[row0 + row, 1])
            first, last = max(first, block0 * block_tokens), min(last, block1 * block_tokens)
            for key0 in range(first, last, CHUNK):
                tokens = min(CHUNK, last - key0)
                _widen(tile, flat, table, key0, tokens, block_stride, layer_at, block_tokens, row_dim)
                for vector in range(vector0, vector1, ROWS):
                    count = min(ROWS, vector1 - vector)
                    for row in range(count):
                        seen[row] = visible[row0 + (vector + row) // q_heads]
                    state = state0 * q_heads + vector
                    _attend_some(
                        tile, row_dim, query, row0 * q_heads + vector, count, seen, key0, tokens,
                        outs, value_dim, tops, sums, state, scores, keeps,
                    )  # fmt: skip
