"""No host reads: whole steps of an engine on tensors without contents, from the tables that are sent to the tokens drawn."""

from __future__ import annotations

from types import SimpleNamespace
from typing import cast

import pytest
import torch
from torch import Tensor

from attnstore.attention import CheckedAttention
from attnstore.attention.triton import TritonAttention
from attnstore.core.layout import DType, PageLayout
from attnstore_worker.cache.pool.block_table import BlockTable
from attnstore_worker.device.base import Event, Wait
from attnstore_worker.device.host import HostDevice
from attnstore_worker.engine.device_runner import DeviceRunner
from attnstore_worker.engine.sampler import SamplingParams
from attnstore_worker.engine.sequence import Chunk, Sequence
from attnstore_worker.engine.step_tables import Sizes
from attnstore_worker.model import LoadedModel
from attnstore_worker.model.llama_device import DeviceLlamaDecoder
from attnstore_worker.random_models import SMOLLM2_135M, empty_llama
from tests.worker.fake_device import CUDA, Launch, fake_cuda

SHAPE = SMOLLM2_135M._replace(layers=2)
LAYOUT = PageLayout(layers=2, kv_heads=SHAPE.kv_heads, head_dim=SHAPE.head_dim, block_tokens=16, dtype=DType.BF16)
SIZES = Sizes(tokens=256, sequences=8, blocks=4)
Spans = list[tuple[int, int, int]]


class FakeDevice(HostDevice):
    """A device whose memory has no contents, behind pinned memory that has. `to_host` are the transfers that leave the device,
    `waits` those of the host.
    """

    torch_device = CUDA
    uses_triton = True

    def __init__(self) -> None:
        super().__init__()
        self._pinned = torch.zeros(1 << 20, dtype=torch.uint8)
        self.to_host: list[Tensor] = []
        self.waits: list[Wait] = []

    def pinned(self, *shape: int, dtype: torch.dtype) -> Tensor:
        memory = self._pinned[: torch.Size(shape).numel() * dtype.itemsize].clone()
        return memory.view(dtype).view(shape)

    def transfer(self, source: Tensor, target: Tensor) -> Event:
        assert (source.shape, source.dtype) == (target.shape, target.dtype)
        if source.device == CUDA:
            self.to_host.append(source)
        return _Event(self)


class _Event:
    def __init__(self, device: FakeDevice) -> None:
        self._device = device

    def done(self) -> bool:
        return True

    def wait(self, wait: Wait) -> None:
        self._device.waits.append(wait)


def chunks_of(spans: Spans) -> list[Chunk]:
    """Returns chunks `(begin, end, drafts)`; each gives a token. The last sequence is sampled."""
    chunks = []
    for number, (begin, end, drafts) in enumerate(spans):
        sampled = SamplingParams(temperature=0.7, top_k=40, top_p=0.9) if number == len(spans) - 1 else SamplingParams()
        sequence = Sequence(number, [5] * end, end, sampled, 0.0)
        sequence.table = BlockTable(16, list(range(4 * number, 4 * number + 4)))
        chunks.append(Chunk(sequence, begin, end, (7,) * drafts))
    return chunks


@pytest.mark.parametrize(
    ("spans", "rows"),
    [([(0, 60, 0)], 1), ([(40, 41, 0), (7, 8, 0), (15, 16, 0)], 3), ([(0, 30, 0), (40, 41, 3), (7, 8, 0)], 6)],
    ids=["prefill", "decode", "mixed, with drafts"],
)
@pytest.mark.parametrize("captured", [False, True])
def test_a_whole_step_brings_back_its_tokens_only(spans: Spans, rows: int, captured: bool) -> None:
    launches: list[Launch]
    device = FakeDevice()
    with fake_cuda() as launches:
        runner = runner_on(device, captured=captured)
        assert not device.to_host
        launches.clear()
        runner.run(chunks_of(spans))
    assert launches
    [tokens] = device.to_host
    assert (tokens.shape, tokens.dtype) == ((rows,), torch.int64)


@pytest.mark.parametrize("captured", [False, True])
def test_all_drafts_of_a_step_come_back_at_once(captured: bool) -> None:
    device = FakeDevice()
    with fake_cuda():
        runner = runner_on(device, captured=captured)
        device.waits.clear()
        drafts = runner.draft_resident(chunks_of([(40, 41, 0), (7, 8, 0), (15, 16, 0)]), [15, 3, 1])
    assert [len(own) for own in drafts] == [15, 3, 1]
    [tokens] = device.to_host
    assert tokens.shape == (19,)
    assert [wait for wait in device.waits if wait is not Wait.TABLES_AFTER_STEP] == [Wait.TOKENS_AFTER_COMPUTE]
    assert len(device.waits) <= 2, "for tables that were sent before"


def runner_on(device: FakeDevice, *, captured: bool) -> DeviceRunner:
    model = SimpleNamespace(decoder=DeviceLlamaDecoder(empty_llama(SHAPE, torch.bfloat16, CUDA)))
    pool = torch.zeros(64, *LAYOUT.shape, dtype=torch.bfloat16, device=CUDA)
    attention = CheckedAttention(TritonAttention(264))
    runner = DeviceRunner(cast(LoadedModel, model), pool, attention, None, device, SIZES, before_step=lambda: None)
    if captured:
        runner.warm_up()
    return runner
