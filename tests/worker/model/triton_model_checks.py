"""Checks that `test_device_model` runs in a process of its own: the model on a device with Triton, interpreted or on a GPU.

The row kernels against the same operations in fp64; the decoder against the CPU's decoder on the same weights.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import cast

import pytest
import torch
import triton
from torch import Tensor
from torch.nn import functional

from attnstore.attention import AttentionBackend, create_attention
from attnstore.core.layout import DType
from attnstore_worker.device.base import Device
from attnstore_worker.model import LoadedModel, load_model
from attnstore_worker.model.attention import PagedStep, at_once
from attnstore_worker.model.llama_device import DeviceLlamaDecoder
from attnstore_worker.model.triton_rows import gated, normalized, rotated_and_put
from tests.worker.model.devices import TritonDevice

DEVICE = "cpu" if triton.knobs.runtime.interpret else "cuda"
ROUNDING = {torch.float32: 2e-6, torch.float16: 2**-10, torch.bfloat16: 2**-7}
"""Of a value: a rounding to the type, and what fp32 loses before it."""

EPSILON = 1e-5
DTYPES = pytest.mark.parametrize("dtype", list(ROUNDING), ids=str)


def drawn(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    torch.manual_seed(seed + sum(shape))
    return torch.randn(*shape).to(dtype).to(DEVICE)


def assert_near(got: Tensor, expected: Tensor, scale: float = 1.0) -> None:
    tolerance = scale * ROUNDING[got.dtype]
    torch.testing.assert_close(got.double(), expected.double(), rtol=tolerance, atol=tolerance)


@DTYPES
@pytest.mark.parametrize("width", [64, 80, 576, 4096])
def test_a_norm_is_that_of_fp64_rounded(dtype: torch.dtype, width: int) -> None:
    hidden, weight = drawn(3, width, dtype=dtype), drawn(width, dtype=dtype, seed=1)
    exact = functional.rms_norm(hidden.double(), (width,), weight.double(), EPSILON)
    assert_near(normalized(hidden, weight, EPSILON), exact)


@DTYPES
@pytest.mark.parametrize("width", [64, 576])
def test_a_sum_is_rounded_before_its_norm(dtype: torch.dtype, width: int) -> None:
    hidden, delta, weight = (drawn(*shape, dtype=dtype) for shape in ((5, width), (5, width), (width,)))
    total = hidden + delta
    got = normalized(hidden, weight, EPSILON, delta)
    torch.testing.assert_close(hidden, total, rtol=0, atol=0)
    assert_near(got, functional.rms_norm(total.double(), (width,), weight.double(), EPSILON))


@DTYPES
@pytest.mark.parametrize("width", [128, 1500])
def test_a_gated_product_is_that_of_fp64_rounded(dtype: torch.dtype, width: int) -> None:
    rows = drawn(4, 2 * width, dtype=dtype)
    gate, up = rows.double().chunk(2, dim=1)
    assert_near(gated(rows), functional.silu(gate) * up)


@DTYPES
@pytest.mark.parametrize(("q_heads", "kv_heads", "head_dim"), [(3, 1, 64), (9, 3, 80), (2, 2, 96), (4, 1, 128)])
def test_queries_are_rotated_and_keys_and_values_stored(dtype: torch.dtype, q_heads: int, kv_heads: int, head_dim: int) -> None:
    block_tokens, layers, layer, rows = 16, 2, 1, 5
    heads = drawn(rows, q_heads + 2 * kv_heads, head_dim, dtype=dtype)
    angles = drawn(40, head_dim // 2, seed=3)
    positions = torch.tensor([0, 39, 7, 16, 2], device=DEVICE)
    blocks, offsets = torch.tensor([4, 0, 4, 2, 3], device=DEVICE), torch.tensor([0, 15, 3, 8, 1], device=DEVICE)
    pool = torch.full((5, layers, 2, kv_heads, block_tokens, head_dim), 7.0, dtype=dtype, device=DEVICE)
    query = rotated_and_put(heads, (angles.cos(), angles.sin()), positions, (blocks, offsets), pool, layer)

    turns = torch.polar(torch.ones_like(angles), angles).to(torch.complex128)[positions][:, None]
    first, second = heads.double().chunk(2, dim=-1)
    turned = torch.complex(first, second) * turns
    exact = torch.cat((turned.real, turned.imag), dim=-1)
    assert_near(query, exact[:, :q_heads])
    stored = pool[blocks, layer, :, :, offsets]
    assert_near(stored[:, 0], exact[:, q_heads : q_heads + kv_heads])
    assert torch.equal(stored[:, 1], heads[:, q_heads + kv_heads :])
    untouched = torch.ones((*pool.shape[:2], block_tokens), dtype=torch.bool, device=DEVICE)
    untouched[blocks, layer, offsets] = False
    assert (pool.permute(0, 1, 4, 2, 3, 5)[untouched] == 7.0).all()


@pytest.fixture(scope="module")
def on_device(tiny_folder: Path) -> LoadedModel:
    """The tiny model, which has passed its self-test on the device."""
    return load_model(tiny_folder, DType.FP32, device=cast(Device, TritonDevice(torch.device(DEVICE))))


@dataclass(frozen=True)
class Chunks:
    """Chunks `[begin, end)` of sequences of random tokens, whose earlier tokens are computed already, and rows of padding."""

    spans: tuple[tuple[int, int], ...]
    padding: int = 0


BLOCK_TOKENS = 16
PREFILL = Chunks(((0, 40),))
DECODE = Chunks(((40, 41), (7, 8), (16, 17)))
MIXED = Chunks(((32, 60), (3, 4), (0, 21), (15, 17)))
PADDED = Chunks(((40, 41), (7, 8), (16, 17)), padding=5)
BATCHES = {"prefill": PREFILL, "decode": DECODE, "mixed": MIXED, "padded": PADDED}


def blocks_of(tokens: int) -> int:
    return -(-tokens // BLOCK_TOKENS)


def computed(model: LoadedModel, backend: AttentionBackend, chunks: Chunks, place: str, poison: float) -> Tensor:
    """Returns the logits of the chunks' rows, after a first step that computes what comes before them.

    Memory that no token was written to holds `poison`, as does the scratch block of padding rows, which is block 0.
    """
    layout = model.layout(BLOCK_TOKENS)
    sizes = [blocks_of(end) for _, end in chunks.spans]
    ids = range(sum(sizes), 0, -1)
    tables = [list(ids[end - size : end]) for size, end in zip(sizes, accumulate(sizes), strict=True)]
    pool = torch.full((1 + sum(sizes), *layout.shape), poison, device=place)
    tokens = [[random.Random(number).randrange(3, 49_000) for _ in range(end)] for number, (_, end) in enumerate(chunks.spans)]
    widest = max(sizes)

    def run(spans: list[tuple[int, int]], padding: int) -> Tensor:
        padded = range(padding)
        positions = [position for begin, end in spans for position in range(begin, end)] + [0 for _ in padded]
        token_ids = [token for (begin, end), known in zip(spans, tokens, strict=True) for token in known[begin:end]]
        blocks = [table[p // BLOCK_TOKENS] for (begin, end), table in zip(spans, tables, strict=True) for p in range(begin, end)]
        lengths = [end - begin for begin, end in spans] + [1 for _ in padded]
        step = PagedStep(
            backend=backend,
            pool=pool,
            slot_blocks=torch.tensor(blocks + [0 for _ in padded], device=place),
            slot_offsets=torch.tensor(positions, device=place) % BLOCK_TOKENS,
            block_tables=torch.tensor(
                [table + [0] * (widest - len(table)) for table in tables] + [[0] * widest for _ in padded],
                dtype=torch.int32,
                device=place,
            ),
            context_lens=torch.tensor([end for _, end in spans] + [1 for _ in padded], dtype=torch.int32, device=place),
            query_starts=torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=place),
            before_layer=at_once,
        )
        rows = torch.arange(len(token_ids), device=place)
        padded_ids = torch.tensor(token_ids + [0 for _ in padded], device=place)
        return model.decoder.logits(padded_ids, torch.tensor(positions, device=place), rows, step)

    if any(begin for begin, _ in chunks.spans):
        run([(0, begin) for begin, _ in chunks.spans], 0)
    return run(list(chunks.spans), chunks.padding).cpu()


@pytest.mark.parametrize("chunks", BATCHES.values(), ids=BATCHES)
def test_logits_are_those_of_the_cpus_decoder(tiny: LoadedModel, on_device: LoadedModel, chunks: Chunks) -> None:
    assert isinstance(on_device.decoder, DeviceLlamaDecoder)
    expected = computed(tiny, create_attention("cpu"), replace(chunks, padding=0), "cpu", 0.0)
    got = computed(on_device, create_attention("triton"), chunks, DEVICE, math.nan)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(got.argmax(dim=-1), expected.argmax(dim=-1))
