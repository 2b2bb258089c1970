"""The CPU decode kernel: few query rows against keys that lie in scattered pages, read once and in place.

Owns: `attend`, `finish` and `gather`, compiled by numba for the machine they run on.
Invariant: a page is read exactly once, in the order of its bytes, while the next page's lines are already on their way; nothing is
gathered into new memory. All arrays are one-dimensional and contiguous; the layout of each is stated at `attend`.

Source: the online softmax of FlashAttention (Dao et al. 2022) over pages as in PagedAttention (Kwon et al. 2023). Scores are kept
in base 2: the query arrives multiplied by `scale * log2(e)`, so that one `exp2` without a multiplication does.
"""

# mypy: disable-error-code="untyped-decorator,no-untyped-call,no-untyped-def"

from __future__ import annotations

from typing import Final

import numpy as np
from numba import njit

from attnstore.attention.simd import (
    LANES,
    add,
    exp2,
    fma,
    largest,
    load,
    maximum,
    mul,
    prefetch,
    splat,
    store,
    store_totals,
    sub,
    total,
)

QUAD: Final = 4
"""Keys scored together; block_tokens must be a multiple of it, and head_dim of LANES."""

NOTHING_SEEN: Final = np.float32(-1e30)
"""Running maximum of a row before its first key. Finite, so that differences of maxima are never NaN."""

_ZERO: Final = np.float32(0.0)
_ONE: Final = np.float32(1.0)
_HIDDEN: Final = np.float32(-np.inf)
_LN2: Final = np.float32(np.log(2.0))
_LINE_BYTES: Final = 64

_inlined = njit(nogil=True, error_model="numpy", forceinline=True, cache=True)
_compiled = njit(nogil=True, error_model="numpy", cache=True)


@_inlined
def _widen(tile, flat, start, elements):
    """Copies a run of a page into the fp32 tile, from where each row's loop rereads it in L1."""
    for at in range(0, elements, LANES):
        store(tile, at, load(flat, start + at))


@_inlined
def _score_row(scores, score_at, query, query_at, tile, block_tokens, head_dim, flat, ahead, values_after, line, lines):
    """`scores[t] = query . key[t]` for one row and one block, while `lines` of the next block are on their way per QUAD of keys."""
    for token in range(0, block_tokens, QUAD):
        for at in range(ahead, ahead + lines * line, line):
            prefetch(flat, at)
            prefetch(flat, at + values_after)
        ahead += lines * line
        w = x = y = z = splat(_ZERO)
        key = token * head_dim
        for dim in range(0, head_dim, LANES):
            part = load(query, query_at + dim)
            w = fma(part, load(tile, key + dim), w)
            x = fma(part, load(tile, key + head_dim + dim), x)
            y = fma(part, load(tile, key + 2 * head_dim + dim), y)
            z = fma(part, load(tile, key + 3 * head_dim + dim), z)
        store_totals(scores, score_at + token, w, x, y, z)


@_inlined
def _softmax_row(scores, score_at, width, tops, sums, state):
    """Turns one row's scores into weights relative to its running maximum; returns the factor on what was summed before."""
    before = tops[state]
    highest = splat(before)
    for at in range(score_at, score_at + width, LANES):
        highest = maximum(highest, load(scores, at))
    top = largest(highest)
    highest, summed = splat(top), splat(_ZERO)
    for at in range(score_at, score_at + width, LANES):
        weights = exp2(sub(load(scores, at), highest))
        store(scores, at, weights)
        summed = add(summed, weights)
    keep = _ONE
    if top > before:
        keep = np.float32(2.0 ** (before - top))
        tops[state] = top
    sums[state] = sums[state] * keep + total(summed)
    return keep


@_inlined
def _accumulate_row(outs, out_at, keep, scores, score_at, tile, first, last, head_dim):
    """`outs = outs * keep + sum over tokens [first, last) of weight * value`, four vectors of dimensions at a time."""
    kept = splat(keep)
    wide = head_dim // (4 * LANES) * (4 * LANES)
    for dim in range(0, wide, 4 * LANES):
        at = out_at + dim
        w, x = mul(kept, load(outs, at)), mul(kept, load(outs, at + LANES))
        y, z = mul(kept, load(outs, at + 2 * LANES)), mul(kept, load(outs, at + 3 * LANES))
        for token in range(first, last):
            weight, value = splat(scores[score_at + token]), token * head_dim + dim
            w = fma(weight, load(tile, value), w)
            x = fma(weight, load(tile, value + LANES), x)
            y = fma(weight, load(tile, value + 2 * LANES), y)
            z = fma(weight, load(tile, value + 3 * LANES), z)
        store(outs, at, w)
        store(outs, at + LANES, x)
        store(outs, at + 2 * LANES, y)
        store(outs, at + 3 * LANES, z)
    for dim in range(wide, head_dim, LANES):
        w = mul(kept, load(outs, out_at + dim))
        for token in range(first, last):
            w = fma(splat(scores[score_at + token]), load(tile, token * head_dim + dim), w)
        store(outs, out_at + dim, w)


