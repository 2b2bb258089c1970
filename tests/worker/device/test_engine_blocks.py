"""The blocks of an engine: where their bytes lie, and their copies through a ring and by runs, on tensors of the host.

The streams do not take part; `test_device_transfers.py` has those of the simulated device, and `test_cuda.py` a GPU's.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from attnstore.core.layout import DType, PageLayout
from attnstore_worker.device.base import Wait
from attnstore_worker.device.copies_direct import DirectCopies
from attnstore_worker.device.copies_ring import RING_PARTS, RingCopies, RunCopies, ring_places
from attnstore_worker.device.engine_blocks import EngineBlocks
from tests.worker.device.test_copies import AtOnce

BLOCKS, LAYERS, HEADS, TOKENS, CONTENT = 12, 3, 2, 4, 24
LAYOUT = PageLayout(LAYERS, HEADS, CONTENT // 2, TOKENS, DType.OPAQUE)
SIZES = {"L": LAYERS, "B": BLOCKS, "H": HEADS, "N": TOKENS, "C": CONTENT}
ORDERS = ("LBHNC", "LBNHC", "LHBNC", "BLHNC", "BLNHC", "BHLNC")


def in_order(order: str) -> list[Tensor]:
    """Layers `[blocks, heads, tokens, content]` of random bytes in one memory of this order."""
    memory = torch.randint(256, [SIZES[each] for each in order], dtype=torch.uint8)
    return list(memory.permute([order.index(each) for each in "LBHNC"]).unbind())


def pages_of(layers: list[Tensor]) -> Tensor:
    return torch.stack(layers, dim=1).reshape(BLOCKS, -1)


@pytest.mark.parametrize(("order", "runs", "run_bytes"), [
    ("BLHNC", 1, LAYERS * HEADS * TOKENS * CONTENT),
    ("LBHNC", LAYERS, HEADS * TOKENS * CONTENT),
    ("LHBNC", LAYERS * HEADS, TOKENS * CONTENT),
    ("BHLNC", LAYERS * HEADS, TOKENS * CONTENT),
    ("LBNHC", LAYERS * HEADS * TOKENS, CONTENT),
    ("BLNHC", LAYERS * HEADS * TOKENS, CONTENT),
])  # fmt: skip
def test_a_block_is_as_few_runs_as_its_memory_order_allows(order: str, runs: int, run_bytes: int) -> None:
    blocks = EngineBlocks(in_order(order))
    found = blocks.runs()
    assert (len(found.table), found.words * found.cache.itemsize) == (runs, run_bytes)
    assert found.cache.dtype == torch.int64
    assert blocks.page_bytes == LAYOUT.page_bytes
    assert (blocks.whole is not None) == (order == "BLHNC")


@pytest.mark.parametrize(("content", "offset", "word"), [(12, 0, torch.int32), (6, 0, torch.int16), (8, 1, torch.uint8)])
def test_words_are_as_large_as_sizes_and_addresses_allow(content: int, offset: int, word: torch.dtype) -> None:
    memory = torch.zeros(10 * content + 8, dtype=torch.uint8)[offset : offset + 10 * content]
    assert EngineBlocks([memory.view(5, 2, content)[:, 0]]).runs().cache.dtype == word


def test_whole_blocks_are_those_without_gaps() -> None:
    layers = in_order("BLHNC")
    whole = EngineBlocks(layers).whole
    assert whole is not None
    assert torch.equal(whole, pages_of(layers))
    assert whole.data_ptr() == layers[0].data_ptr()
    assert EngineBlocks([layer[:, :1] for layer in layers]).whole is None


def copy_runs(into_pages: bool) -> Callable[[Tensor, Tensor, int, Tensor, Tensor], None]:
    """The kernels' results, without Triton."""

    def copy(cache: Tensor, table: Tensor, words: int, block_ids: Tensor, pages: Tensor) -> None:
        for block_id, page in zip(block_ids.tolist(), pages, strict=True):
            for (begin, stride), part in zip(table.tolist(), page.split(words), strict=True):
                run = cache.as_strided((words,), (1,), cache.storage_offset() + begin + block_id * stride)
                part.copy_(run) if into_pages else run.copy_(part)

    return copy


