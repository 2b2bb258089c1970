"""Copies of pages between pinned memory and blocks, both ways, the kernels that gather and scatter them on the device, swap-in from
a node, and saves from the blocks of another engine.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from attnstore.attention.triton import gather_pages, scatter_pages
from attnstore.core.layout import DType, PageLayout
from attnstore.limits import GIB, MIB
from attnstore_worker.device.base import Copies, Event, Wait
from experiments.gpu import targets
from experiments.gpu.engine_saves import compare_saves
from experiments.gpu.phase import Phase
from experiments.gpu.swap_in import compare_swap_in

_PAGES = {
    "2 MiB pages": PageLayout(layers=32, kv_heads=8, head_dim=128, block_tokens=16, dtype=DType.BF16),
    "512 KiB pages": PageLayout(layers=32, kv_heads=2, head_dim=128, block_tokens=16, dtype=DType.BF16),
    "360 KiB pages": PageLayout(layers=30, kv_heads=3, head_dim=64, block_tokens=16, dtype=DType.BF16),
}
_FROM_NODE = ("2 MiB pages", "360 KiB pages")
_LARGE_BYTES = 512 << 10
_SEED = 11


def run(phase: Phase) -> None:
    """Compares bytes, then measures."""
    for name, layout in list(_PAGES.items())[-1:] if phase.quick else _PAGES.items():
        _copies(phase, name, layout)
        if name in _FROM_NODE:
            compare_swap_in(phase, name, layout)
    compare_saves(phase)


def _copies(phase: Phase, name: str, layout: PageLayout) -> None:
    size_bytes = (2 * MIB if phase.quick else GIB) // layout.page_bytes * layout.page_bytes
    pages = size_bytes // layout.page_bytes
    host, blocks = phase.device.host_pages(layout, 2 * size_bytes), phase.device.blocks(layout, 2 * pages)
    copies = phase.device.copies(blocks)
    rng = random.Random(_SEED)
    up_slots, down_slots = list(range(pages)), list(range(pages, 2 * pages))
    up_blocks, down_blocks = (rng.sample(part, pages) for part in (range(pages), range(pages, 2 * pages)))
    _compare(phase, name, copies, host.tensor, pages)
    up = partial(copies.up, host.tensor, up_slots, up_blocks)
    down = partial(copies.down, down_blocks, host.tensor, down_slots)
    wanted = targets.SWAP_IN_LARGE if layout.page_bytes >= _LARGE_BYTES else targets.SWAP_IN_SMALL
    gb = size_bytes / 1e9
    phase.rate(f"up, {name}", gb, "GB/s", phase.copy_ms(_alone(up)), against="pinned_up", target=wanted)
    phase.rate(f"down, {name}", gb, "GB/s", phase.copy_ms(_alone(down)), against="pinned_down")
    both_ms = phase.copy_ms(lambda: [up(), down()])
    phase.rate(f"both ways, {name}", 2 * gb, "GB/s", both_ms, against="pinned_duplex", target=targets.BOTH_WAYS)
    _kernels(phase, name, blocks, up_blocks, gb)


def _alone(copy: Callable[[], Event]) -> Callable[[], Sequence[Event]]:
    return lambda: [copy()]


def _compare(phase: Phase, name: str, copies: Copies, host: Tensor, pages: int) -> None:
    """Copies random pages up and down again, through other blocks."""
    generator = torch.Generator().manual_seed(_SEED)
    first, second = host[:pages], host[pages : 2 * pages]
    words = first.view(torch.int16)
    words.copy_(torch.randint(-(1 << 15), 1 << 15, words.shape, dtype=torch.int16, generator=generator))
    second.zero_()
    block_ids = torch.randperm(pages, generator=generator).tolist()
    copies.up(host, range(pages), block_ids).wait(Wait.TOKENS_AFTER_COMPUTE)
    copies.down(block_ids, host, range(pages, 2 * pages)).wait(Wait.TOKENS_AFTER_COMPUTE)
    equal = bool(torch.equal(words, second.view(torch.int16)))
    phase.rows.check(f"{name} come back as they were", equal, f"{pages} pages")


def _kernels(phase: Phase, name: str, blocks: Tensor, block_ids: Sequence[int], gb: float) -> None:
    ids = torch.tensor(block_ids, dtype=torch.int32, device=blocks.device)
    packed = gather_pages(blocks, ids)
    phase.rows.check(f"gather, {name}", bool(torch.equal(packed.view(torch.int16), blocks[ids.long()].view(torch.int16))))
    gather_ms = phase.time_ms(lambda: gather_pages(blocks, ids))
    scatter_ms = phase.time_ms(lambda: scatter_pages(packed, ids, blocks))
    for kernel, took_ms in (("gather", gather_ms), ("scatter", scatter_ms)):
        phase.rate(f"{kernel}, {name}", 2 * gb, "GB/s", took_ms, against="hbm_copy", target=targets.PAGE_KERNELS)
