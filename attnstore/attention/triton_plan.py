"""How the kernels of paged attention share the work of a step: arithmetic that each program does by itself, on the device.

Owns: `split_keys` and `locate`, called by the kernels, and `Grid`, the bounds that the host knows. Invariant: the host reads no
length, and a grid depends on shapes only. A CUDA graph therefore replays with other sequences in the same tensors.

A tile is a few query rows of one sequence. If a sequence has more keys than a program's share of all keys, several programs attend
to it for each tile and KV head, one for each split of the keys; other sequences are not split. One long context in a batch thus
occupies the whole device. Sources: the split keys of FlashDecoding (Dao et al. 2023); the plan of FlashInfer (Ye et al. 2025),
which the host computes there; the equal shares of Stream-K (Osama et al. 2023).
"""

# mypy: disable-error-code="untyped-decorator,no-untyped-call,no-untyped-def,no-any-return"

from __future__ import annotations

from typing import Final, NamedTuple

import triton
import triton.language as tl

SPLIT_KEYS_MIN: Final = tl.constexpr(256)
"""A split shorter than this costs more to merge than it gains."""

_SEQUENCES: Final = tl.constexpr(128)
"""Sequences that a program counts at once."""


class Grid(NamedTuple):
    """Upper bounds for a step, whatever its lengths.

    `items` bounds the pairs of tile and split, `partials` those of them that belong to split sequences, `split_tiles` the tiles of
    split sequences. All are for one KV head.
    """

    items: int
    partials: int
    split_tiles: int

    @classmethod
    def of(cls, *, total_q: int, seqs: int, keys_max: int, tile_tokens: int, programs: int) -> Grid:
        """Returns the bounds. programs: how many items are to share the keys of a step, for one KV head."""
        tiles = (total_q + min(seqs, total_q) * (tile_tokens - 1)) // tile_tokens
        splits_max = max(1, (keys_max + SPLIT_KEYS_MIN.value // 2) // SPLIT_KEYS_MIN.value)
        if splits_max == 1:
            return cls(tiles, 0, 0)
        # A tile is split if its keys are 1.5 shares or more; rounding then adds at most a third to its splits. All tiles together
        # have at most `programs` shares.
        split_tiles = min(tiles, programs * 2 // 3)
        return cls(min(tiles + programs, tiles * splits_max), min(programs * 4 // 3, split_tiles * splits_max), split_tiles)


@triton.jit
def _tiles_and_keys(context_lens, query_starts, at, seqs, sliding_window, TILE_TOKENS: tl.constexpr, HAS_WINDOW: tl.constexpr):
    """Returns the number of tiles of each of the sequences from `at` on, and the keys that one tile sees."""
    sequence = at + tl.arange(0, _SEQUENCES)
    there = sequence < seqs
    begin = tl.load(query_starts + sequence, mask=there, other=0)
    rows = tl.load(query_starts + sequence + 1, mask=there, other=0) - begin
    keys = tl.load(context_lens + sequence, mask=there, other=0)
    if HAS_WINDOW:
        keys = tl.minimum(keys - TILE_TOKENS, sliding_window) + TILE_TOKENS
    return tl.cdiv(rows, TILE_TOKENS), keys


@triton.jit
def split_keys(context_lens, query_starts, seqs, programs, sliding_window, TILE_TOKENS: tl.constexpr, HAS_WINDOW: tl.constexpr):
    """Returns the keys of a split, int64: the keys of all tiles, shared by `programs`."""
    total = tl.zeros([_SEQUENCES], tl.int64)
    for at in range(0, seqs, _SEQUENCES):
        tiles, keys = _tiles_and_keys(context_lens, query_starts, at, seqs, sliding_window, TILE_TOKENS, HAS_WINDOW)
        total += tiles.to(tl.int64) * keys
    return tl.maximum(tl.cdiv(tl.sum(total, 0), programs), SPLIT_KEYS_MIN)


@triton.jit
def locate(
    number,
    share,
    context_lens,
    query_starts,
    seqs,
    sliding_window,
    TILE_TOKENS: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    SPLIT_TILES: tl.constexpr,
):
    """Finds item `number` of the step, or tile `number` of the split sequences if SPLIT_TILES. `share` is that of `split_keys`.

    Returns the sequence, -1 if there is no such item; the number within the sequence; the splits of each tile of the sequence; and
    the index of the sequence's first partial.
    """
    before = 0
    partials_before = 0
    sequence = -1
    place = 0
    splits = 1
    partial = 0
    for at in range(0, seqs, _SEQUENCES):
        tiles, keys = _tiles_and_keys(context_lens, query_starts, at, seqs, sliding_window, TILE_TOKENS, HAS_WINDOW)
        ways = tl.maximum((keys + share // 2) // share, 1).to(tl.int32)
        partials = tl.where(ways > 1, tiles * ways, 0)
        counted = tl.where(ways > 1, tiles, 0) if SPLIT_TILES else tiles * ways
        ends = before + tl.cumsum(counted, 0)
        starts = ends - counted
        own = (starts <= number) & (number < ends)
        sequence += tl.sum(tl.where(own, at + tl.arange(0, _SEQUENCES) + 1, 0), 0)
        place += tl.sum(tl.where(own, number - starts, 0), 0)
        splits += tl.sum(tl.where(own, ways - 1, 0), 0)
        partial += tl.sum(tl.where(own, partials_before + tl.cumsum(partials, 0) - partials, 0), 0)
        before += tl.sum(counted, 0)
        partials_before += tl.sum(partials, 0)
    return sequence, place, splits, partial