def copies_of(layers: list[Tensor], places: int, streams: tuple[AtOnce, AtOnce, AtOnce]) -> RingCopies:
    compute, up, down = streams
    blocks = EngineBlocks(layers)
    ring = torch.zeros(places, *LAYOUT.shape, dtype=torch.uint8)
    own = RunCopies(blocks, ring, compute, up, copy_runs(True), copy_runs(False))
    return RingCopies(blocks, compute, DirectCopies(ring, up, down), places, own.gather, own.load)


@pytest.mark.parametrize("places", [1, 3, RING_PARTS, 2 * RING_PARTS])
@pytest.mark.parametrize("order", ORDERS)
def test_blocks_come_back_as_they_were(order: str, places: int) -> None:
    source, target = in_order(order), in_order(order)
    untouched = pages_of(target)
    host = torch.zeros(BLOCKS, *LAYOUT.shape, dtype=torch.uint8)
    block_ids, slots, elsewhere = [7, 0, 3, 11, 2], [4, 5, 6, 0, 9], [1, 8, 3, 0, 10]
    copies_of(source, places, (AtOnce(), AtOnce(), AtOnce())).save(block_ids, host, slots)
    assert torch.equal(host.view(BLOCKS, -1)[slots], pages_of(source)[block_ids])
    assert not host[[1, 2, 3, 7, 8, 10, 11]].any()
    copies_of(target, places, (AtOnce(), AtOnce(), AtOnce())).load(host, slots, elsewhere)
    assert torch.equal(pages_of(target)[elsewhere], pages_of(source)[block_ids])
    others = [2, 4, 5, 6, 7, 9, 11]
    assert torch.equal(pages_of(target)[others], untouched[others])


def test_only_a_save_that_is_larger_than_the_ring_delays_the_engine() -> None:
    compute, up, down = AtOnce(), AtOnce(), AtOnce()
    copies = copies_of(in_order("LBNHC"), RING_PARTS, (compute, up, down))
    host = torch.zeros(BLOCKS, *LAYOUT.shape, dtype=torch.uint8)
    copies.save(list(range(RING_PARTS)), host, list(range(RING_PARTS)))
    assert compute.waits == []
    copies.save([8, 9], host, [8, 9])
    assert compute.waits == [Wait.GATHER_AFTER_DOWN] * 2
    assert set(down.waits) == {Wait.DOWN_AFTER_GATHER}


@pytest.mark.parametrize(("slots", "block_ids"), [([BLOCKS], [0]), ([-1], [0]), ([0], [BLOCKS]), ([0], [-1]), ([0, 1], [0])])
def test_an_index_out_of_range_copies_nothing(slots: list[int], block_ids: list[int]) -> None:
    layers = in_order("LBNHC")
    before = pages_of(layers)
    host = torch.zeros(BLOCKS, *LAYOUT.shape, dtype=torch.uint8)
    copies = copies_of(layers, 4, (AtOnce(), AtOnce(), AtOnce()))
    with pytest.raises(IndexError):
        copies.save(block_ids, host, slots)
    with pytest.raises(IndexError):
        copies.load(host, slots, block_ids)
    assert torch.equal(pages_of(layers), before)
    assert not host.any()


def test_a_ring_has_room_for_a_step_and_stays_in_its_bound() -> None:
    assert ring_places(512, 1 << 20, 1 << 30) == 512
    assert ring_places(513, 1 << 20, 1 << 30) == 513 // RING_PARTS * RING_PARTS + RING_PARTS
    assert ring_places(2_000, 1 << 20, 1 << 30) == 1_024
    assert ring_places(1, 1 << 20, 1 << 19) == 1
