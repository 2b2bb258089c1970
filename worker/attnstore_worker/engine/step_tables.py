"""The inputs of steps in the memory of a device, which each step changes only where they differ from the last one.

Owns: `StepTables`. Invariants: a step is one transfer of pinned memory, however many sequences it has; that memory is not filled
again before its transfer has read it; the tensors of a step are the same memory in every step, so a captured step reads the next
one's inputs. After a step that failed, all block tables are sent again, because it is unknown which entries have arrived.

A sequence keeps one row of the block tables while it runs, and its new blocks alone are sent. Rows of a step are in the order of
these rows of the tables. A row that no chunk uses is empty, or has one row of padding in a step of `decode_rows` rows: it stores
nothing and sees no key. Shape: the persistent batch of vLLM's model runner.
"""

from __future__ import annotations

from collections.abc import Sequence as Items
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Final, NamedTuple

import numpy as np
import torch
from torch import Tensor

from attnstore_worker.cache.pool.block_table import BlockTable
from attnstore_worker.device.base import Device, Event, Wait
from attnstore_worker.engine.sequence import Chunk, Sequence

NO_SLOT: Final = -1
"""In place of a block: the row stores no key and no value."""
_SETS: Final = 2
"""Pinned sets, so that one is filled while the device reads the other."""
_CHANGES: Final = 4096
"""Entries of block tables that one transfer brings; more need more transfers."""
_ALIGNED_BYTES: Final = 16


class Inputs(NamedTuple):
    """The tensors of one step, on the device. `rows` are those whose logits are asked for; the next four describe how they are
    drawn from: fp64 temperatures and `top_p`, int64 `top_k`, seeds and positions of the drawn tokens, `[len(rows)]` each.
    """

    token_ids: Tensor
    positions: Tensor
    slot_blocks: Tensor
    slot_offsets: Tensor
    block_tables: Tensor
    context_lens: Tensor
    query_starts: Tensor
    rows: Tensor
    temperatures: Tensor
    top_ps: Tensor
    top_ks: Tensor
    seeds: Tensor
    drawn_at: Tensor


@dataclass(frozen=True, slots=True)
class Sizes:
    """What a step has at most: `tokens` of `sequences`, each with `blocks` blocks."""

    tokens: int
    sequences: int
    blocks: int


_Field = tuple[str, torch.dtype, int]


