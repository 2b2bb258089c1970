"""The Triton kernels: split-KV paged attention, the merge of its splits, and page copies.

Owns: `attend`, `merge_splits`, `copy_pages` and their configurations. The launching code is in `attnstore.attention.triton`.
Invariant: one source runs under the interpreter and compiles for sm_80, sm_90, sm_100 and gfx942 within their limits.

Source: FlashDecoding's split of the keys over programs (Dao et al. 2023). Its grid covers packed query rows, and each program finds
its sequence by bisection, as in vLLM's unified attention kernel, so that no length is read back from the device.
"""

# mypy: disable-error-code="untyped-decorator,no-untyped-call,no-untyped-def,no-any-return"

from __future__ import annotations

from typing import Any, Final

import triton
import triton.language as tl

_CONFIGS: Final = (
    triton.Config({"BLOCK_N": 32}, num_warps=4, num_stages=2),
    triton.Config({"BLOCK_N": 64}, num_warps=4, num_stages=2),
    triton.Config({"BLOCK_N": 64}, num_warps=8, num_stages=3),
    triton.Config({"BLOCK_N": 128}, num_warps=8, num_stages=2),
)
_KEY_TILE_MAX: Final = 8192
_SCORE_TILE_MAX: Final = 4096
"""Elements of a program's tile of keys and of scores: above them, gfx942 lacks shared memory or spills registers."""


def configs_for(block_m: int, block_d: int) -> list[Any]:
    """Returns the configurations worth timing for a tile of `block_m` rows and `block_d` dimensions: those that fit
    every target.
    """
    return [
        config
        for config in _CONFIGS
        if config.kwargs["BLOCK_N"] * block_d <= _KEY_TILE_MAX and config.kwargs["BLOCK_N"] * block_m <= _SCORE_TILE_MAX
    ] or [_CONFIGS[0]]


def _fitting(_configs: Any, arguments: dict[str, Any], **constants: Any) -> list[Any]:
    known = {**arguments, **constants}
    return configs_for(known["BLOCK_M"], known["BLOCK_D"])


def _tuned(kernel: Any) -> Any:
    """Autotunes per geometry on a device. The interpreter, which has no device to time, uses the first configuration."""
    configs = list(_CONFIGS[:1] if triton.knobs.runtime.interpret else _CONFIGS)
    pruning = {"early_config_prune": _fitting} if len(configs) > 1 else None
    return triton.autotune(configs, key=["HEAD_DIM", "BLOCK_TOKENS", "GROUP", "BLOCK_M"], prune_configs_by=pruning)(kernel)


@triton.jit
def _sequence_of_tile(query_starts, seqs, tile, TILE_TOKENS: tl.constexpr):
    """Returns the sequence of query tile `tile`; sequence `s` owns tiles from `query_starts[s] // TILE_TOKENS + s` on."""
    low = 0
    high = seqs
    while low < high:
        middle = (low + high) // 2
        if tl.load(query_starts + middle) // TILE_TOKENS + middle <= tile:
            low = middle + 1
        else:
            high = middle
    return low - 1


@triton.jit
def _tanh(x):
    """To 1e-7 absolute, which is below the rounding of a cap; the series that is exact near 0 needs registers that gfx942 lacks."""
    return 1.0 - 2.0 / (tl.exp(2.0 * tl.minimum(x, 10.0)) + 1.0)


@_tuned
@triton.jit
def attend(
    query,
    pool,
    block_tables,
    context_lens,
    query_starts,
    query_positions,
    sinks,
    outs,
    lses,
    seqs,
    total_q,
    q_heads,
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

    Grid `(tiles, kv_heads, splits)`. `outs` `[splits, total_q, q_heads, HEAD_DIM]`, `lses` fp32 `[splits, total_q, q_heads]`.
    `factor` is `scale * log2(e)`, or `scale / soft_cap` if there is a cap. The first split includes the sinks.
    """
    tile, head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    splits, kv_heads = tl.num_programs(2), tl.num_programs(1)
    TILE_TOKENS: tl.constexpr = BLOCK_M // GROUP
    sequence = _sequence_of_tile(query_starts, seqs, tile, TILE_TOKENS)
    row_begin = tl.load(query_starts + sequence)
    rows = tl.load(query_starts + sequence + 1) - row_begin
    token0 = (tile - row_begin // TILE_TOKENS - sequence) * TILE_TOKENS
    if token0 >= rows:
        return
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
    share = tl.cdiv(tl.cdiv(tl.maximum(end - begin, 0), BLOCK_N), splits) * BLOCK_N
    begin += split * share
    end = tl.minimum(end, begin + share)

    dim = tl.arange(0, BLOCK_D)
    own_dim = dim < HEAD_DIM
    q_head = head * GROUP + lane % GROUP
    query_at = (row * q_heads + q_head)[:, None] * HEAD_DIM + dim[None, :]
    q = tl.load(query + query_at, mask=own[:, None] & own_dim[None, :], other=0.0).to(COMPUTE)
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    if HAS_SINKS:
        top = tl.where(split == 0, tl.load(sinks + q_head) * 1.4426950408889634, top)
        total = tl.where(split == 0, 1.0, total)
    out = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    key_at = layer_at + head * (BLOCK_TOKENS * HEAD_DIM)
    value_at = key_at + kv_heads * (BLOCK_TOKENS * HEAD_DIM)
    for at in range(begin, end, BLOCK_N):
        key = at + tl.arange(0, BLOCK_N)
        there = key < end
        block = tl.load(block_tables + sequence * max_blocks + key // BLOCK_TOKENS, mask=there, other=0).to(tl.int64)
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
        out = out * keep[:, None]
        out = tl.dot(weights.to(COMPUTE), v.to(COMPUTE), out, input_precision="ieee")
    out = out / tl.where(total > 0, total, 1.0)[:, None]
    lse = tl.where(total > 0, (top + tl.log2(tl.where(total > 0, total, 1.0))) * 0.6931471805599453, float("-inf"))
    state = (split * total_q + row) * q_heads + q_head
    tl.store(lses + state, lse, mask=own)
    out_at = outs + state.to(tl.int64)[:, None] * HEAD_DIM + dim[None, :]
    tl.store(out_at, out.to(outs.dtype.element_ty), mask=own[:, None] & own_dim[None, :])


@triton.jit
def merge_splits(
    outs,
    lses,
    out,
    lse,
    states,
    splits,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One program merges one (row, head): `outs` fp32 `[splits, states, HEAD_DIM]`, `lses` fp32 `[splits, states]`."""
    state = tl.program_id(0).to(tl.int64)
    dim = tl.arange(0, BLOCK_D)
    top = float("-inf")
    for split in range(splits):
        top = tl.maximum(top, tl.load(lses + split * states + state))
    anchor = tl.where(top == float("-inf"), 0.0, top)
    total = 0.0
    merged = tl.zeros([BLOCK_D], tl.float32)
    for split in range(splits):
        part = split * states + state
        weight = tl.exp(tl.load(lses + part) - anchor)
        total += weight
        merged += weight * tl.load(outs + part * HEAD_DIM + dim, mask=dim < HEAD_DIM, other=0.0)
    seen = total > 0
    safe = tl.where(seen, total, 1.0)
    tl.store(out + state * HEAD_DIM + dim, (merged / safe).to(out.dtype.element_ty), mask=dim < HEAD_DIM)
    tl.store(lse + state, tl.where(seen, anchor + tl.log(safe), float("-inf")))


@triton.jit
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
