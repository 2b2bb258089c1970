"""The CPU prefill kernel: many query rows of one sequence against its pages, with the machine's bf16 dot products.

Owns: `attend_many`, compiled by numba, and the packed order of keys and values that it reads. Invariant: the result of a row
depends only on the keys that it sees; bytes of a page after them are never multiplied. Requires `HAS_BF16_PRODUCTS`.

Keys and values of a sequence are first packed into the order of the tiles, once for all rows, in panels of PANEL keys: keys as
`[head_dim / 2, PANEL, 2]`, values as `[PANEL / 2, head_dim, 2]`. Then ROWS query rows at a time compute a panel's scores, their
softmax and the weighted sum of its values before the next panel, so that scores never leave the L1 cache.

Source: the online softmax of FlashAttention (Dao et al. 2022); weights are rounded to bf16 before the second product, as there.
"""

# mypy: disable-error-code="untyped-decorator,no-untyped-call,no-untyped-def"

from __future__ import annotations

from typing import Final

import numpy as np

from attnstore.attention.barrier import meet, take
from attnstore.attention.cpu_kernel import QUAD
from attnstore.attention.functions import exp2
from attnstore.attention.online_softmax import NOTHING_SEEN, advance, cap_scores, with_sink
from attnstore.attention.simd import (
    HAS_BF16_PRODUCTS,
    LANES,
    add,
    fma,
    interleave,
    largest,
    load,
    maximum,
    mul,
    splat,
    store,
    transpose_pairs,
)
from attnstore.attention.tile import ROWS, tile_1, tile_4
from attnstore.copying.compiled import compiled, inlined

PANEL: Final = 128
"""Keys of a panel: enough that sums of values are seldom rescaled, few enough for the L1 and L2 caches."""

TOKENS: Final = 32
"""Query tokens that a thread processes at a time."""

COUNTERS: Final = 3 * 8
"""The number of int64 counters: three of them, one cache line apart."""

_WIDE: Final = 4 * LANES
_ZERO: Final = np.float32(0.0)
_ONE: Final = np.float32(1.0)
_HIDDEN: Final = np.float32(-np.inf)
_LN2: Final = np.float32(np.log(2.0))


def fits(head_dim: int, block_tokens: int) -> bool:
    """Returns whether the kernel is available on this machine and supports this size of heads and blocks."""
    return HAS_BF16_PRODUCTS and head_dim % (2 * LANES) == 0 and block_tokens % QUAD == 0


def scratch_elements(group: int, head_dim: int) -> tuple[int, int]:
    """Returns the bf16 and fp32 elements of scratch that one thread of `attend_many` needs."""
    rows = _padded(TOKENS * group)
    return rows * head_dim + ROWS * PANEL, rows * (head_dim + 2) + ROWS * (PANEL + 1)


@inlined
def _padded(rows):
    return (rows + ROWS - 1) // ROWS * ROWS


