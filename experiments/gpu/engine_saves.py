"""Saves from the blocks of an engine beside its steps, as the connector makes them in vLLM: blocks are gathered on the stream that
computes, and copied to pinned memory beside the next step.
"""

from __future__ import annotations

from functools import partial
from typing import Final

import torch
from torch import Tensor

from attnstore_worker.device.base import EngineCopies, Wait
from attnstore_worker.vllm.identity import page_layout
from attnstore_worker.vllm.kv_pages import kv_blocks
from experiments.gpu import targets
from experiments.gpu.phase import Phase

_ORDERS: Final = ("LBNHC", "BLHNC")
"""Memory orders of vLLM's caches: the runs of a block are short in the first and long in the second."""
_LAYERS, _HEADS, _TOKENS, _DIM = 32, 8, 16, 128
_STEP_PAGES: Final = 128
"""Blocks that a step of 2,048 tokens completes, with the shape of Llama-3-8B."""
_PRODUCTS: Final = 30
_PRODUCT_SIZE: Final = 8192
"""30 products of this size are about the work of such a step: 33 TFLOP."""


def compare_saves(phase: Phase) -> None:
    """Compares bytes after a save and a load, and a step with its save against the step alone, for each order."""
    for order in _ORDERS[-1:] if phase.quick else _ORDERS:
        _compare(phase, order)


def _compare(phase: Phase, order: str) -> None:
    layers, pages = (2, 4) if phase.quick else (_LAYERS, _STEP_PAGES)
    sizes = {"L": layers, "B": pages, "H": _HEADS, "N": _TOKENS, "C": 2 * _DIM}
    memory = torch.zeros([sizes[each] for each in order], dtype=torch.bfloat16, device=phase.device.torch_device)
    caches = memory.permute([order.index(each) for each in "LBHNC"]).unbind()
    layer_bytes = _HEADS * _TOKENS * 2 * _DIM * memory.element_size()
    layout = page_layout(layers=layers, layer_block_bytes=layer_bytes, kv_heads=_HEADS, block_tokens=_TOKENS, tp_rank=0, tp_size=1)
    blocks = kv_blocks(caches, blocks=pages, layer_bytes=[layer_bytes] * layers)
    copies = phase.device.engine_copies(blocks, layout, pages)
    host = phase.device.host_pages(layout, pages * layout.page_bytes).tensor
    phase.rows.check(f"saved blocks of {order} come back as they were", _comes_back(copies, memory, host, pages))
    size, products = (64, 1) if phase.quick else (_PRODUCT_SIZE, _PRODUCTS)
    left = torch.randn(size, size, dtype=torch.bfloat16, device=phase.device.torch_device)
    step = partial(_step, left, products)
    alone_ms = phase.time_ms(step)
    saved_ms = phase.time_ms(lambda: (step(), copies.save(range(pages), host, range(pages))))
    if alone_ms is not None and saved_ms is not None:
        name = f"step that saves {pages} pages of {order}"
        phase.compare(name, saved_ms, "ms", "the step alone", saved_ms / alone_ms, targets.ENGINE_SAVE)


def _comes_back(copies: EngineCopies, memory: Tensor, host: Tensor, pages: int) -> bool:
    """Saves blocks of random bytes, overwrites them, and loads their pages into the same blocks again."""
    words = memory.view(torch.int16)
    words.random_(-(1 << 15), 1 << 15)
    before = words.clone()
    copies.save(range(pages), host, range(pages)).wait(Wait.WRITTEN_AFTER_DOWN)
    words.zero_()
    copies.load(host, range(pages), range(pages)).wait(Wait.ARRIVED_AFTER_UP)
    return torch.equal(words, before)


def _step(left: Tensor, products: int) -> None:
    for _ in range(products):
        left @ left
