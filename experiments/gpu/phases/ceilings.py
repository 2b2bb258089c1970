"""The limits of the device that other phases are compared with: memory, link and matrix products, by plain torch operations.

Owns: the names `hbm_read`, `hbm_copy`, `pinned_up`, `pinned_down`, `pinned_duplex` (GB/s) and `matmul` (TFLOP/s). A copy within the
device counts each byte twice, read and written.
"""

from __future__ import annotations

import torch

from attnstore.core.layout import DType, PageLayout
from attnstore.limits import GIB, MIB
from experiments.gpu.phase import Phase

_MATMUL_SIZE = 8192


def run(phase: Phase) -> None:
    """Measures each limit."""
    _memory(phase)
    _link(phase)
    _matmul(phase)


def _memory(phase: Phase) -> None:
    size_bytes = 4 * MIB if phase.quick else 8 * GIB
    source = torch.zeros(size_bytes // 4, dtype=torch.float32, device=phase.device.torch_device)
    target = torch.empty_like(source)
    phase.rate("hbm_read", size_bytes / 1e9, "GB/s", phase.time_ms(source.sum))
    phase.rate("hbm_copy", 2 * size_bytes / 1e9, "GB/s", phase.time_ms(lambda: target.copy_(source)))


def _link(phase: Phase) -> None:
    """One copy each way of pinned memory, then both at once: of two streams, because each has an engine of its own."""
    size_bytes = 4 * MIB if phase.quick else GIB
    # A page of this size: one layer of one head, whose tokens are as many as are needed.
    layout = PageLayout(layers=1, kv_heads=1, head_dim=64, block_tokens=size_bytes // (2 * 64 * 4), dtype=DType.FP32)
    host, blocks = phase.device.host_pages(layout, 2 * size_bytes), phase.device.blocks(layout, 2)
    copies = phase.device.copies(blocks)
    up_ms = phase.copy_ms(lambda: [copies.up(host.tensor, [0], [0])])
    down_ms = phase.copy_ms(lambda: [copies.down([1], host.tensor, [1])])
    both_ms = phase.copy_ms(lambda: [copies.up(host.tensor, [0], [0]), copies.down([1], host.tensor, [1])])
    phase.rate("pinned_up", size_bytes / 1e9, "GB/s", up_ms)
    phase.rate("pinned_down", size_bytes / 1e9, "GB/s", down_ms)
    phase.rate("pinned_duplex", 2 * size_bytes / 1e9, "GB/s", both_ms)


def _matmul(phase: Phase) -> None:
    size = 64 if phase.quick else _MATMUL_SIZE
    left = torch.randn(size, size, dtype=torch.bfloat16, device=phase.device.torch_device)
    phase.rate("matmul", 2 * size**3 / 1e12, "TFLOP/s", phase.time_ms(lambda: left @ left))
