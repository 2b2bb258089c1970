"""Division of one step's batch into work for the CPU: pure index arithmetic, done once per step and reused by every layer.

Owns: `Plan` and `make_plan`.
Invariant: every query row belongs to exactly one prefill or one decode sequence; the pieces of a decode sequence partition the
blocks that its rows see; shares partition the pieces.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Indices = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Prefill:
    """Query rows `[row_begin, row_end)` of one sequence and the blocks `[block_begin, block_end)` that any of them sees."""

    sequence: int
    row_begin: int
    row_end: int
    block_begin: int
    block_end: int


@dataclass(frozen=True, slots=True)
class Plan:
    """The work of one batch. Row numbers refer to the packed query. State rows are numbered separately: first those of the decode
    rows, then those of pieces that continue a sequence.
    """

    visible: npt.NDArray[np.int32]
    """`[total_q, 2]`: the keys `[first, last)` that each row sees; `[0, 0)` for a row that sees none."""

    prefills: tuple[Prefill, ...]
    """Sequences with many rows, which are gathered and passed to flash attention."""

    shares: tuple[Indices, ...]
    """One array of pieces per thread, as `cpu_kernel.attend` takes them."""

    pieces: Indices
    """The pieces of all shares together."""

    owners: Indices
    """For each piece, the state row of its sequence's first piece."""

    decode_rows: Tensor
    """int64: the query row of each state row that belongs to a first piece."""

    state_rows: int
    piece_rows_max: int


def make_plan(
    context_lens: Tensor,
    query_starts: Tensor,
    query_positions: Tensor | None,
    sliding_window: int | None,
    *,
    block_tokens: int,
    decode_rows_max: int,
    block_bytes: int,
    share_bytes_min: int,
    threads: int,
) -> Plan:
    """Plans a batch: sequences with up to `decode_rows_max` query rows use the decode kernel, the others are prefills.

    The decode work is divided by blocks into at most `threads` shares of at least `share_bytes_min`, counting `block_bytes` per
    block of one layer; a sequence may be divided between two shares.
    """
    visible = _visible_keys(context_lens, query_starts, query_positions, sliding_window)
    starts = query_starts.numpy()
    prefills: list[Prefill] = []
    sequences: list[tuple[int, int, int, int, int]] = []
    for sequence in range(len(starts) - 1):
        begin, end = int(starts[sequence]), int(starts[sequence + 1])
        if end - begin > decode_rows_max:
            prefills.append(Prefill(sequence, begin, end, *_seen_blocks(visible[begin:end], block_tokens)))
        elif end > begin:
            sequences.append((sequence, begin, end - begin, *_seen_blocks(visible[begin:end], block_tokens)))
    blocks = sum(last - first for *_, first, last in sequences)
    shares_wanted = max(1, min(threads, blocks * block_bytes // share_bytes_min))
    shares, owners, state_rows = _cut(sequences, blocks, shares_wanted)
    rows = [np.arange(begin, begin + rows) for _, begin, rows, _, _ in sequences]
    return Plan(
        visible=visible,
        prefills=tuple(prefills),
        shares=shares,
        pieces=np.concatenate(shares),
        owners=owners,
        decode_rows=torch.from_numpy(np.concatenate(rows)) if rows else torch.empty(0, dtype=torch.int64),
        state_rows=state_rows,
        piece_rows_max=max((rows for _, _, rows, _, _ in sequences), default=0),
    )


def _visible_keys(
    context_lens: Tensor, query_starts: Tensor, query_positions: Tensor | None, sliding_window: int | None
) -> npt.NDArray[np.int32]:
    lengths, starts = context_lens.numpy(), query_starts.numpy()
    keys = np.repeat(lengths, np.diff(starts))
    if query_positions is None:  # as `row_positions`, but numpy wakes no threads for it
        positions = keys + np.arange(len(keys)) - np.repeat(starts[1:], np.diff(starts))
    else:
        positions = query_positions.numpy()
    last = np.clip(positions + 1, 0, keys)
    first = np.zeros_like(last) if sliding_window is None else np.clip(positions + 1 - sliding_window, 0, last)
    visible = np.ascontiguousarray(np.stack((first, last), axis=1), dtype=np.int32)
    visible[first >= last] = 0
    return visible


def _seen_blocks(visible: npt.NDArray[Any], block_tokens: int) -> tuple[int, int]:
    """Returns the blocks `[first, end)` that at least one of these rows sees, or `(0, 0)` if no row sees a key."""
    seen = visible[visible[:, 0] < visible[:, 1]]
    if len(seen) == 0:
        return 0, 0
    return int(seen[:, 0].min()) // block_tokens, -(-int(seen[:, 1].max()) // block_tokens)


def _cut(
    sequences: list[tuple[int, int, int, int, int]], blocks: int, shares_wanted: int
) -> tuple[tuple[Indices, ...], Indices, int]:
    """Returns the pieces of each share, the owner of each piece, and the number of state rows."""
    share_blocks = max(1, -(-blocks // shares_wanted))
    shares: list[list[tuple[int, ...]]] = [[]]
    owners: list[int] = []
    owner = 0
    state = sum(rows for _, _, rows, _, _ in sequences)
    room = share_blocks
    for sequence, begin, rows, first, last in sequences:
        target = owner
        while True:
            if room == 0 and first < last:
                shares.append([])
                room = share_blocks
            end = min(last, first + room)
            shares[-1].append((sequence, begin, rows, first, end, target))
            owners.append(owner)
            room -= end - first
            first = end
            if first == last:
                break
            target, state = state, state + rows
        owner += rows
    arrays = tuple(np.array(share, dtype=np.int64).reshape(-1, 6) for share in shares)
    return arrays, np.array(owners, dtype=np.int64), state
