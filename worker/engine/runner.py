"""Runs one step of the model over packed chunks of sequences.

Owns: the tensors of a step. Invariant: each sequence attends to its own blocks only; what it computes does not depend on its
neighbours in the step, up to rounding.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Items

import torch
from torch import Tensor

from attnstore.attention import AttentionBackend
from worker.cache.block_table import BlockTable
from worker.engine.sequence import Chunk
from worker.model.attention import PagedStep, at_once
from worker.model.loading import LoadedModel


class Runner:
    """A model on one block pool, `[blocks, layers, 2, kv_heads, block_tokens, head_dim]`."""

    def __init__(self, model: LoadedModel, pool: Tensor, attention: AttentionBackend) -> None:
        self._decoder = model.decoder
        self._pool = pool
        self._attention = attention

    def run(self, chunks: Items[Chunk], before_layer: Callable[[int], None] = at_once) -> Tensor:
        """Computes the chunks' KV into their sequences' blocks. `before_layer` as in `PagedStep`.

        Returns fp32 logits `[n, vocabulary]` of the last token of each chunk that gives one, in the order of the chunks.
        """
        tables = [_table(chunk) for chunk in chunks]
        token_ids = [token for chunk in chunks for token in chunk.sequence.token_ids[chunk.begin : chunk.end]]
        positions = [position for chunk in chunks for position in range(chunk.begin, chunk.end)]
        step = self._paged_step(chunks, tables, before_layer)
        ends = [int(end) for end in step.query_starts[1:]]
        rows = [end - 1 for chunk, end in zip(chunks, ends, strict=True) if chunk.gives_token]
        return self._decoder.logits(torch.tensor(token_ids), torch.tensor(positions), torch.tensor(rows, dtype=torch.int64), step)

    def _paged_step(self, chunks: Items[Chunk], tables: Items[BlockTable], before_layer: Callable[[int], None]) -> PagedStep:
        slots = [table.slot_mapping(chunk.begin, chunk.end) for chunk, table in zip(chunks, tables, strict=True)]
        query_lens = [chunk.end - chunk.begin for chunk in chunks]
        block_tables = torch.zeros(len(tables), max(len(table.block_ids) for table in tables), dtype=torch.int32)
        for row, table in zip(block_tables, tables, strict=True):
            row[: len(table.block_ids)] = torch.tensor(table.block_ids, dtype=torch.int32)
        return PagedStep(
            backend=self._attention,
            pool=self._pool,
            slot_blocks=torch.tensor([block_id for block_ids, _ in slots for block_id in block_ids]),
            slot_offsets=torch.tensor([offset for _, offsets in slots for offset in offsets]),
            block_tables=block_tables,
            context_lens=torch.tensor([chunk.end for chunk in chunks], dtype=torch.int32),
            query_starts=torch.tensor([0, *query_lens], dtype=torch.int32).cumsum(0, dtype=torch.int32),
            before_layer=before_layer,
        )


def _table(chunk: Chunk) -> BlockTable:
    assert chunk.sequence.table is not None
    return chunk.sequence.table
