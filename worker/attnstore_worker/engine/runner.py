"""Runs one step of the model over packed chunks of sequences.

Owns: the tensors of a step. Invariant: each sequence attends to its own blocks only; its results do not depend on its neighbours in
the step, up to rounding.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Items

import torch
from torch import Tensor

from attnstore.attention import AttentionBackend
from attnstore_worker.cache.attending.contexts import RemoteAttention
from attnstore_worker.cache.pool.block_table import BlockTable
from attnstore_worker.engine.sequence import Chunk
from attnstore_worker.model.attention import PagedStep, at_once
from attnstore_worker.model.loading import LoadedModel


class Runner:
    """A model on one block pool, `[blocks, layers, 2, kv_heads, block_tokens, head_dim]`. `before_step` is called before every
    step: see `CacheManager.before_step`.
    """

    def __init__(
        self,
        model: LoadedModel,
        pool: Tensor,
        attention: AttentionBackend,
        remote: RemoteAttention | None = None,
        *,
        before_step: Callable[[], None],
    ) -> None:
        self._decoder = model.decoder
        self._pool = pool
        self._attention = attention
        self._remote = remote
        self._before_step = before_step

    def run(self, chunks: Items[Chunk], before_layer: Callable[[int], None] = at_once) -> Tensor:
        """Computes the chunks' KV into their sequences' blocks. `before_layer` as in `PagedStep`.

        Returns fp32 logits `[n, vocabulary]` of the last known token and of each draft of every chunk that gives tokens, in the
        order of the chunks. Raises `PagesLost` if a store node that attends failed: nothing was computed then.
        """
        return self._run(chunks, before_layer, self._remote)

    def run_resident(self, chunks: Items[Chunk]) -> Tensor:
        """As `run`, but without the blocks in the store: an approximation, whose KV must be computed again."""
        return self._run(chunks, at_once, None)

    def _run(self, chunks: Items[Chunk], before_layer: Callable[[int], None], remote: RemoteAttention | None) -> Tensor:
        self._before_step()
        tables = [_table(chunk) for chunk in chunks]
        token_ids = [token for chunk in chunks for token in chunk.token_ids()]
        positions = [position for chunk in chunks for position in range(chunk.begin, chunk.end + len(chunk.drafts))]
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
            remote = attended.step([(chunk.sequence.attend.prefix, rows) for chunk, rows in zip(chunks, query_lens, strict=True)])
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
