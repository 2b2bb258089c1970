"""The Triton kernels: split-KV paged attention, the merges of its splits and of partials from elsewhere, and page copies.

Owns: `attend`, `merge_splits`, `merge_partials`, `copy_pages`, `copy_runs` and their configurations. The launching code is in
`attnstore.attention.triton`, the sharing of the work in `triton_plan`.
Invariants: one source runs under the interpreter and compiles for sm_80, sm_90, sm_100 and gfx942 within their limits; no count or
length is part of a kernel's specialisation, so a kernel is compiled once for a model.
"""

# mypy: disable-error-code="untyped-decorator,no-untyped-call,no-untyped-def,no-any-return"

from __future__ import annotations

from typing import Final, NamedTuple

import triton
import triton.language as tl

from attnstore.attention.triton_plan import locate, split_keys

DECODE_ROWS: Final = 16
"""Rows (query tokens times GQA group) of a tile for sequences with few rows: the fewest that tensor cores take."""

PREFILL_ROWS_MAX: Final = 128
"""Rows of a tile for sequences with many rows. A tile reads all keys that it sees, so fewer rows read them more often."""

_PREFILL_TILE: Final = 1 << 14
_WARP_TILE: Final = 1 << 10
_WARPS_MIN, _WARPS_MAX = 4, 8
_KEY_TILE_BYTES: Final = 16 << 10
_KEYS_MIN, _KEYS_MAX = 16, 64
_STAGES: Final = 2
_COUNTS = ["seqs", "programs", "max_blocks", "sliding_window"]
_TABLES = ["block_tables", "context_lens", "query_starts", "query_positions"]


class Configuration(NamedTuple):
    """How `attend` is compiled. `keys`: the keys of one iteration."""

    keys: int
    warps: int
    stages: int


