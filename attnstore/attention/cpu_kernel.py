"""The CPU decode kernel: few query rows against keys that lie in scattered pages, read once and in place.

Owns: `attend`, compiled by numba for the machine that it runs on.
Invariant: a page is read once and is never gathered into other memory; every address lies in a block that a table names. Arrays are
one-dimensional and contiguous unless stated otherwise; `attend` states the layout of each.

A chunk of blocks is processed in three phases: the scores of all heads against its keys, one softmax over the chunk, the weighted
sum of its values. A core has few line fill buffers, so memory latency overlaps with arithmetic only if requests are spread evenly.
While a run of keys is processed, the same head's run of values is prefetched a few lines at a time; while a run of values is
processed, the same head's keys one chunk ahead are prefetched.

Source: the online softmax of FlashAttention (Dao et al. 2022) over pages as in PagedAttention (Kwon et al. 2023). Scores are kept
in base 2: the query arrives multiplied by `scale * log2(e)`, so that `exp2` suffices. Features that only some models have (soft
cap, sinks) are None for the others, and numba then compiles the kernel without them.
"""

# mypy: disable-error-code="untyped-decorator,no-untyped-call,no-untyped-def"

from __future__ import annotations

from typing import Final, NamedTuple

import numpy as np

from attnstore.attention.online_softmax import NOTHING_SEEN, cap_scores, weigh
from attnstore.attention.simd import (
    LANES,
    fma,
    load,
    mul,
    prefetch,
    splat,
    store,
    store_totals,
)
from attnstore.copying.compiled import compiled, inlined

QUAD: Final = 4
"""Keys scored together; block_tokens must be a multiple of it, and head_dim of LANES."""

CHUNK_TOKENS: Final = 64
"""Keys per softmax: enough to amortise its horizontal steps, few enough that a chunk's scores stay in L1."""

_ZERO: Final = np.float32(0.0)
_ONE: Final = np.float32(1.0)
_HIDDEN: Final = np.float32(-np.inf)
_LINE_BYTES: Final = 64
_WIDENED_PER_LINE: Final = 8
"""Vectors widened per cache line prefetched; measured."""


class _Shape(NamedTuple):
    """The constants of one call. `run` is the number of elements of one head's keys (or values) in one block."""

    kv_heads: int
    group: int
    block_tokens: int
    head_dim: int
    run: int
    line: int
    """Elements in a cache line."""
    width: int
    """Scores per row and chunk, padded to LANES."""


