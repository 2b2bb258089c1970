"""Runs one step of the model over packed chunks of sequences, and draws their next tokens.

Owns: the contract `Runner`, and `HostRunner`, which makes the tensors of a step on the processor. Invariant: each sequence attends
to its own blocks only; its results do not depend on its neighbours in the step, up to rounding.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Items
from dataclasses import replace
from itertools import accumulate
from typing import Protocol

import torch
from torch import Tensor

from attnstore.attention import AttentionBackend
from attnstore_worker.cache.attending.contexts import RemoteAttention
from attnstore_worker.cache.pool.block_table import BlockTable
from attnstore_worker.device.base import Device
from attnstore_worker.engine.sampler import peaks
from attnstore_worker.engine.sequence import Chunk
from attnstore_worker.engine.speculative import accepted_tokens
from attnstore_worker.model.attention import PagedStep, at_once
from attnstore_worker.model.loading import LoadedModel


class Drawn(Protocol):
    """The tokens after the chunks of a step."""

    def tokens(self, index: int) -> list[int]:
        """Returns the tokens after chunk `index`, none if it gives none: all accepted drafts and the first token that is none.
        Raises `LogitsNotFinite`.
        """
        ...

    def logits(self, index: int) -> Tensor:
        """Returns the fp32 logits `[1 + drafts, vocabulary]` from which they were drawn, on the host."""
        ...


class Runner(Protocol):
    """A model on one block pool, `[blocks, layers, 2, kv_heads, block_tokens, head_dim]`."""

    def run(self, chunks: Items[Chunk], before_layer: Callable[[int], None] = at_once) -> Drawn:
        """Computes the chunks' KV into their sequences' blocks. `before_layer` as in `PagedStep`. The results are valid until the
        next run. Raises `PagesLost` if a store node that attends failed: nothing was computed then.
        """
        ...

    def draft_resident(self, chunks: Items[Chunk], counts: Items[int]) -> list[list[int]]:
        """Returns the likeliest `counts[i]` tokens after chunk `i`, one after the other, without the blocks in the store: an
        approximation, whose KV must be computed again. Each chunk is the last known token of a sequence with blocks for all of
        them; `counts` descend.
        """
        ...

    def warm_up(self) -> None:
        """Prepares what later steps repeat."""
        ...


class HostRunner:
    """See `Runner`. `before_step` is called before every step: see `CacheManager.before_step`."""

    def __init__(
        self,
        model: LoadedModel,
        pool: Tensor,
        attention: AttentionBackend,
        remote: RemoteAttention | None,
        device: Device,
        *,
        before_step: Callable[[], None],
    ) -> None:
        self._decoder = model.decoder
        self._device = device
        self._pool = pool
        self._attention = attention
        self._remote = remote
        self._before_step = before_step

    def run(self, chunks: Items[Chunk], before_layer: Callable[[int], None] = at_once) -> Drawn:
        """See `Runner.run`."""
        return _HostDrawn(chunks, self._run(chunks, before_layer, self._remote))

    def draft_resident(self, chunks: Items[Chunk], counts: Items[int]) -> list[list[int]]:
        """See `Runner.draft_resident`. Each step computes the drafts of those before it again."""
        drafts: list[list[int]] = [[] for _ in chunks]
        for made in range(counts[0]):
            drafting = sum(count > made for count in counts)
            steps = [replace(chunk, drafts=tuple(own)) for chunk, own in zip(chunks[:drafting], drafts, strict=False)]
            rows = self._run(steps, at_once, None)[made :: made + 1]
            for own, peak in zip(drafts, peaks(rows), strict=False):
                own.append(peak.token_id)
        return drafts

    def warm_up(self) -> None:
        """No-op."""

    def _run(self, chunks: Items[Chunk], before_layer: Callable[[int], None], remote: RemoteAttention | None) -> Tensor:
        self._before_step()
        tables = [_table(chunk) for chunk in chunks]
        token_ids = [token for chunk in chunks for token in chunk.token_ids()]
        positions = [position for chunk in chunks for position in range(chunk.begin, chunk.end + len(chunk.drafts))]
        if self._device.accesses is not None:
            before_layer = noting_accesses(self._device, chunks, before_layer)
        step = self._paged_step(chunks, tables, before_layer, remote)
        ends = [int(end) for end in step.query_starts[1:]]
        rows = [
            row
            for chunk, end in zip(chunks, ends, strict=True)
            if chunk.gives_token
            for row in range(end - 1 - len(chunk.drafts), end)
        ]
        return self._decoder.logits(torch.tensor(token_ids), torch.tensor(positions), torch.tensor(rows, dtype=torch.int64), step)

    def _paged_step(
        self,
        chunks: Items[Chunk],
        tables: Items[BlockTable],
        before_layer: Callable[[int], None],
        attended: RemoteAttention | None,
    ) -> PagedStep:
        ends = [chunk.end + len(chunk.drafts) for chunk in chunks]
        slots = [table.slot_mapping(chunk.begin, end) for chunk, end, table in zip(chunks, ends, tables, strict=True)]
        query_lens = [end - chunk.begin for chunk, end in zip(chunks, ends, strict=True)]
        remote = None
        if attended is not None:
            remote = attended.step(
                [(chunk.sequence.attend.prefix, chunk.begin, rows) for chunk, rows in zip(chunks, query_lens, strict=True)]
            )
        block_tables = torch.zeros(len(tables), max(len(table.block_ids) for table in tables), dtype=torch.int32)
        for row, table in zip(block_tables, tables, strict=True):
            row[: len(table.block_ids)] = torch.tensor(table.block_ids, dtype=torch.int32)
        return PagedStep(
            backend=self._attention,
            pool=self._pool,
            slot_blocks=torch.tensor([block_id for block_ids, _ in slots for block_id in block_ids]),
            slot_offsets=torch.tensor([offset for _, offsets in slots for offset in offsets]),
            block_tables=block_tables,
            context_lens=torch.tensor(
                [end - table.remote_tokens for end, table in zip(ends, tables, strict=True)], dtype=torch.int32
            ),
            query_starts=torch.tensor([0, *query_lens], dtype=torch.int32).cumsum(0, dtype=torch.int32),
            before_layer=before_layer,
            remote=remote,
        )


def _table(chunk: Chunk) -> BlockTable:
    assert chunk.sequence.table is not None
    return chunk.sequence.table


class _HostDrawn:
    """See `Drawn`. Draws when it is asked, so that a sequence that is gone draws nothing."""

    def __init__(self, chunks: Items[Chunk], logits: Tensor) -> None:
        sizes = [1 + len(chunk.drafts) if chunk.gives_token else 0 for chunk in chunks]
        self._chunks = chunks
        self._logits = logits.split_with_sizes(sizes)
        highest = peaks(logits)
        ends = list(accumulate(sizes))
        self._peaks = [highest[end - size : end] for size, end in zip(sizes, ends, strict=True)]

    def tokens(self, index: int) -> list[int]:
        """See `Drawn.tokens`."""
        chunk = self._chunks[index]
        if not chunk.gives_token:
            return []
        return accepted_tokens(chunk.sequence.sampler, chunk.drafts, self._logits[index].unbind(), self._peaks[index])

    def logits(self, index: int) -> Tensor:
        """See `Drawn.logits`."""
        return self._logits[index]


def noting_accesses(device: Device, chunks: Items[Chunk], before_layer: Callable[[int], None]) -> Callable[[int], None]:
    """Returns `before_layer` for a device that looks for races: it is also told which blocks the step uses."""
    if before_layer is at_once:
        note_accesses(device, chunks, None)
        return at_once

    def before(layer: int) -> None:
        before_layer(layer)
        note_accesses(device, chunks, range(layer, layer + 1))

    return before


def note_accesses(device: Device, chunks: Items[Chunk], layers: range | None) -> None:
    """Tells a device that looks for races which blocks a step uses, or these layers of them."""
    if device.accesses is None:
        return
    reads: set[int] = set()
    writes: set[int] = set()
    for chunk in chunks:
        table, end = _table(chunk), chunk.end + len(chunk.drafts)
        reads.update(table.block_ids[: -(-(end - table.remote_tokens) // table.block_tokens)])
        writes.update(table.slot_mapping(chunk.begin, end)[0])
    device.accesses.step(reads, writes, layers=layers)