def tile_rows(block_d: int, *, decode: bool) -> int:
    """Returns the rows of a tile of `block_d` dimensions."""
    return DECODE_ROWS if decode else min(PREFILL_ROWS_MAX, _PREFILL_TILE // block_d)


def configuration(block_m: int, block_d: int, element_bytes: int) -> Configuration:
    """Returns the configuration for a tile of `block_m` rows and `block_d` dimensions, by reasoning: a search would have to run on
    the device beforehand, for a step that is captured and for each length.

    Keys and values of 16 KiB each, in two stages, fit the 64 KiB of gfx942. A warp has 1,024 to 2,048 elements of the result, which
    leaves registers for the scores. For a decode step at 128 dimensions in 16 bits, registers let four programs run on one
    multiprocessor of sm_90, with about 128 KiB of loads in flight; about 25 KiB hide a latency of 700 ns at 4.8 TB/s.
    """
    keys = min(max(_KEY_TILE_BYTES // (block_d * element_bytes), _KEYS_MIN), _KEYS_MAX)
    warps = min(max(block_m * block_d // _WARP_TILE, _WARPS_MIN), _WARPS_MAX)
    return Configuration(keys, warps, _STAGES)


@triton.jit
def _tanh(x):
    """To 1e-7 absolute, which is below the rounding of a cap; the series that is exact near 0 needs registers that gfx942 lacks."""
    return 1.0 - 2.0 / (tl.exp(2.0 * tl.minimum(x, 10.0)) + 1.0)


@triton.jit(do_not_specialize=_COUNTS, do_not_specialize_on_alignment=_TABLES)
def attend(
    query,
    pool,
    block_tables,
    context_lens,
    query_starts,
    query_positions,
    sinks,
    out,
    lse,
    partial_outs,
    partial_lses,
    seqs,
    programs,
    max_blocks,
    block_stride,
    layer_at,
    factor,
    cap_log2e,
    sliding_window,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    HAS_POSITIONS: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_CAP: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    COMPUTE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One program attends from a tile of query tokens, with one KV head's group of query heads, to one split of the visible keys.

    Grid `(Grid.items, kv_heads)`; programs without an item return. A sequence that is not split has its results in `out` and `lse`,
    the others in `partial_outs` fp32 `[Grid.partials, kv_heads, BLOCK_M, HEAD_DIM]` and `partial_lses` fp32 without HEAD_DIM.
    `factor` is `scale * log2(e)`, or `scale / soft_cap` if there is a cap. The first split includes the sinks.
    """
    head, kv_heads = tl.program_id(1), tl.num_programs(1)
    TILE_TOKENS: tl.constexpr = BLOCK_M // GROUP
    share = split_keys(context_lens, query_starts, seqs, programs, sliding_window, TILE_TOKENS, HAS_WINDOW)
    sequence, item, splits, partial = locate(
        tl.program_id(0), share, context_lens, query_starts, seqs, sliding_window, TILE_TOKENS, HAS_WINDOW, False
    )
    if sequence < 0:
        return
    token0 = item // splits * TILE_TOKENS
    split = item % splits
    row_begin = tl.load(query_starts + sequence)
    rows = tl.load(query_starts + sequence + 1) - row_begin
    keys = tl.load(context_lens + sequence)

    lane = tl.arange(0, BLOCK_M)
    token = token0 + lane // GROUP
    own = (lane < TILE_TOKENS * GROUP) & (token < rows)
    row = row_begin + token
    position = keys - rows + token
    if HAS_POSITIONS:
        position = tl.load(query_positions + row, mask=own, other=0)
    last = tl.where(own, tl.minimum(tl.maximum(position + 1, 0), keys), 0)
    first = tl.zeros_like(last)
    if HAS_WINDOW:
        first = tl.maximum(position + 1 - sliding_window, 0)
    seeing = own & (first < last)
    begin = tl.min(tl.where(seeing, first, keys))
    end = tl.max(tl.where(seeing, last, 0))
    length = tl.cdiv(tl.cdiv(tl.maximum(end - begin, 0), BLOCK_N), splits) * BLOCK_N
    begin += split * length
    end = tl.minimum(end, begin + length)

    dim = tl.arange(0, BLOCK_D)
    own_dim = dim < HEAD_DIM
    q_head = head * GROUP + lane % GROUP
    query_at = (row * (kv_heads * GROUP) + q_head).to(tl.int64)[:, None] * HEAD_DIM + dim[None, :]
    q = tl.load(query + query_at, mask=own[:, None] & own_dim[None, :], other=0.0).to(COMPUTE)
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    if HAS_SINKS:
        top = tl.where(split == 0, tl.load(sinks + q_head) * 1.4426950408889634, top)
        total = tl.where(split == 0, 1.0, total)
    summed = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    table = block_tables + sequence.to(tl.int64) * max_blocks
    key_at = layer_at + head * (BLOCK_TOKENS * HEAD_DIM)
    value_at = key_at + kv_heads * (BLOCK_TOKENS * HEAD_DIM)
    for at in range(begin, end, BLOCK_N):
        key = at + tl.arange(0, BLOCK_N)
        there = key < end
        block = tl.load(table + key // BLOCK_TOKENS, mask=there, other=0).to(tl.int64)
        start = block * block_stride + (key % BLOCK_TOKENS) * HEAD_DIM
        k = tl.load(pool + key_at + start[None, :] + dim[:, None], mask=there[None, :] & own_dim[:, None], other=0.0)
        scores = tl.dot(q, k.to(COMPUTE), input_precision="ieee") * factor
        if HAS_CAP:
            scores = _tanh(scores) * cap_log2e
        visible = (key[None, :] >= first[:, None]) & (key[None, :] < last[:, None]) & there[None, :]
        scores = tl.where(visible, scores, float("-inf"))
        higher = tl.maximum(top, tl.max(scores, 1))
        anchor = tl.where(higher == float("-inf"), 0.0, higher)
        weights = tl.exp2(scores - anchor[:, None])
        keep = tl.exp2(top - anchor)
        total = total * keep + tl.sum(weights, 1)
        top = higher
        v = tl.load(pool + value_at + start[:, None] + dim[None, :], mask=there[:, None] & own_dim[None, :], other=0.0)
        summed = summed * keep[:, None]
        summed = tl.dot(weights.to(COMPUTE), v.to(COMPUTE), summed, input_precision="ieee")
    summed = summed / tl.where(total > 0, total, 1.0)[:, None]
    logarithm = tl.where(total > 0, (top + tl.log2(tl.where(total > 0, total, 1.0))) * 0.6931471805599453, float("-inf"))
    whole = splits == 1
    state = (row * (kv_heads * GROUP) + q_head).to(tl.int64)
    tl.store(lse + state, logarithm, mask=own & whole)
    out_at = out + state[:, None] * HEAD_DIM + dim[None, :]
    tl.store(out_at, summed.to(out.dtype.element_ty), mask=(own & whole)[:, None] & own_dim[None, :])
    state = ((partial + item).to(tl.int64) * kv_heads + head) * BLOCK_M + lane
    tl.store(partial_lses + state, logarithm, mask=own & (splits > 1))
    partial_at = partial_outs + state[:, None] * HEAD_DIM + dim[None, :]
    tl.store(partial_at, summed, mask=(own & (splits > 1))[:, None] & own_dim[None, :])


@triton.jit(do_not_specialize=_COUNTS, do_not_specialize_on_alignment=_TABLES)
def merge_splits(
    context_lens,
    query_starts,
    out,
    lse,
    partial_outs,
    partial_lses,
    seqs,
    programs,
    sliding_window,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PARTS: tl.constexpr,
):
    """One program merges the splits of one tile and query head, `PARTS` at once. Grid `(Grid.split_tiles, q_heads)`.

    The arguments are those of `attend`, which has written the partials.
    """
    TILE_TOKENS: tl.constexpr = BLOCK_M // GROUP
    q_head, q_heads = tl.program_id(1), tl.num_programs(1)
    share = split_keys(context_lens, query_starts, seqs, programs, sliding_window, TILE_TOKENS, HAS_WINDOW)
    sequence, tile, splits, partial = locate(
        tl.program_id(0), share, context_lens, query_starts, seqs, sliding_window, TILE_TOKENS, HAS_WINDOW, True
    )
    if sequence < 0:
        return
    first = (partial + tile * splits).to(tl.int64)
    row_begin = tl.load(query_starts + sequence) + tile * TILE_TOKENS
    tokens = tl.minimum(tl.load(query_starts + sequence + 1) - row_begin, TILE_TOKENS)
    row0 = row_begin.to(tl.int64)
    dim = tl.arange(0, BLOCK_D)
    own_dim = dim < HEAD_DIM
    for token in range(0, tokens):
        lane = token * GROUP + q_head % GROUP
        top = float("-inf")
        total = 0.0
        merged = tl.zeros([BLOCK_D], tl.float32)
        for at in range(0, splits, PARTS):
            part = at + tl.arange(0, PARTS)
            state = ((first + part) * (q_heads // GROUP) + q_head // GROUP) * BLOCK_M + lane
            logarithms = tl.load(partial_lses + state, mask=part < splits, other=float("-inf"))
            higher = tl.maximum(top, tl.max(logarithms, 0))
            anchor = tl.where(higher == float("-inf"), 0.0, higher)
            weights = tl.exp(logarithms - anchor)
            keep = tl.exp(top - anchor)
            there = (weights > 0)[:, None] & own_dim[None, :]
            outs = tl.load(partial_outs + state[:, None] * HEAD_DIM + dim[None, :], mask=there, other=0.0)
            merged = merged * keep + tl.sum(weights[:, None] * outs, 0)
            total = total * keep + tl.sum(weights, 0)
            top = higher
        safe = tl.where(total > 0, total, 1.0)
        state = (row0 + token) * q_heads + q_head
        tl.store(out + state * HEAD_DIM + dim, (merged / safe).to(out.dtype.element_ty), mask=own_dim)
        tl.store(lse + state, tl.where(total > 0, top + tl.log(safe), float("-inf")))


@triton.jit(do_not_specialize=["parts"], do_not_specialize_on_alignment=["row_ids"])
def merge_partials(
    out,
    lse,
    partial_outs,
    partial_lses,
    row_ids,
    parts,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One program merges the partials of one row and head into `out` and `lse`, in place. Grid `(rows, heads)`.

    partial_outs: fp32 `[parts, rows, heads, HEAD_DIM]`; partial_lses: fp32 without HEAD_DIM. Row `i` of the partials belongs to row
    `row_ids[i]` of `out`, or to none if that is negative. Parts whose weight is 0 are not read.
    """
    row, head, heads = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    states = tl.num_programs(0).to(tl.int64) * heads
    target = row
    if row_ids is not None:
        target = tl.load(row_ids + row).to(tl.int64)
        if target < 0:
            return
    state = target * heads + head
    dim = tl.arange(0, BLOCK_D)
    own_dim = dim < HEAD_DIM
    top = tl.load(lse + state)
    total = tl.where(top == float("-inf"), 0.0, 1.0)
    there = tl.where(own_dim, total, 0.0) > 0  # the interpreter has no scalar of type bool
    merged = tl.load(out + state * HEAD_DIM + dim, mask=there, other=0.0).to(tl.float32)
    for part in range(parts):
        partial = part * states + row * heads + head
        logarithm = tl.load(partial_lses + partial)
        higher = tl.maximum(top, logarithm)
        anchor = tl.where(higher == float("-inf"), 0.0, higher)
        weight, keep = tl.exp(logarithm - anchor), tl.exp(top - anchor)
        there = tl.where(own_dim, weight, 0.0) > 0
        merged = merged * keep + weight * tl.load(partial_outs + partial * HEAD_DIM + dim, mask=there, other=0.0)
        total = total * keep + weight
        top = higher
    safe = tl.where(total > 0, total, 1.0)
    tl.store(out + state * HEAD_DIM + dim, (merged / safe).to(out.dtype.element_ty), mask=own_dim)
    tl.store(lse + state, tl.where(total > 0, top + tl.log(safe), float("-inf")))


@triton.jit(do_not_specialize_on_alignment=["source_ids", "target_ids"])
def copy_pages(
    source,
    target,
    source_ids,
    target_ids,
    source_stride,
    target_stride,
    words,
    BLOCK: tl.constexpr,
):
    """Copies pages of `words` elements. Grid `(pages, cdiv(words, BLOCK))`. A side without ids has its pages in order."""
    page = tl.program_id(0)
    source_page = page.to(tl.int64) if source_ids is None else tl.load(source_ids + page).to(tl.int64)
    target_page = page.to(tl.int64) if target_ids is None else tl.load(target_ids + page).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = at < words
    tl.store(target + target_page * target_stride + at, tl.load(source + source_page * source_stride + at, mask=mask), mask=mask)


@triton.jit(do_not_specialize_on_alignment=["block_ids"])
def copy_runs(
    cache,
    pages,
    block_ids,
    runs,
    page_words,
    run_words,
    INTO_PAGES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Copies between blocks that lie in runs of `run_words` elements and packed pages. Grid `(pages, cdiv(page_words, BLOCK))`.

    `runs` is `[runs, 2]`: where a run begins in block 0, relative to `cache`, and how far apart it lies in neighbouring blocks.
    """
    page = tl.program_id(0)
    block = tl.load(block_ids + page).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = at < page_words
    run = at // run_words
    begin = tl.load(runs + 2 * run, mask=mask, other=0) + block * tl.load(runs + 2 * run + 1, mask=mask, other=0)
    in_cache = cache + begin + at % run_words
    in_pages = pages + page.to(tl.int64) * page_words + at
    if INTO_PAGES:
        tl.store(in_pages, tl.load(in_cache, mask=mask), mask=mask)
    else:
        tl.store(in_cache, tl.load(in_pages, mask=mask), mask=mask)
