"""The inputs of steps in the memory of a device, which each step changes only where they differ from the last one.

Owns: `StepTables`. Invariants: a step is one transfer of pinned memory, as long as its tokens, sequences and new blocks need,
whatever the contexts; that memory is not filled again before its transfer has read it; steps of equal `decode_rows` have their
tensors at the same place, so a captured step reads the next one's inputs. After a step that failed, all block tables are sent
again, because it is unknown which entries have arrived.

A sequence keeps one row of the block tables while it runs, and its new blocks alone are sent. Rows of a step are in the order of
these rows of the tables. A row that no chunk uses is empty, or has one row of padding in a step of `decode_rows` rows: it stores
nothing and sees no key. Shape: the persistent batch of vLLM's model runner.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from collections.abc import Sequence as Items
from contextlib import contextmanager
from dataclasses import dataclass
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
"""Entries of block tables that one transfer brings at most; more need more transfers."""
_ALIGNED_BYTES: Final = 16
_WORD_BYTES: Final = 8


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


class _Counts(NamedTuple):
    """How many of each a step has: what its place in memory depends on."""

    tokens: int = 0
    sequences: int = 0
    rows: int = 0
    changes: int = 0

    def fields(self) -> Iterator[tuple[str, torch.dtype, int]]:
        """Yields name, type and count. The changes are last, so that they do not move the others."""
        for name in ("token_ids", "positions", "slot_blocks", "slot_offsets"):
            yield name, torch.int64, self.tokens
        for name in ("rows", "top_ks", "seeds", "drawn_at"):
            yield name, torch.int64, self.rows
        for name in ("temperatures", "top_ps"):
            yield name, torch.float64, self.rows
        yield "context_lens", torch.int32, self.sequences
        yield "query_starts", torch.int32, self.sequences + 1
        yield "change_at", torch.int64, self.changes
        yield "change_to", torch.int32, self.changes

    @property
    def words(self) -> int:
        """The size of all, in words of 8 bytes."""
        return sum(_padded_bytes(dtype, count) for _, dtype, count in self.fields()) // _WORD_BYTES

    def parts(self, memory: Mapping[torch.dtype, Any], begin: int = 0) -> dict[str, Any]:
        """Returns the fields in memory, from word `begin` on. The memory is given as a vector of each type."""
        parts, at = {}, begin * _WORD_BYTES
        for name, dtype, count in self.fields():
            first = at // dtype.itemsize
            parts[name] = memory[dtype][first : first + count]
            at += _padded_bytes(dtype, count)
        return parts


class _PinnedSet:
    """Pinned memory for the inputs of a step, or of several small ones. `sent` is the last transfer from its first `used` words."""

    def __init__(self, device: Device, words: int) -> None:
        self.memory = device.pinned(words, dtype=torch.int64)
        array = self.memory.numpy()
        self.by_type = {torch.int64: array, torch.float64: array.view(np.float64), torch.int32: array.view(np.int32)}
        self.sent: Event | None = None
        self.used = 0


class StepTables:
    """Tables on `device`; the block tables of all sequences stay there."""

    def __init__(self, device: Device, sizes: Sizes) -> None:
        self.sizes = sizes
        self._device = device
        words = _Counts(sizes.tokens, sizes.sequences, sizes.tokens, _CHANGES).words
        self._inputs = torch.zeros(words, dtype=torch.int64, device=device.torch_device)
        self._by_type = {dtype: self._inputs.view(dtype) for dtype in (torch.int64, torch.float64, torch.int32)}
        self._block_tables = torch.zeros(sizes.sequences, sizes.blocks, dtype=torch.int32, device=device.torch_device)
        self._flat_tables = self._block_tables.view(-1)
        self._sets = [_PinnedSet(device, words) for _ in range(_SETS)]
        self._at = 0
        self._row_of: dict[Sequence, int] = {}
        self._known: list[list[int]] = [[] for _ in range(sizes.sequences)]

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
        with self._sending():
            self._fill([], decode_rows)
        return self._inputs_of(_Counts(decode_rows, decode_rows, decode_rows), decode_rows)

    def fill(self, chunks: Items[Chunk], decode_rows: int | None = None) -> Inputs:
        """Submits the inputs of a step, and returns them. With `decode_rows`, at least `decode_rows(chunks)`, each chunk has one
        token, and there is one row of the step for each of so many rows of the tables.
        """
        with self._sending():
            return self._fill(chunks, decode_rows)

    def fill_drafts(self, chunks: Items[Chunk], counts: Items[int], decode_rows: int | None) -> Iterator[Inputs]:
        """Submits the inputs of the steps that draft `counts[i]` tokens after chunk `i`, one step for each value taken from it.

        Each chunk has one token, which is what the first step computes. A later step computes the token after that of the step
        before, whose id is in no table: the caller puts it into `token_ids`, at `rows`. `counts` descend, and a step has the chunks
        from the first on that are drafted for. The sequences have blocks for all. `decode_rows` as in `fill`.
        """
        for ahead in range(counts[0]):
            with self._sending():
                inputs = self._fill(chunks[: sum(count > ahead for count in counts)], decode_rows, ahead)
            yield inputs

    @contextmanager
    def _sending(self) -> Iterator[None]:
        try:
            yield
        except BaseException:
            self._known = [[] for _ in self._known]
            raise

    def _fill(self, chunks: Items[Chunk], decode_rows: int | None, ahead: int = 0) -> Inputs:
        """Submits the inputs of the chunks, or of the tokens `ahead` places after them, which have no ids yet."""
        ordered = self.ordered(chunks)
        changes = [change for chunk in ordered for change in self._changed(chunk)]
        while len(changes) > _CHANGES:
            self._send(_Counts(changes=_CHANGES), _as_fields(changes[:_CHANGES]))
            del changes[:_CHANGES]
        values, starts = self._values(ordered, decode_rows, ahead)
        values |= _as_fields(changes)
        rows = self._add_rows(values, chunks, starts)
        if decode_rows is not None:  # a captured step computes so many rows of logits
            values["rows"] += [0] * (decode_rows - rows)
        counts = _Counts(starts[-1], len(starts) - 1, len(values["rows"]), len(changes))
        self._send(counts, values, beside=ahead > 0)
        return self._inputs_of(counts, rows)

    def _inputs_of(self, counts: _Counts, rows: int) -> Inputs:
        there = counts.parts(self._by_type)
        there["block_tables"] = self._block_tables[: counts.sequences]
        for name in ("rows", "temperatures", "top_ps", "top_ks", "seeds", "drawn_at"):
            there[name] = there[name][:rows]
        return Inputs(**{name: there[name] for name in Inputs._fields})

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
        if wanted == known:
            return []
        same = len(known) if wanted[: len(known)] == known else 0
        first = row * self.sizes.blocks
        self._known[row] = list(wanted)
        return [(first + column, wanted[column]) for column in range(same, len(wanted))]

    def _values(self, ordered: Items[Chunk], decode_rows: int | None, ahead: int) -> tuple[dict[str, list[Any]], list[int]]:
        """Returns the fields of the tokens and sequences of a step, and where each row of the tables starts in it."""
        by_row = {self._row_of[chunk.sequence]: chunk for chunk in ordered}
        token_ids: list[int] = []
        positions: list[int] = []
        blocks: list[int] = []
        offsets: list[int] = []
        context_lens: list[int] = []
        starts = [0]
        for row in range(decode_rows if decode_rows is not None else 1 + max(by_row)):
            if (chunk := by_row.get(row)) is not None:
                table, begin = _table(chunk), chunk.begin + ahead
                end = begin + chunk.tokens
                token_ids += chunk.token_ids()
                positions += range(begin, end)
                slots = table.slot_mapping(begin, end)
                blocks += slots[0]
                offsets += slots[1]
                context_lens.append(end - table.remote_tokens)
            else:
                context_lens.append(0)
                if decode_rows is not None:
                    for field, value in ((token_ids, 0), (positions, 0), (blocks, NO_SLOT), (offsets, 0)):
                        field.append(value)
            starts.append(len(token_ids))
        assert len(token_ids) <= self.sizes.tokens
        fields = {"token_ids": token_ids, "positions": positions, "slot_blocks": blocks, "slot_offsets": offsets}
        return fields | {"context_lens": context_lens, "query_starts": starts}, starts

    def _add_rows(self, values: dict[str, list[Any]], chunks: Items[Chunk], starts: Items[int]) -> int:
        """Adds the rows whose logits are asked for, in the order of `chunks`, and how they are drawn from. Returns their number."""
        values |= {name: [] for name in ("rows", "temperatures", "top_ps", "top_ks", "seeds", "drawn_at")}
        for chunk in chunks:
            if not chunk.gives_token:
                continue
            count, sampling = 1 + len(chunk.drafts), chunk.sequence.sampling
            end = starts[self._row_of[chunk.sequence] + 1]
            values["rows"] += range(end - count, end)
            values["temperatures"] += [sampling.temperature] * count
            values["top_ps"] += [sampling.top_p] * count
            values["top_ks"] += [sampling.top_k or 0] * count
            values["seeds"] += [sampling.seed] * count
            values["drawn_at"] += range(chunk.end, chunk.end + count)
        return len(values["rows"])

    def _send(self, counts: _Counts, values: Mapping[str, Items[Any]], *, beside: bool = False) -> None:
        """Transfers the fields of a step, and puts the changed entries into the block tables. `beside`: see `_room`."""
        words = counts.words
        pinned, begin = self._room(words, beside=beside)
        parts = counts.parts(pinned.by_type, begin)
        for name, value in values.items():
            parts[name][: len(value)] = value
        pinned.sent = self._device.transfer(pinned.memory[begin : begin + words], self._inputs[:words])
        if counts.changes:
            there = counts.parts(self._by_type)
            self._flat_tables.index_put_((there["change_at"],), there["change_to"])

    def _room(self, words: int, *, beside: bool) -> tuple[_PinnedSet, int]:
        """Returns pinned memory for so many words, and where they begin. `beside`: after those of the last step if there is room,
        which waits for nothing.
        """
        pinned = self._sets[self._at]
        if not beside or pinned.used + words > len(pinned.memory):
            self._at = (self._at + 1) % _SETS
            pinned = self._sets[self._at]
            if pinned.sent is not None:
                pinned.sent.wait(Wait.TABLES_AFTER_STEP)
            if self._device.accesses is not None:
                self._device.accesses.host(pinned.memory, [0], writes=True)
            pinned.used = 0
        begin = pinned.used
        pinned.used += words
        return pinned, begin


def _table(chunk: Chunk) -> BlockTable:
    assert chunk.sequence.table is not None
    return chunk.sequence.table


def _as_fields(changes: Items[tuple[int, int]]) -> dict[str, list[Any]]:
    return {"change_at": [at for at, _ in changes], "change_to": [block_id for _, block_id in changes]}


def _padded_bytes(dtype: torch.dtype, count: int) -> int:
    """Returns the size of a field. All begin aligned, because Triton compiles a kernel for aligned pointers."""
    return -(-dtype.itemsize * count // _ALIGNED_BYTES) * _ALIGNED_BYTES
