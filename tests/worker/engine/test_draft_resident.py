"""Drafts of the model from the blocks that are here: what a draft is when the model computes no token."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import cast

import torch
from torch import Tensor

from attnstore.attention import create_attention
from attnstore_worker.cache.pool.block_table import BlockTable
from attnstore_worker.device.host import HostDevice
from attnstore_worker.engine.device_runner import DeviceRunner
from attnstore_worker.engine.sampler import SamplingParams
from attnstore_worker.engine.sequence import Chunk, Sequence
from attnstore_worker.engine.step_tables import Sizes
from attnstore_worker.model import LoadedModel
from attnstore_worker.model.attention import PagedStep

VOCABULARY = 50


class NotFiniteDecoder:
    """Computes no finite logit."""

    capturable = False

    def logits(self, token_ids: Tensor, positions: Tensor, rows: Tensor, step: PagedStep) -> Tensor:
        del positions, step
        assert 0 <= int(token_ids.min()) <= int(token_ids.max()) < VOCABULARY
        return torch.full((len(rows), VOCABULARY), math.nan)


def test_a_draft_of_logits_that_are_not_finite_is_a_token_that_the_next_step_can_compute() -> None:
    sequence = Sequence(0, [5, 6], 2, SamplingParams(), 0.0)
    sequence.table = BlockTable(16, [1])
    model = cast(LoadedModel, SimpleNamespace(decoder=NotFiniteDecoder()))
    pool, attention = torch.zeros(2, 1, 2, 1, 16, 16), create_attention("reference")
    runner = DeviceRunner(model, pool, attention, None, HostDevice(), Sizes(16, 8, 1), before_step=lambda: None)
    [drafts] = runner.draft_resident([Chunk(sequence, 1, 2)], [3])
    assert len(drafts) == 3
    assert all(0 <= token_id < VOCABULARY for token_id in drafts)