@_inlined
def _score_pair(scores, sa, sb, query, qa, qb, tile, block_tokens, head_dim, flat, ahead, values_after, line, lines):
    for token in range(0, block_tokens, QUAD):
        for at in range(ahead, ahead + lines * line, line):
            prefetch(flat, at)
            prefetch(flat, at + values_after)
        ahead += lines * line
        w = x = y = z = splat(_ZERO)
        w2 = x2 = y2 = z2 = splat(_ZERO)
        key = token * head_dim
        for dim in range(0, head_dim, LANES):
            a = load(query, qa + dim)
            b = load(query, qb + dim)
            k = load(tile, key + dim)
            w = fma(a, k, w)
            w2 = fma(b, k, w2)
            k = load(tile, key + head_dim + dim)
            x = fma(a, k, x)
            x2 = fma(b, k, x2)
            k = load(tile, key + 2 * head_dim + dim)
            y = fma(a, k, y)
            y2 = fma(b, k, y2)
            k = load(tile, key + 3 * head_dim + dim)
            z = fma(a, k, z)
            z2 = fma(b, k, z2)
        store_totals(scores, sa + token, w, x, y, z)
        store_totals(scores, sb + token, w2, x2, y2, z2)


@_inlined
def _accumulate_pair(outs, oa, ob, ka, kb, scores, sa, sb, tile, first, last, head_dim):
    kept = splat(ka)
    kept2 = splat(kb)
    wide = head_dim // (4 * LANES) * (4 * LANES)
    for dim in range(0, wide, 4 * LANES):
        at = oa + dim
        w, x = mul(kept, load(outs, at)), mul(kept, load(outs, at + LANES))
        y, z = mul(kept, load(outs, at + 2 * LANES)), mul(kept, load(outs, at + 3 * LANES))
        at = ob + dim
        w2, x2 = mul(kept2, load(outs, at)), mul(kept2, load(outs, at + LANES))
        y2, z2 = mul(kept2, load(outs, at + 2 * LANES)), mul(kept2, load(outs, at + 3 * LANES))
        for token in range(first, last):
            value = token * head_dim + dim
            a = splat(scores[sa + token])
            b = splat(scores[sb + token])
            v = load(tile, value)
            w = fma(a, v, w)
            w2 = fma(b, v, w2)
            v = load(tile, value + LANES)
            x = fma(a, v, x)
            x2 = fma(b, v, x2)
            v = load(tile, value + 2 * LANES)
            y = fma(a, v, y)
            y2 = fma(b, v, y2)
            v = load(tile, value + 3 * LANES)
            z = fma(a, v, z)
            z2 = fma(b, v, z2)
        store(outs, at, w2)
        store(outs, at + LANES, x2)
        store(outs, at + 2 * LANES, y2)
        store(outs, at + 3 * LANES, z2)
        at = oa + dim
        store(outs, at, w)
        store(outs, at + LANES, x)
        store(outs, at + 2 * LANES, y)
        store(outs, at + 3 * LANES, z)
    for dim in range(wide, head_dim, LANES):
        w = mul(kept, load(outs, oa + dim))
        w2 = mul(kept2, load(outs, ob + dim))
        for token in range(first, last):
            v = load(tile, token * head_dim + dim)
            w = fma(splat(scores[sa + token]), v, w)
            w2 = fma(splat(scores[sb + token]), v, w2)
        store(outs, oa + dim, w)
        store(outs, ob + dim, w2)


@_inlined
def _hide(scores, score_at, width, first, last):
    """Scores outside of `[first, last)` become -inf."""
    for at in range(0, first):
        scores[score_at + at] = _HIDDEN
    for at in range(last, width):
        scores[score_at + at] = _HIDDEN