@compiled
def _pack(panel, panels, flat, table, first, last, block_stride, layer_at, kv_heads, block_tokens, head_dim, keys, values):
    """Packs one panel of every head. Values outside `[first, last)` become zeros: their weights are 0, but they might be NaN."""
    run = block_tokens * head_dim
    for head in range(kv_heads):
        at = (head * panels + panel) * PANEL * head_dim
        for token in range(0, PANEL, QUAD):  # of one block
            position = panel * PANEL + token
            source = 0  # after the last key; what is read there is never visible
            if position < last:
                source = table[position // block_tokens] * block_stride + layer_at + head * run + position % block_tokens * head_dim
            for dim in range(0, head_dim, 2 * LANES):
                transpose_pairs(keys, at + dim * PANEL + 2 * token, 2 * PANEL, flat, source + dim, head_dim)
            source += kv_heads * run
            for pair in range(0, QUAD, 2):
                seen1, seen2 = first <= position + pair < last, first <= position + pair + 1 < last
                for dim in range(0, head_dim, LANES):
                    target, value = at + (token + pair) * head_dim + 2 * dim, source + pair * head_dim + dim
                    interleave(values, target, flat, value, value + head_dim, seen1, seen2)


@inlined
def _softmax(scores, first, last, width, factor, cap, weights, row, tops, sums, state):
    """Computes one row's weights of a panel's first `width` keys, bf16. Returns the factor by which the earlier sums are scaled."""
    at = row * PANEL
    if cap is not None:
        cap_scores(scores, at, at + width, factor, cap)
        factor = _ONE
    for key in range(first):
        scores[at + key] = _HIDDEN
    for key in range(last, width):
        scores[at + key] = _HIDDEN
    highest = splat(_HIDDEN)
    for key in range(at, at + width, LANES):
        highest = maximum(highest, load(scores, key))
    top = max(tops[state], largest(highest) * factor)
    factors, lowered, summed = splat(factor), splat(-top), splat(_ZERO)
    for key in range(0, width, LANES):
        weight = exp2(fma(load(scores, at + key), factors, lowered))
        store(weights, at + key, weight)
        summed = add(summed, weight)
    return advance(tops, sums, state, top, summed)


@inlined
def _scores(queries, query, head_dim, keys, panel, width, scores):
    for part in range(0, width, _WIDE):
        tile_4(queries, query, head_dim, keys, panel + 2 * part, 2 * PANEL, head_dim // 2, scores, part, PANEL, None)


@inlined
def _sum_values(weights, values, panel, width, head_dim, outs, out, keeps):
    wide = head_dim // _WIDE * _WIDE
    for dim in range(0, wide, _WIDE):
        tile_4(weights, 0, PANEL, values, panel + 2 * dim, 2 * head_dim, width // 2, outs, out + dim, head_dim, keeps)
    for dim in range(wide, head_dim, LANES):
        tile_1(weights, 0, PANEL, values, panel + 2 * dim, 2 * head_dim, width // 2, outs, out + dim, head_dim, keeps)


@inlined
def _seen_keys(visible, begin, end):
    """Returns the keys `[first, last)` that at least one of these tokens sees."""
    first, last = 0, 0
    for token in range(begin, end):
        if visible[token, 0] < visible[token, 1]:
            first = min(first, visible[token, 0]) if last else visible[token, 0]
            last = max(last, visible[token, 1])
    return first, last


@compiled
def _attend_tokens(
    token0,
    tokens,
    head,
    kv_heads,
    group,
    head_dim,
    visible,
    query,
    query_stride,
    keys,
    values,
    panels,
    factor,
    cap,
    sinks,
    out,
    lses,
    narrow,
    wide,
):
    """Attends from the query tokens `[token0, token0 + tokens)` to one KV head."""
    rows = tokens * group
    padded = _padded(rows)
    queries, weights = narrow[: padded * head_dim], narrow[padded * head_dim :]
    outs, rest = wide[: padded * head_dim], wide[padded * head_dim :]
    tops, sums = rest[:padded], rest[padded : 2 * padded]
    scores, keeps = rest[2 * padded : 2 * padded + ROWS * PANEL], rest[2 * padded + ROWS * PANEL :]
    outs[:], tops[:], sums[:] = _ZERO, NOTHING_SEEN, _ZERO
    for token in range(tokens):
        source = (token0 + token) * query_stride + head * group * head_dim
        for at in range(group * head_dim):
            queries[token * group * head_dim + at] = query[source + at]
    queries[rows * head_dim :] = 0
    first, last = _seen_keys(visible, token0, token0 + tokens)
    for panel in range(first // PANEL, (last + PANEL - 1) // PANEL):
        panel_at = (head * panels + panel) * PANEL * head_dim
        for row in range(0, rows, ROWS):
            seen0, seen1 = _seen_keys(visible, token0 + row // group, token0 + (min(row + ROWS, rows) - 1) // group + 1)
            if seen0 >= (panel + 1) * PANEL or seen1 <= panel * PANEL:
                continue
            width = min((seen1 - panel * PANEL + LANES - 1) // LANES * LANES, PANEL)
            _scores(queries, row * head_dim, head_dim, keys, panel_at, width, scores)
            for each in range(row, row + ROWS):
                # A row of padding sees what the last row sees; its result is not used.
                token = token0 + min(each, rows - 1) // group
                begin = min(max(visible[token, 0] - panel * PANEL, 0), width)
                until = min(max(visible[token, 1] - panel * PANEL, begin), width)
                keeps[each - row] = _softmax(scores, begin, until, width, factor, cap, weights, each - row, tops, sums, each)
            _sum_values(weights, values, panel_at, width, head_dim, outs, row * head_dim, keeps)
    for row in range(rows):
        target = ((token0 + row // group) * kv_heads + head) * group + row % group
        top, summed, keep = tops[row], sums[row], _ONE
        if sinks is not None:
            top, summed, keep = with_sink(top, summed, sinks[head * group + row % group])
        seen = summed > _ZERO
        lses[target] = top * _LN2 + np.log(summed) if seen else _HIDDEN
        share = splat(keep / summed if seen else _ZERO)
        for dim in range(0, head_dim, LANES):
            store(out, target * head_dim + dim, mul(load(outs, row * head_dim + dim), share))


@compiled
def attend_many(
    threads,
    counters,
    row_begin,
    row_end,
    table,
    visible,
    query,
    query_stride,
    flat,
    block_stride,
    layer_at,
    kv_heads,
    group,
    block_tokens,
    head_dim,
    factor,
    cap,
    sinks,
    keys,
    values,
    out,
    lses,
    narrow,
    wide,
):
    """Attends from the query tokens `[row_begin, row_end)`, all of one sequence. Called by `threads` threads at once.

    counters: int64 `[COUNTERS]`, zeros before the first thread starts. table: int32 `[blocks]`. visible: int32 `[rows, 2]`, the
    range of keys that each token sees. query: rows of `q_heads * head_dim`, `query_stride` apart; flat, block_stride, layer_at: see
    `cpu_kernel.attend`; all bf16. factor: positive fp32, `scale * log2(e)`, or `scale / soft_cap` if there is a cap. cap: see
    `cpu_kernel.attend`; sinks: see `finish`. keys, values: bf16 `[kv_heads * panels * PANEL * head_dim]`, memory for the
    packed panels up to the last key. out: `[rows * q_heads * head_dim]` and lses: fp32 `[rows * q_heads]`, written here. narrow,
    wide: this thread's scratch, bf16 and fp32, see `scratch_elements`.
    """
    first, last = _seen_keys(visible, row_begin, row_end)
    panels = keys.shape[0] // (kv_heads * PANEL * head_dim)
    packed, ready, attended = counters[:8], counters[8:16], counters[16:]
    panel = first // PANEL + take(packed)
    while panel * PANEL < last:
        _pack(panel, panels, flat, table, first, last, block_stride, layer_at, kv_heads, block_tokens, head_dim, keys, values)
        panel = first // PANEL + take(packed)
    meet(ready, threads)
    # The last tokens first: they see the most keys, and the smallest pieces should come last.
    units = (row_end - row_begin + TOKENS - 1) // TOKENS * kv_heads
    unit = units - 1 - take(attended)
    while unit >= 0:
        token0 = row_begin + unit // kv_heads * TOKENS
        tokens, head = min(TOKENS, row_end - token0), unit % kv_heads
        _attend_tokens(
            token0,
            tokens,
            head,
            kv_heads,
            group,
            head_dim,
            visible,
            query,
            query_stride,
            keys,
            values,
            panels,
            factor,
            cap,
            sinks,
            out,
            lses,
            narrow,
            wide,
        )
        unit = units - 1 - take(attended)
