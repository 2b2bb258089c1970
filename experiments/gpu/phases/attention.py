"""Paged attention: decode against the speed of reading memory, prefill against torch's flash attention."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional

from attnstore.attention.triton import TritonAttention
from experiments.gpu import targets
from experiments.gpu.phase import Phase

_BLOCK_TOKENS = 16
_PREFILL_TOKENS = 8192
_QUICK_SHARE = 128
_SEED = 12


@dataclass(frozen=True, slots=True)
class _Shape:
    """A batch of one decode step. `layers`: of one pool, so that a call does not find its keys in the cache of the last one."""

    q_heads: int
    kv_heads: int
    head_dim: int
    contexts: tuple[int, ...]
    layers: int = 1

    @property
    def read_bytes(self) -> int:
        """Returns the bytes of all keys and values that one call for each layer reads, in bf16."""
        return self.layers * sum(self.contexts) * 2 * self.kv_heads * self.head_dim * 2


_DECODE = {
    "llama-3-8b 64 x 8k": _Shape(32, 8, 128, (8192,) * 64),
    "llama-3-8b 1 x 32k": _Shape(32, 8, 128, (32768,), layers=16),
    "smollm2 64 x 2k": _Shape(9, 3, 64, (2048,) * 64, layers=16),
    "llama-3-8b 1 x 128k + 63 x 1k": _Shape(32, 8, 128, (131072, *(1024,) * 63), layers=2),
}


def run(phase: Phase) -> None:
    """Measures each shape."""
    torch.manual_seed(_SEED)
    for name, shape in _DECODE.items():
        if phase.quick:
            contexts = tuple(max(1, tokens // _QUICK_SHARE) for tokens in shape.contexts[:4])
            shape = replace(shape, contexts=contexts, layers=1)
        took_ms = _decode(phase, shape)
        target = targets.ATTENTION_DECODE[name]
        phase.rate(f"decode attention, {name}", shape.read_bytes / 1e9, "GB/s", took_ms, against="hbm_read", target=target)
    _prefill(phase)


def _decode(phase: Phase, shape: _Shape) -> float | None:
    device = phase.device.torch_device
    pool, tables = _pages(shape.kv_heads, shape.head_dim, shape.contexts, shape.layers, device)
    query = torch.randn(len(shape.contexts), shape.q_heads, shape.head_dim, dtype=torch.bfloat16, device=device)
    contexts = torch.tensor(shape.contexts, dtype=torch.int32, device=device)
    starts = torch.arange(len(shape.contexts) + 1, dtype=torch.int32, device=device)
    backend, scale = TritonAttention(), shape.head_dim**-0.5

    def step() -> None:
        for layer in range(shape.layers):
            backend.paged_attention(query, pool, tables, contexts, starts, layer=layer, scale=scale)

    return phase.time_ms(step)


def _prefill(phase: Phase) -> None:
    device, tokens = phase.device.torch_device, _PREFILL_TOKENS // _QUICK_SHARE if phase.quick else _PREFILL_TOKENS
    q_heads, kv_heads, head_dim = 32, 8, 128
    pool, tables = _pages(kv_heads, head_dim, (tokens,), 1, device)
    query = torch.randn(tokens, q_heads, head_dim, dtype=torch.bfloat16, device=device)
    contexts = torch.tensor([tokens], dtype=torch.int32, device=device)
    starts = torch.tensor([0, tokens], dtype=torch.int32, device=device)
    backend, scale = TritonAttention(), head_dim**-0.5
    ours_ms = phase.time_ms(lambda: backend.paged_attention(query, pool, tables, contexts, starts, layer=0, scale=scale))
    keys, values = torch.randn(2, 1, kv_heads, tokens, head_dim, dtype=torch.bfloat16, device=device)
    dense = query.transpose(0, 1)[None]
    theirs_ms = phase.time_ms(
        lambda: functional.scaled_dot_product_attention(dense, keys, values, is_causal=True, scale=scale, enable_gqa=True)
    )
    flops = 2 * 2 * q_heads * head_dim * tokens * (tokens + 1) / 2
    if ours_ms is not None and theirs_ms is not None:
        phase.compare(
            "prefill attention, llama-3-8b 8k",
            flops / ours_ms / 1e9,
            "TFLOP/s",
            "torch's flash attention",
            theirs_ms / ours_ms,
            targets.ATTENTION_PREFILL,
        )


def _pages(kv_heads: int, head_dim: int, contexts: Sequence[int], layers: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Returns a pool of random pages, and block tables that scatter each context over it."""
    blocks = [-(-tokens // _BLOCK_TOKENS) for tokens in contexts]
    pool = torch.empty(sum(blocks), layers, 2, kv_heads, _BLOCK_TOKENS, head_dim, dtype=torch.bfloat16, device=device).normal_()
    order = torch.randperm(sum(blocks)).int()
    tables = torch.zeros(len(contexts), max(blocks), dtype=torch.int32)
    for row, own in zip(tables, order.split_with_sizes(blocks), strict=True):
        row[: len(own)] = own
    return pool, tables.to(device)
