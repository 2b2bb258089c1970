"""Steps of a decoder over pages, built by hand: which tokens, in which blocks, on which device."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor

from attnstore.attention import AttentionBackend
from attnstore.core.layout import PageLayout
from attnstore_worker.dtypes import TORCH_DTYPES
from attnstore_worker.model.attention import PagedStep, at_once
from attnstore_worker.model.decoder import Decoder

UNUSED = 0
"""A block of no sequence, which rows of padding may name in their tables and must not touch."""

NO_SLOT = -1

Spans = Sequence[tuple[int, int]]
"""The tokens `[begin, end)` of each sequence."""


class Asked(NamedTuple):
    """The arguments of `Decoder.logits`."""

    token_ids: Tensor
    positions: Tensor
    rows: Tensor
    step: PagedStep

    def logits(self, decoder: Decoder) -> Tensor:
        """Returns the logits of all rows that are not padding."""
        return decoder.logits(*self)


@dataclass(frozen=True)
class Pages:
    """Sequences of random tokens of `lengths`, whose blocks lie in reverse order in a pool with one block more."""

    layout: PageLayout
    pool: Tensor
    tables: list[list[int]]
    tokens: list[list[int]]

    @classmethod
    def of(cls, layout: PageLayout, lengths: Sequence[int], device: torch.device, *, vocabulary: int, content: float) -> Pages:
        """Returns pages whose memory holds `content`."""
        sizes = [-(-length // layout.block_tokens) for length in lengths]
        ids = range(sum(sizes), 0, -1)
        tables = [list(ids[end - size : end]) for size, end in zip(sizes, accumulate(sizes), strict=True)]
        pool = torch.full((1 + sum(sizes), *layout.shape), content, dtype=TORCH_DTYPES[layout.dtype], device=device)
        drawn = random.Random(5)
        return cls(layout, pool, tables, [[drawn.randrange(3, vocabulary) for _ in range(length)] for length in lengths])

    def asked(self, backend: AttentionBackend, spans: Spans, *, padding: int = 0, behind: int = 0, **fields: Any) -> Asked:
        """Returns a step of these spans and of rows of padding. Its tables leave out the first `behind` blocks of each sequence."""
        block_tokens, device = self.layout.block_tokens, self.pool.device

        def tensor(values: list[Any], dtype: torch.dtype = torch.int64) -> Tensor:
            return torch.tensor(values, dtype=dtype, device=device)

        padded = [0] * padding
        places = [(number, position) for number, span in enumerate(spans) for position in range(*span)]
        tables = [table[behind:] for table in self.tables] + [[UNUSED] for _ in padded]
        widest = max(map(len, tables))
        lengths = [end - begin for begin, end in spans] + [1 for _ in padded]
        positions = tensor([position for _, position in places] + padded)
        step = PagedStep(
            backend=backend,
            pool=self.pool,
            slot_blocks=tensor([self.tables[number][at // block_tokens] for number, at in places] + [NO_SLOT for _ in padded]),
            slot_offsets=positions % block_tokens,
            block_tables=tensor([table + [UNUSED] * (widest - len(table)) for table in tables], torch.int32),
            context_lens=tensor([end - behind * block_tokens for _, end in spans] + padded, torch.int32),
            query_starts=tensor([0, *accumulate(lengths)], torch.int32),
            **{"before_layer": at_once, **fields},
        )
        token_ids = tensor([self.tokens[number][at] for number, at in places] + padded)
        return Asked(token_ids, positions, tensor(list(range(len(places)))), step)