class StepTables:
    """Tables on `device`; the block tables of all sequences stay there."""

    def __init__(self, device: Device, sizes: Sizes) -> None:
        self.sizes = sizes
        self._device = device
        tokens, sequences = sizes.tokens, sizes.sequences
        names = ("token_ids", "positions", "slot_blocks", "slot_offsets", "rows", "top_ks", "seeds", "drawn_at")
        fields: list[_Field] = [(name, torch.int64, tokens) for name in names]
        fields += [("change_at", torch.int64, _CHANGES)]
        fields += [(name, torch.float64, tokens) for name in ("temperatures", "top_ps")]
        fields += [("context_lens", torch.int32, sequences), ("query_starts", torch.int32, sequences + 1)]
        fields += [("change_to", torch.int32, _CHANGES)]
        size_bytes = _size_bytes(fields)
        self._inputs = torch.zeros(size_bytes, dtype=torch.uint8, device=device.torch_device)
        self._on_device = _views(self._inputs, fields)
        # One entry more than the tables have, to which the unused changes of a transfer go.
        self._flat_tables = torch.zeros(sequences * sizes.blocks + 1, dtype=torch.int32, device=device.torch_device)
        self._block_tables = self._flat_tables[:-1].view(sequences, sizes.blocks)
        self._sets = [device.pinned(size_bytes, dtype=torch.uint8) for _ in range(_SETS)]
        self._filled: list[dict[str, Any]] = [
            {name: view.numpy() for name, view in _views(each, fields).items()} for each in self._sets
        ]
        self._sent: list[Event | None] = [None] * _SETS
        self._next = 0
        self._row_of: dict[Sequence, int] = {}
        self._known: list[list[int]] = [[] for _ in range(sequences)]

    def decode_rows(self, chunks: Items[Chunk]) -> int:
        """Returns how many rows of the tables a step of these chunks spans: one more than the last that it uses."""
        self._place(chunks)
        return 1 + max(self._row_of[chunk.sequence] for chunk in chunks)

    def ordered(self, chunks: Items[Chunk]) -> list[Chunk]:
        """Returns the chunks in the order of the rows of their step."""
        self._place(chunks)
        return sorted(chunks, key=lambda chunk: self._row_of[chunk.sequence])

    def padding(self, decode_rows: int) -> Inputs:
        """Submits the inputs of a decode step that is all padding, and returns them. It asks for the logits of every row."""
        host, at = self._free_set()
        self._pad(host, decode_rows)
        host["rows"][:decode_rows] = 0
        host["context_lens"][:decode_rows] = 0
        host["query_starts"][: decode_rows + 1] = np.arange(decode_rows + 1)
        self._fill_changes(host, [])
        self._submit(at)
        return self._inputs_of(decode_rows, decode_rows, decode_rows)

    def fill(self, chunks: Items[Chunk], decode_rows: int | None = None) -> Inputs:
        """Submits the inputs of a step, and returns them. With `decode_rows`, at least `decode_rows(chunks)`, each chunk has one
        token, and there is one row of the step for each of so many rows of the tables.
        """
        try:
            return self._fill(self.ordered(chunks), chunks, decode_rows)
        except BaseException:
            self._known = [[] for _ in self._known]
            raise

    def forget(self, sequence: Sequence) -> None:
        """Gives up the row of a sequence."""
        self._row_of.pop(sequence, None)

    def _fill(self, ordered: Items[Chunk], chunks: Items[Chunk], decode_rows: int | None) -> Inputs:
        changes = [change for chunk in ordered for change in self._changed(chunk)]
        while len(changes) > _CHANGES:
            self._send(changes[:_CHANGES])
            del changes[:_CHANGES]
        host, at = self._free_set()
        spans = self._spans(ordered, decode_rows)
        starts = [0, *accumulate(spans)]
        sequences = len(spans)
        tokens = starts[-1]
        assert tokens <= self.sizes.tokens
        host["query_starts"][: sequences + 1] = starts
        host["context_lens"][:sequences] = 0
        if decode_rows is not None:  # what no chunk overwrites is padding
            self._pad(host, decode_rows)
        for chunk in ordered:
            row, table = self._row_of[chunk.sequence], _table(chunk)
            end = chunk.end + len(chunk.drafts)
            part = slice(starts[row], starts[row + 1])
            host["token_ids"][part] = chunk.token_ids()
            host["positions"][part] = np.arange(chunk.begin, end)
            host["slot_blocks"][part], host["slot_offsets"][part] = table.slot_mapping(chunk.begin, end)
            host["context_lens"][row] = end - table.remote_tokens
        rows = self._fill_rows(host, chunks, starts)
        if decode_rows is not None:  # a captured step computes so many rows of logits
            host["rows"][rows:decode_rows] = 0
        self._fill_changes(host, changes)
        self._submit(at)
        return self._inputs_of(tokens, sequences, rows)

    def _inputs_of(self, tokens: int, sequences: int, rows: int) -> Inputs:
        there = self._on_device
        return Inputs._make(
            [
                *(there[name][:tokens] for name in ("token_ids", "positions", "slot_blocks", "slot_offsets")),
                self._block_tables[:sequences],
                there["context_lens"][:sequences],
                there["query_starts"][: sequences + 1],
                *(there[name][:rows] for name in ("rows", "temperatures", "top_ps", "top_ks", "seeds", "drawn_at")),
            ]
        )

    def _place(self, chunks: Items[Chunk]) -> None:
        """Gives each sequence of a step a row: the first that no running sequence has."""
        wanted = [chunk.sequence for chunk in chunks if chunk.sequence not in self._row_of]
        if not wanted:
            return
        own = {chunk.sequence for chunk in chunks}
        self._row_of = {each: row for each, row in self._row_of.items() if each in own or each.table is not None}
        if len(self._row_of) + len(wanted) > self.sizes.sequences:  # those of other steps get theirs again
            self._row_of = {each: row for each, row in self._row_of.items() if each in own}
        taken = set(self._row_of.values())
        free = (row for row in range(self.sizes.sequences) if row not in taken)
        self._row_of.update(zip(wanted, free, strict=False))
        assert all(sequence in self._row_of for sequence in wanted)

    def _changed(self, chunk: Chunk) -> list[tuple[int, int]]:
        """Returns the entries of a sequence's table that the device does not have, as (index, block), and counts them as sent."""
        row, wanted = self._row_of[chunk.sequence], _table(chunk).block_ids
        known = self._known[row]
        same = len(known) if wanted[: len(known)] == known else 0
        first = row * self.sizes.blocks
        self._known[row] = list(wanted)
        return [(first + column, wanted[column]) for column in range(same, len(wanted))]

    def _spans(self, ordered: Items[Chunk], decode_rows: int | None) -> list[int]:
        """Returns the rows of the step that belong to each row of the tables."""
        if decode_rows is not None:
            return [1] * decode_rows
        spans = [0] * (1 + self._row_of[ordered[-1].sequence])
        for chunk in ordered:
            spans[self._row_of[chunk.sequence]] = chunk.tokens
        return spans

    @staticmethod
    def _pad(host: dict[str, Any], rows: int) -> None:
        for name in ("token_ids", "positions", "slot_offsets"):
            host[name][:rows] = 0
        host["slot_blocks"][:rows] = NO_SLOT

    def _fill_rows(self, host: dict[str, Any], chunks: Items[Chunk], starts: Items[int]) -> int:
        """Fills the rows whose logits are asked for, in the order of `chunks`, and how they are drawn from."""
        count = 0
        for chunk in chunks:
            if not chunk.gives_token:
                continue
            drafts, sampling = len(chunk.drafts), chunk.sequence.sampling
            end = starts[self._row_of[chunk.sequence] + 1]
            part = slice(count, count + drafts + 1)
            count = part.stop
            host["rows"][part] = np.arange(end - 1 - drafts, end)
            host["temperatures"][part] = sampling.temperature
            host["top_ps"][part] = sampling.top_p
            host["top_ks"][part] = sampling.top_k or 0
            host["seeds"][part] = sampling.seed
            host["drawn_at"][part] = np.arange(chunk.end, chunk.end + drafts + 1)
        return count

    def _fill_changes(self, host: dict[str, Any], changes: Items[tuple[int, int]]) -> None:
        host["change_at"][:] = len(self._flat_tables) - 1
        if changes:
            host["change_at"][: len(changes)], host["change_to"][: len(changes)] = zip(*changes, strict=True)

    def _send(self, changes: Items[tuple[int, int]]) -> None:
        host, at = self._free_set()
        self._fill_changes(host, changes)
        self._submit(at)

    def _free_set(self) -> tuple[dict[str, Any], int]:
        at, self._next = self._next, (self._next + 1) % _SETS
        if (sent := self._sent[at]) is not None:
            sent.wait(Wait.TABLES_AFTER_STEP)
        if self._device.accesses is not None:
            self._device.accesses.host(self._sets[at], [0], writes=True)
        return self._filled[at], at

    def _submit(self, at: int) -> None:
        self._sent[at] = self._device.transfer(self._sets[at], self._inputs)
        self._flat_tables.index_put_((self._on_device["change_at"],), self._on_device["change_to"])


def _table(chunk: Chunk) -> BlockTable:
    assert chunk.sequence.table is not None
    return chunk.sequence.table


def _size_bytes(fields: Items[_Field]) -> int:
    return sum(_padded(dtype.itemsize * count) for _, dtype, count in fields)


def _padded(size_bytes: int) -> int:
    return -(-size_bytes // _ALIGNED_BYTES) * _ALIGNED_BYTES


def _views(memory: Tensor, fields: Items[_Field]) -> dict[str, Tensor]:
    views, begin = {}, 0
    for name, dtype, count in fields:
        size_bytes = dtype.itemsize * count
        views[name] = memory[begin : begin + size_bytes].view(dtype)
        begin += _padded(size_bytes)
    return views