@_compiled
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
    tile,
    scores,
):
    """Attend for each of `pieces`, a run of blocks of one sequence; leaves unnormalised results in `outs`, `tops`, `sums`.

    pieces: int64 `[n, 6]`: sequence, first row, rows, first block, end of blocks, first state row.
    tables: int32 `[seqs, max_blocks]`. visible: int32 `[rows, 2]`, the range of keys that each row sees.
    query: fp32 `[rows * q_heads * head_dim]`, times `scale * log2(e)`. flat: the pool's elements (see `simd`).
    block_stride, layer_at: elements from block to block, and from a block's start to the layer's.
    outs: fp32 `[state rows * q_heads * head_dim]`; tops, sums: fp32 `[state rows * q_heads]`: running maximum and sum of weights.
    tile: fp32 scratch `[block_tokens * head_dim]`, aligned to 64 bytes; scores: fp32 scratch `[rows of a piece * group * width]`.
    """
    q_heads = kv_heads * group
    run = block_tokens * head_dim
    line = _LINE_BYTES // flat.itemsize
    width = (block_tokens + LANES - 1) // LANES * LANES
    for piece in range(pieces.shape[0]):
        sequence, row0, rows, block0, block1, state0 = pieces[piece]
        for at in range(state0 * q_heads, (state0 + rows) * q_heads):
            tops[at] = NOTHING_SEEN
            sums[at] = _ZERO
        outs[state0 * q_heads * head_dim : (state0 + rows) * q_heads * head_dim] = _ZERO
        # The prefetches of one head's next run are spread over its rows: in one burst they would fill the line buffers and stall.
        quads = rows * group * (block_tokens // QUAD)
        lines = (run // line + quads - 1) // quads
        for block in range(block0, block1):
            begin = tables[sequence, block] * block_stride + layer_at
            ahead = tables[sequence, min(block + 1, block1 - 1)] * block_stride + layer_at
            key0 = block * block_tokens
            seen0, seen1 = block_tokens, 0
            for row in range(row0, row0 + rows):
                seen0 = min(seen0, max(visible[row, 0] - key0, 0))
                seen1 = max(seen1, min(visible[row, 1] - key0, block_tokens))
            for head in range(kv_heads):
                keys_ahead = ahead + head * run
                _widen(tile, flat, begin + head * run, run)
                n = rows * group
                for r in range(0, n - 1, 2):
                    qa = ((row0 + r // group) * q_heads + head * group + r % group) * head_dim
                    qb = ((row0 + (r + 1) // group) * q_heads + head * group + (r + 1) % group) * head_dim
                    _score_pair(scores, r * width, (r + 1) * width, query, qa, qb, tile, block_tokens, head_dim, flat, keys_ahead, kv_heads * run, line, 2 * lines)
                    keys_ahead += block_tokens // QUAD * 2 * lines * line
                if n & 1:
                    r = n - 1
                    qa = ((row0 + r // group) * q_heads + head * group + r % group) * head_dim
                    _score_row(scores, r * width, query, qa, tile, block_tokens, head_dim, flat, keys_ahead, kv_heads * run, line, lines)
                for row in range(rows):
                    first = min(max(visible[row0 + row, 0] - key0, 0), block_tokens)
                    last = min(max(visible[row0 + row, 1] - key0, first), block_tokens)
                    if first > 0 or last < width:
                        for member in range(group):
                            _hide(scores, (row * group + member) * width, width, first, last)
                _widen(tile, flat, begin + (kv_heads + head) * run, run)
                for r in range(0, n - 1, 2):
                    sa = (state0 + r // group) * q_heads + head * group + r % group
                    sb = (state0 + (r + 1) // group) * q_heads + head * group + (r + 1) % group
                    ka = _softmax_row(scores, r * width, width, tops, sums, sa)
                    kb = _softmax_row(scores, (r + 1) * width, width, tops, sums, sb)
                    _accumulate_pair(outs, sa * head_dim, sb * head_dim, ka, kb, scores, r * width, (r + 1) * width, tile, seen0, seen1, head_dim)
                if n & 1:
                    r = n - 1
                    sa = (state0 + r // group) * q_heads + head * group + r % group
                    ka = _softmax_row(scores, r * width, width, tops, sums, sa)
                    _accumulate_row(outs, sa * head_dim, ka, scores, r * width, tile, seen0, seen1, head_dim)


@_compiled
def finish(pieces, owners, q_heads, head_dim, outs, tops, sums, lses):
    """Folds the states of pieces that share a row into their owner's and normalises the owners, in place.

    owners: int64 `[n]`, for each piece the state row of its sequence's first piece (its own where it is the first).
    lses: fp32 `[owner rows * q_heads]`, natural logarithm, written here; `outs` of owner rows become the attention's result.
    """
    for piece in range(pieces.shape[0]):
        rows, source0, target0 = pieces[piece, 2], pieces[piece, 5], owners[piece]
        if source0 == target0:
            continue
        for at in range(rows * q_heads):
            source, target = source0 * q_heads + at, target0 * q_heads + at
            top = max(tops[source], tops[target])
            add_factor, keep_factor = np.float32(2.0 ** (tops[source] - top)), np.float32(2.0 ** (tops[target] - top))
            tops[target] = top
            sums[target] = sums[target] * keep_factor + sums[source] * add_factor
            for dim in range(head_dim):
                outs[target * head_dim + dim] = (
                    outs[target * head_dim + dim] * keep_factor + outs[source * head_dim + dim] * add_factor
                )
    for at in range(lses.shape[0]):
        if sums[at] > _ZERO:
            lses[at] = tops[at] * _LN2 + np.log(sums[at])
            factor = _ONE / sums[at]
            for dim in range(at * head_dim, (at + 1) * head_dim):
                outs[dim] *= factor
        else:
            lses[at] = _HIDDEN


@_compiled
def gather(flat, table, block0, block1, block_stride, layer_at, kv_heads, run, gathered):
    """Copies one layer of blocks `[block0, block1)` to `gathered`, `[2, kv_heads, blocks * run]` flat, element type unchanged."""
    blocks = block1 - block0
    for block in range(blocks):
        begin = table[block0 + block] * block_stride + layer_at
        for plane in range(2 * kv_heads):
            target = (plane * blocks + block) * run
            gathered[target : target + run] = flat[begin + plane * run : begin + (plane + 1) * run]
