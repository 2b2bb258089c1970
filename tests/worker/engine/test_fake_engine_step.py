"""No host reads: the inputs and the sampler of a step on tensors without contents, around the model's part of the step."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from attnstore.attention import CheckedAttention
from attnstore.attention.triton import TritonAttention
from attnstore.core.layout import DType, PageLayout
from attnstore_worker.device.base import Event
from attnstore_worker.device.host import DONE, HostDevice
from attnstore_worker.engine.device_sampler import draw, greedy
from attnstore_worker.engine.step_tables import StepRows, StepTables
from attnstore_worker.model.attention import PagedStep, at_once
from attnstore_worker.model.llama_device import DeviceLlamaDecoder
from attnstore_worker.random_models import SMOLLM2_135M, empty_llama
from tests.worker.fake_device import CUDA, fake_cuda

SHAPE = SMOLLM2_135M._replace(layers=2)
LAYOUT = PageLayout(layers=2, kv_heads=SHAPE.kv_heads, head_dim=SHAPE.head_dim, block_tokens=16, dtype=DType.BF16)
BLOCKS = 64
SCRATCH = BLOCKS - 1


class FakeDevice(HostDevice):
    """A device whose memory has no contents. Pinned memory has, and is made before the device's tensors are."""

    torch_device = CUDA
    uses_triton = True

    def __init__(self, sizes: list[int]) -> None:
        super().__init__()
        self._pinned = [torch.zeros(size, dtype=torch.uint8) for size in sizes]
        self.sent: list[tuple[int, int]] = []

    def pinned(self, *shape: int, dtype: torch.dtype) -> Tensor:
        assert dtype == torch.uint8
        return self._pinned.pop()[: shape[0]]

    def transfer(self, source: Tensor, target: Tensor) -> Event:
        self.sent.append((len(source), len(target)))
        return DONE


def decoding(sequences: int, *, drafts: int = 0) -> StepRows:
    """Returns a decode step, with some drafts for each sequence, padded to a bucket of 8 sequences."""
    step = StepRows()
    for number in range(sequences):
        first = 20 + number
        for at in range(first, first + 1 + drafts):
            step.logit_rows.append(len(step.token_ids))
            step.draws.append((0.5, 40, 0.9, 0.7))
            step.token_ids.append(5)
            step.positions.append(at)
            step.slot_blocks.append(3 * number + at // 16)
            step.slot_offsets.append(at % 16)
        step.tables.append((number, [3 * number, 3 * number + 1, 3 * number + 2]))
        step.context_lens.append(first + 1 + drafts)
        step.query_starts.append(len(step.token_ids))
    step.pad(8, SCRATCH)
    return step


@pytest.mark.parametrize("drafts", [0, 3])
def test_a_whole_step_reads_nothing_back_from_the_device(drafts: int) -> None:
    """From the tables that one transfer brings, to the tokens drawn."""
    device = FakeDevice([1 << 16, 1 << 16])
    with fake_cuda():
        decoder = DeviceLlamaDecoder(empty_llama(SHAPE, torch.bfloat16, CUDA))
        pool = torch.zeros(BLOCKS, *LAYOUT.shape, dtype=torch.bfloat16, device=CUDA)
        tables = StepTables(device, rows_max=64, sequences_max=16, blocks_max=8)
        step = decoding(5, drafts=drafts)
        inputs = tables.fill(step)
        assert len(device.sent) == 1
        paged = PagedStep(
            CheckedAttention(TritonAttention(264)),
            pool,
            inputs.slot_blocks,
            inputs.slot_offsets,
            inputs.block_tables(8),
            inputs.context_lens,
            inputs.query_starts,
            at_once,
        )
        logits = decoder.logits(inputs.token_ids, inputs.positions, inputs.logit_rows, paged)
        tokens, peaks = greedy(logits)
        drawn = draw(logits, tokens, peaks, inputs.draws(filtered=True))
    assert drawn.shape == (len(step.logit_rows),)
    assert (drawn.dtype, drawn.device) == (torch.int64, CUDA)
