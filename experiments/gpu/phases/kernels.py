"""Kernels against the same operations in fp64, with memory that holds NaN before it is written."""

from __future__ import annotations

import math
import random

import torch
from torch import Tensor
from torch.nn import functional

from attnstore.attention import create_attention
from attnstore.attention.triton import TritonAttention
from attnstore_worker.model.triton_rows import gated, normalized
from experiments.gpu.phase import Phase

_TOLERANCE = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
_BATCHES = {
    "prefill": [(200, 200)],
    "decode": [(1, 1), (900, 1), (33, 1)],
    "mixed": [(600, 130), (40, 1), (17, 17), (0, 0)],
    "drafts": [(300, 5), (64, 4)],
}
_HEADS = ((3, 9, 64), (8, 32, 128), (2, 4, 96))
_EPSILON = 1e-5
_SEED = 13


def run(phase: Phase) -> None:
    """Compares every kernel."""
    torch.manual_seed(_SEED)
    for dtype in _TOLERANCE:
        for heads in _HEADS[:1] if phase.quick else _HEADS:
            for name, batch in _BATCHES.items():
                _attention(phase, dtype, heads, name, batch)
        _rows(phase, dtype)


def _attention(phase: Phase, dtype: torch.dtype, heads: tuple[int, int, int], name: str, batch: list[tuple[int, int]]) -> None:
    kv_heads, q_heads, head_dim = heads
    if phase.quick:
        batch = [(keys // 8, min(rows, keys // 8)) for keys, rows in batch]
    device, block_tokens = phase.device.torch_device, 16
    blocks = [max(1, -(-keys // block_tokens)) for keys, _ in batch]
    pool = torch.randn(sum(blocks), 2, 2, kv_heads, block_tokens, head_dim).to(dtype)
    order = random.Random(_SEED).sample(range(len(pool)), len(pool))
    tables = torch.zeros(len(batch), max(blocks), dtype=torch.int32)
    for row, count in zip(tables, blocks, strict=True):
        row[:count] = torch.tensor([order.pop() for _ in range(count)])
    contexts = torch.tensor([keys for keys, _ in batch], dtype=torch.int32)
    starts = torch.tensor([0, *(rows for _, rows in batch)], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    query = torch.randn(int(starts[-1]), q_heads, head_dim).to(dtype)
    call = (query, pool, tables, contexts, starts)
    _poison(phase, query.numel() * 8)
    out, lse = TritonAttention().paged_attention(*(each.to(device) for each in call), layer=1, scale=head_dim**-0.5)
    expected_out, expected_lse = create_attention("reference").paged_attention(*call, layer=1, scale=head_dim**-0.5)
    error = max(_difference(out, expected_out), _difference(lse, expected_lse) / 10)
    label = f"attention, {name}, {q_heads} x {head_dim}, {str(dtype).removeprefix('torch.')}"
    phase.rows.check(label, error <= _TOLERANCE[dtype], f"largest difference {error:.2g}")


def _rows(phase: Phase, dtype: torch.dtype) -> None:
    device = phase.device.torch_device
    rows, width = (3, 64) if phase.quick else (100, 4096)
    hidden, weight = torch.randn(rows, width).to(dtype), torch.randn(width).to(dtype)
    _poison(phase, hidden.numel() * 4)
    normed = normalized(hidden.to(device), weight.to(device), _EPSILON)
    exact = functional.rms_norm(hidden.double(), (width,), weight.double(), _EPSILON)
    product = gated(hidden.to(device))
    gate, up = hidden.double().chunk(2, dim=1)
    for name, got, expected in (("norm", normed, exact), ("gated product", product, functional.silu(gate) * up)):
        error = _difference(got, expected) / float(expected.abs().max())
        phase.rows.check(f"{name}, {str(dtype).removeprefix('torch.')}", error <= _TOLERANCE[dtype], f"largest error {error:.2g}")


def _poison(phase: Phase, size_bytes: int) -> None:
    """Fills memory that the allocator will hand out next with NaN."""
    torch.full((size_bytes,), math.nan, dtype=torch.float32, device=phase.device.torch_device)


def _difference(got: Tensor, expected: Tensor) -> float:
    """Returns the largest absolute difference; infinite where only one is not finite."""
    left, right = got.double().cpu(), expected.double().cpu()
    same = (left == right) | (left.isnan() & right.isnan())
    return float(torch.where(same, 0.0, (left - right).abs().nan_to_num(nan=math.inf)).max()) if left.numel() else 0.0