def chunk_blocks(block_tokens: int) -> int:
    """Blocks per chunk."""
    return max(1, CHUNK_TOKENS // block_tokens)


def scratch_elements(rows: int, q_heads: int, block_tokens: int, head_dim: int) -> int:
    """fp32 elements of scratch that `attend` needs for pieces of up to `rows` query rows."""
    width = -(-chunk_blocks(block_tokens) * block_tokens // LANES) * LANES
    return block_tokens * head_dim + rows * q_heads * (width + 1)


@inlined
def _widen(tile, flat, start, ahead, shape):
    """Copies a run of a page into the fp32 tile, so that each row rereads it from L1. Returns the new `ahead`."""
    for at in range(0, shape.run, LANES):
        if at % (_WIDENED_PER_LINE * LANES) == 0:
            prefetch(flat, ahead)
            ahead += shape.line
        store(tile, at, load(flat, start + at))
    return ahead


@inlined
def _request(flat, ahead, until, lines, shape):
    """Prefetches the next `lines` cache lines of a run that ends at `until`. Returns the new `ahead`."""
    stop = min(until, ahead + lines * shape.line)
    while ahead < stop:
        prefetch(flat, ahead)
        ahead += shape.line
    return ahead


@inlined
def _score_one(scores, score, query, row, tile, flat, ahead, until, lines, shape):
    """`scores[score + t] = query[row] . key[t]` for the keys of the tile."""
    dims = shape.head_dim
    for token in range(0, shape.block_tokens, QUAD):
        ahead = _request(flat, ahead, until, lines, shape)
        w = x = y = z = splat(_ZERO)
        key = token * dims
        for dim in range(0, dims, LANES):
            part = load(query, row + dim)
            w = fma(part, load(tile, key + dim), w)
            x = fma(part, load(tile, key + dims + dim), x)
            y = fma(part, load(tile, key + 2 * dims + dim), y)
            z = fma(part, load(tile, key + 3 * dims + dim), z)
        store_totals(scores, score + token, w, x, y, z)
    return ahead


@inlined
def _score_two(scores, score1, score2, query, row1, row2, tile, flat, ahead, until, lines, shape):
    """`_score_one` for two rows, loading each key once."""
    dims = shape.head_dim
    for token in range(0, shape.block_tokens, QUAD):
        ahead = _request(flat, ahead, until, 2 * lines, shape)
        w1 = x1 = y1 = z1 = splat(_ZERO)
        w2 = x2 = y2 = z2 = splat(_ZERO)
        key = token * dims
        for dim in range(0, dims, LANES):
            part1, part2 = load(query, row1 + dim), load(query, row2 + dim)
            w, x = load(tile, key + dim), load(tile, key + dims + dim)
            y, z = load(tile, key + 2 * dims + dim), load(tile, key + 3 * dims + dim)
            w1, w2 = fma(part1, w, w1), fma(part2, w, w2)
            x1, x2 = fma(part1, x, x1), fma(part2, x, x2)
            y1, y2 = fma(part1, y, y1), fma(part2, y, y2)
            z1, z2 = fma(part1, z, z1), fma(part2, z, z2)
        store_totals(scores, score1 + token, w1, x1, y1, z1)
        store_totals(scores, score2 + token, w2, x2, y2, z2)
    return ahead


@inlined
def _sum_one(outs, out, keep, scores, score, tile, first, last, flat, ahead, until, lines, shape):
    """`outs = outs * keep + sum over tokens [first, last) of weight * value`, four vectors of dimensions at a time."""
    kept = splat(keep)
    dims = shape.head_dim
    wide = dims // (4 * LANES) * (4 * LANES)
    for dim in range(0, wide, 4 * LANES):
        at = out + dim
        w, x = mul(kept, load(outs, at)), mul(kept, load(outs, at + LANES))
        y, z = mul(kept, load(outs, at + 2 * LANES)), mul(kept, load(outs, at + 3 * LANES))
        for token in range(first, last):
            if token % QUAD == 0:
                ahead = _request(flat, ahead, until, lines, shape)
            weight, value = splat(scores[score + token]), token * dims + dim
            w = fma(weight, load(tile, value), w)
            x = fma(weight, load(tile, value + LANES), x)
            y = fma(weight, load(tile, value + 2 * LANES), y)
            z = fma(weight, load(tile, value + 3 * LANES), z)
        store(outs, at, w)
        store(outs, at + LANES, x)
        store(outs, at + 2 * LANES, y)
        store(outs, at + 3 * LANES, z)
    for dim in range(wide, dims, LANES):
        w = mul(kept, load(outs, out + dim))
        for token in range(first, last):
            w = fma(splat(scores[score + token]), load(tile, token * dims + dim), w)
        store(outs, out + dim, w)
    return ahead


@inlined
def _sum_two(outs, out1, out2, keep1, keep2, scores, score1, score2, tile, first, last, flat, ahead, until, lines, shape):
    """`_sum_one` for two rows, loading each value once."""
    kept1, kept2 = splat(keep1), splat(keep2)
    dims = shape.head_dim
    wide = dims // (4 * LANES) * (4 * LANES)
    for dim in range(0, wide, 4 * LANES):
        at1, at2 = out1 + dim, out2 + dim
        w1, w2 = mul(kept1, load(outs, at1)), mul(kept2, load(outs, at2))
        x1, x2 = mul(kept1, load(outs, at1 + LANES)), mul(kept2, load(outs, at2 + LANES))
        y1, y2 = mul(kept1, load(outs, at1 + 2 * LANES)), mul(kept2, load(outs, at2 + 2 * LANES))
        z1, z2 = mul(kept1, load(outs, at1 + 3 * LANES)), mul(kept2, load(outs, at2 + 3 * LANES))
        for token in range(first, last):
            if token % QUAD == 0:
                ahead = _request(flat, ahead, until, 2 * lines, shape)
            weight1, weight2 = splat(scores[score1 + token]), splat(scores[score2 + token])
            value = token * dims + dim
            w, x = load(tile, value), load(tile, value + LANES)
            y, z = load(tile, value + 2 * LANES), load(tile, value + 3 * LANES)
            w1, w2 = fma(weight1, w, w1), fma(weight2, w, w2)
            x1, x2 = fma(weight1, x, x1), fma(weight2, x, x2)
            y1, y2 = fma(weight1, y, y1), fma(weight2, y, y2)
            z1, z2 = fma(weight1, z, z1), fma(weight2, z, z2)
        for lane, part1, part2 in ((0, w1, w2), (1, x1, x2), (2, y1, y2), (3, z1, z2)):
            store(outs, at1 + lane * LANES, part1)
            store(outs, at2 + lane * LANES, part2)
    for dim in range(wide, dims, LANES):
        w1, w2 = mul(kept1, load(outs, out1 + dim)), mul(kept2, load(outs, out2 + dim))
        for token in range(first, last):
            value = load(tile, token * dims + dim)
            w1, w2 = fma(splat(scores[score1 + token]), value, w1), fma(splat(scores[score2 + token]), value, w2)
        store(outs, out1 + dim, w1)
        store(outs, out2 + dim, w2)
    return ahead


@inlined
def _score_block(scores, score, query, row0, offsets, steps, tile, flat, begin, lines, shape):
    """First phase for one block: computes the scores of every row against its keys while prefetching its values."""
    values_at = shape.kv_heads * shape.run
    for head in range(shape.kv_heads):
        start = begin + head * shape.run
        until = start + values_at + shape.run
        ahead = _widen(tile, flat, start, start + values_at, shape)
        for step in range(head * steps, (head + 1) * steps - 1, 2):
            row1, row2 = (row0 + offsets[step]) * shape.head_dim, (row0 + offsets[step + 1]) * shape.head_dim
            at = score + step * shape.width
            ahead = _score_two(scores, at, at + shape.width, query, row1, row2, tile, flat, ahead, until, lines, shape)
        if steps % 2:
            step = (head + 1) * steps - 1
            row1 = (row0 + offsets[step]) * shape.head_dim
            _score_one(scores, score + step * shape.width, query, row1, tile, flat, ahead, until, lines, shape)


@inlined
def _softmax_chunk(scores, keeps, visible, row0, rows, state0, offsets, key0, tokens, tops, sums, cap, shape):
    """Second phase: caps scores, hides the keys that a row does not see, applies softmax. Returns the tokens `[first, last)` that
    at least one row sees.
    """
    padded = (tokens + LANES - 1) // LANES * LANES
    seen_first, seen_last = tokens, 0
    for row in range(rows):
        first = min(max(visible[row0 + row, 0] - key0, 0), tokens)
        last = min(max(visible[row0 + row, 1] - key0, first), tokens)
        if first < last:
            seen_first, seen_last = min(seen_first, first), max(seen_last, last)
        for head in range(shape.kv_heads):
            for step in range((head * rows + row) * shape.group, (head * rows + row + 1) * shape.group):
                score = step * shape.width
                if cap is not None:
                    cap_scores(scores, score, score + padded, _ONE, cap)
                for at in range(score, score + first):
                    scores[at] = _HIDDEN
                for at in range(score + last, score + padded):
                    scores[at] = _HIDDEN
                keeps[step] = weigh(scores, score, padded, tops, sums, state0 + offsets[step])
    return seen_first, seen_last


@inlined
def _sum_block(outs, keeps, scores, score, state0, offsets, steps, tile, first, last, flat, begin, ahead0, lines, shape):
    """Third phase for one block: adds its weighted values to every row while prefetching the keys of the next chunk."""
    values_at = shape.kv_heads * shape.run
    for head in range(shape.kv_heads):
        ahead = ahead0 + head * shape.run
        until = ahead + shape.run
        ahead = _widen(tile, flat, begin + values_at + head * shape.run, ahead, shape)
        for step in range(head * steps, (head + 1) * steps - 1, 2):
            out1, out2 = (state0 + offsets[step]) * shape.head_dim, (state0 + offsets[step + 1]) * shape.head_dim
            keep1, keep2 = keeps[step], keeps[step + 1]
            at1, at2 = score + step * shape.width, score + (step + 1) * shape.width
            ahead = _sum_two(outs, out1, out2, keep1, keep2, scores, at1, at2, tile, first, last, flat, ahead, until, lines, shape)
        if steps % 2:
            step = (head + 1) * steps - 1
            out1, at1 = (state0 + offsets[step]) * shape.head_dim, score + step * shape.width
            _sum_one(outs, out1, keeps[step], scores, at1, tile, first, last, flat, ahead, until, lines, shape)
    keeps[:] = _ONE


@compiled
def attend(
    pieces,
    tables,
    visible,
    query,
    flat,
    block_stride,
    layer_at,
    kv_heads,
    group,
    block_tokens,
    head_dim,
    outs,
    tops,
    sums,
    scratch,
    cap,
):
    """Computes attention for each of `pieces`, a run of blocks of one sequence. Leaves unnormalised results in `outs`, `tops`,
    `sums`.

    pieces: int64 `[n, 6]`: sequence, first row, rows, first block, end of blocks, first state row.
    tables: int32 `[seqs, max_blocks]`. visible: int32 `[rows, 2]`, the range of keys that each row sees.
    query: fp32 `[rows * q_heads * head_dim]`, times `scale * log2(e)`, or `scale / soft_cap` if there is a cap.
    flat: the pool's elements, as `simd.load` takes them.
    block_stride, layer_at: elements from block to block, and from a block's start to the layer's.
    outs: fp32 `[state rows * q_heads * head_dim]`; tops, sums: fp32 `[state rows * q_heads]`: running maximum and sum of weights.
    scratch: fp32 `[scratch_elements(...)]`, aligned to 64 bytes. cap: fp32, `soft_cap * log2(e)`, or None.
    """
    q_heads = kv_heads * group
    run = block_tokens * head_dim
    chunk = max(1, CHUNK_TOKENS // block_tokens)
    width = (chunk * block_tokens + LANES - 1) // LANES * LANES
    shape = _Shape(kv_heads, group, block_tokens, head_dim, run, _LINE_BYTES // flat.itemsize, width)
    for piece in range(pieces.shape[0]):
        sequence, row0, rows, block0, block1, state0 = pieces[piece]
        steps = rows * group
        tile, scores = scratch[:run], scratch[run : run + q_heads * rows * width]
        keeps = scratch[run + q_heads * rows * width : run + q_heads * rows * (width + 1)]
        # Offsets of the query rows in the order in which the kernel visits them: by KV head, then query token, then member of the
        # group.
        offsets = np.empty(q_heads * rows, np.int64)
        for head in range(kv_heads):
            for step in range(steps):
                offsets[head * steps + step] = step // group * q_heads + head * group + step % group
        row0_at, state0_at = row0 * q_heads, state0 * q_heads
        tops[state0_at : state0_at + rows * q_heads] = NOTHING_SEEN
        sums[state0_at : state0_at + rows * q_heads] = _ZERO
        outs[state0_at * head_dim : (state0_at + rows * q_heads) * head_dim] = _ZERO
        quads = steps * (block_tokens // QUAD)
        lines = (run // shape.line + quads - 1) // quads
        for chunk0 in range(block0, block1, chunk):
            chunk1 = min(chunk0 + chunk, block1)
            for block in range(chunk0, chunk1):
                begin = tables[sequence, block] * block_stride + layer_at
                token0 = (block - chunk0) * block_tokens
                _score_block(scores, token0, query, row0_at, offsets, steps, tile, flat, begin, lines, shape)
            key0, tokens = chunk0 * block_tokens, (chunk1 - chunk0) * block_tokens
            first, last = _softmax_chunk(
                scores, keeps, visible, row0, rows, state0_at, offsets, key0, tokens, tops, sums, cap, shape
            )
            for block in range(chunk0, chunk1):
                begin = tables[sequence, block] * block_stride + layer_at
                ahead = tables[sequence, min(block + chunk, block1 - 1)] * block_stride + layer_at
                token0 = (block - chunk0) * block_tokens
                seen0, seen1 = min(max(first - token0, 0), block_tokens), min(max(last - token0, 0), block_tokens)
                _sum_block(
                    outs, keeps, scores, token0, state0_at, offsets, steps, tile, seen0, seen1, flat, begin, ahead, lines, shape
                )
