"""No host reads: a step of the device's decoder on tensors without contents, where the host has nothing to read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from attnstore.attention import CheckedAttention
from attnstore.attention.triton import TritonAttention
from attnstore.core.layout import DType, PageLayout
from attnstore_worker.model.llama_device import DeviceLlamaDecoder
from attnstore_worker.model.triton_rows import gated
from attnstore_worker.random_models import LLAMA_3_8B, empty_llama
from tests.worker.fake_device import CUDA, HostRead, fake_cuda
from tests.worker.model.steps import Pages, Spans

SHAPE = LLAMA_3_8B
LAYOUT = PageLayout(layers=SHAPE.layers, kv_heads=SHAPE.kv_heads, head_dim=SHAPE.head_dim, block_tokens=16, dtype=DType.BF16)
PROGRAMS = 264


@pytest.mark.parametrize(("spans", "padding"), [([(128, 256)], 0), ([(40, 41), (7, 8), (300, 301)], 5)], ids=["prefill", "decode"])
def test_a_step_reads_nothing_back_from_the_device(spans: Spans, padding: int) -> None:
    with fake_cuda() as launches:
        decoder = DeviceLlamaDecoder(empty_llama(SHAPE, torch.bfloat16, CUDA))
        pages = Pages.of(LAYOUT, [end for _, end in spans], CUDA, vocabulary=SHAPE.vocabulary, content=0.0)
        asked = pages.asked(CheckedAttention(TritonAttention(PROGRAMS)), spans, padding=padding)
        launches.clear()
        logits = asked.logits(decoder)
        rows = sum(end - begin for begin, end in spans)
        assert (logits.shape, logits.dtype, logits.device) == ((rows, SHAPE.vocabulary), torch.float32, CUDA)
    counted = Counter(launch.name for launch in launches)
    assert counted.pop("attend") == SHAPE.layers
    counted.pop("merge_splits", None)
    assert counted == {"normalize_rows": 2 * SHAPE.layers + 1, "rotate_and_put": SHAPE.layers, "gate_rows": SHAPE.layers}


READS: dict[str, Callable[[Tensor], Any]] = {
    "item": lambda tensor: tensor[0].item(),
    "tolist": lambda tensor: tensor.tolist(),
    "cpu": lambda tensor: tensor.cpu(),
    "to": lambda tensor: tensor.to("cpu", non_blocking=True),
    "numpy": lambda tensor: tensor.numpy(),
    "copy_": lambda tensor: torch.empty(4, dtype=tensor.dtype).copy_(tensor),
    "bool": lambda tensor: bool((tensor > 0).any()),
    "mask": lambda tensor: tensor[tensor > 0],
    "equal": lambda tensor: torch.equal(tensor, tensor + 1),
    "index": lambda tensor: [0, 1, 2, 3, 4][tensor[0]],
}


@pytest.mark.parametrize("read", READS.values(), ids=READS)
def test_a_read_by_the_host_is_noticed(read: Callable[[Tensor], Any]) -> None:
    with fake_cuda(), pytest.raises((HostRead, RuntimeError, TypeError)):
        read(torch.arange(4, device=CUDA))


def test_an_argument_on_the_host_is_noticed() -> None:
    with fake_cuda(), pytest.raises(AssertionError, match="gate_rows is given a tensor on cpu"):
        gated(torch.zeros(2, 64))


KEYS: list[Any] = [0, slice(1, 3), (None, 1), (..., slice(None, 2)), (slice(None), -1, None), (0, ..., 0)]


@pytest.mark.parametrize("key", KEYS, ids=str)
def test_indexing_on_the_device_gives_the_shapes_that_torch_gives(key: Any) -> None:
    expected = torch.zeros(4, 3, 5)[key].shape
    with fake_cuda():
        tensor = torch.zeros(4, 3, 5, device=CUDA)
        assert tensor[key].shape == expected
        tensor[key] = 1.0
        tensor[key] = torch.zeros(expected, device=CUDA)
