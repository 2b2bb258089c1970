"""Attention over latent pages: the CPU's kernel against the reference, and the reference against plain attention."""

from __future__ import annotations

import itertools
import random
from typing import Any

import pytest
import torch
from torch import Tensor

from attnstore.attention import merge
from attnstore.attention.base import LatentAttention
from attnstore.attention.latent import CpuLatentAttention, latent_rows
from attnstore.attention.reference import ReferenceLatentAttention
from attnstore.attention.warm_up import warm_up_latents
from attnstore.core.layout import DType, PageLayout
from tests.attention.cases import assert_close

CPU, REFERENCE = CpuLatentAttention(), ReferenceLatentAttention()
SHAPES = ((576, 512, 4), (64, 32, 5), (32, 32, 7), (96, 64, 16), (288, 256, 1))
"""`row_dim`, `value_dim` and heads: DeepSeek's with few heads, MiniCPM 3's, and numbers of heads that registers do not divide."""


class Case:
    """One call on either backend: sequences of `(context tokens, query rows)`, in scattered blocks of two layers."""

    def __init__(self, seed: int, phases: list[tuple[int, int]], shape: tuple[int, int, int], **changes: Any) -> None:
        torch.manual_seed(seed)
        rng = random.Random(seed)
        row_dim, value_dim, heads = shape
        dtype = changes.pop("dtype", torch.float32)
        block_tokens = changes.pop("block_tokens", rng.choice([1, 4, 16, 20, 64]))
        context_lens, query_lens = zip(*phases, strict=True)
        blocks = max(1, *(-(-tokens // block_tokens) for tokens in context_lens))
        self.query = torch.randn(sum(query_lens), heads, row_dim)
        self.pool = torch.randn(len(phases) * blocks, 2, block_tokens, row_dim).to(dtype)
        self.tables = torch.randperm(len(self.pool), dtype=torch.int32).view(len(phases), blocks)
        self.context_lens = torch.tensor(context_lens, dtype=torch.int32)
        self.starts = torch.tensor([0, *query_lens], dtype=torch.int32).cumsum(0).int()
        self.keywords = {"layer": 1, "scale": row_dim**-0.5, "value_dim": value_dim, **changes}

    def run(self, backend: LatentAttention) -> tuple[Tensor, Tensor]:
        return backend.paged_attention(self.query, self.pool, self.tables, self.context_lens, self.starts, **self.keywords)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("window", [None, 1, 70])
def test_any_batch_agrees_with_the_reference(shape: tuple[int, int, int], dtype: torch.dtype, window: int | None) -> None:
    """A batch with decode, an empty part, verification, a whole prompt, and a later chunk."""
    phases = [(1, 1), (0, 0), (97, 1), (0, 2), (83, 5), (60, 60), (207, 50)]
    case = Case(SHAPES.index(shape), phases, shape, dtype=dtype, sliding_window=window)
    assert_close(case.run(CPU), case.run(REFERENCE))


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("rows", [1, 3, 40])
def test_cutting_the_work_between_threads_does_not_change_the_result(threads: int, rows: int) -> None:
    case = Case(rows, [(3000, rows), (700, rows)], (96, 64, 16), block_tokens=16)
    assert_close(case.run(CpuLatentAttention(threads)), case.run(REFERENCE))


def test_the_heads_of_deepseek_v3_agree() -> None:
    case = Case(3, [(300, 2)], (576, 512, 128), dtype=torch.bfloat16, block_tokens=16, sliding_window=None)
    assert_close(case.run(CPU), case.run(REFERENCE))


def test_rows_may_see_windows_far_apart() -> None:
    positions = torch.randint(-3, 2100, (60,), dtype=torch.int32)
    case = Case(1, [(2000, 60)], (64, 32, 5), query_positions=positions, sliding_window=20, block_tokens=16)
    assert_close(case.run(CPU), case.run(REFERENCE))


@pytest.mark.parametrize("rows", [1, 40])
@pytest.mark.parametrize("window", [None, 50])
def test_what_no_row_sees_is_never_read(rows: int, window: int | None) -> None:
    """Neither the tokens behind the context in its last block, nor those before the window in its first."""
    case = Case(rows, [(83, rows)], (64, 32, 5), block_tokens=16, sliding_window=window)
    want = case.run(REFERENCE)
    case.pool[case.tables[0, 83 // 16].long(), :, 83 % 16 :] = torch.nan
    if window is not None:
        first = max(0, 83 - rows + 1 - window)
        case.pool[case.tables[0, first // 16].long(), :, : first % 16] = torch.nan
        case.pool[case.tables[0, : first // 16].long()] = torch.nan
    case.pool[:, 0] = torch.nan  # the other layer
    assert_close(case.run(CPU), want)


@pytest.mark.parametrize("rows", [1, 2, 33])
def test_partials_over_parts_of_the_keys_merge_to_the_whole(rows: int) -> None:
    case = Case(rows, [(200, rows)], (64, 32, 5), block_tokens=16)
    positions = torch.arange(200 - rows, 200, dtype=torch.int32)
    parts = []
    for begin, end in itertools.pairwise((0, 3, 3, 4, 13)):
        keys = torch.tensor([min(200, end * 16) - begin * 16], dtype=torch.int32)
        tables, relative = case.tables[:, begin:].contiguous(), positions - begin * 16
        parts.append(
            CPU.paged_attention(case.query, case.pool, tables, keys, case.starts, **case.keywords, query_positions=relative)
        )
    assert_close(merge(*zip(*parts, strict=True)), case.run(REFERENCE))


def test_partials_of_16_bit_queries_come_in_fp32_where_asked() -> None:
    case = Case(1, [(100, 3)], (96, 64, 16), dtype=torch.bfloat16)
    case.query = case.query.bfloat16()
    for out_dtype in (None, torch.float32):
        case.keywords["out_dtype"] = out_dtype
        got = case.run(CPU)
        assert got[0].is_contiguous()
        assert_close(got, case.run(REFERENCE))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_warming_up_leaves_the_pool_as_it_was(dtype: torch.dtype) -> None:
    pool = torch.randn(2, 1, 16, 64).to(dtype)
    before = pool.clone()
    warm_up_latents(CPU, pool)
    assert torch.equal(pool, before)


def test_a_batch_without_rows_is_an_empty_result() -> None:
    out, lse = Case(1, [(30, 0)], (64, 32, 5)).run(CPU)
    assert out.shape == (0, 5, 32)
    assert lse.shape == (0, 5)


def test_a_pool_of_pages_is_seen_as_rows_in_place() -> None:
    """Pages as a node keeps them, whatever lies between two of them."""
    layout = PageLayout.of_latents(layers=3, row_dim=64, block_tokens=16, dtype=DType.FP32)
    pages = torch.randn(5, layout.layers, layout.block_tokens, layout.row_dim)
    memory = torch.full((5, layout.page_bytes // 4 + 24), torch.nan)
    memory[:, : pages[0].numel()] = pages.flatten(1)
    inner = torch.empty(layout.shape, device="meta").stride()
    rows = latent_rows(memory.as_strided((5, *layout.shape), (memory.stride(0), *inner)), layout)
    assert rows.data_ptr() == memory.data_ptr()
    assert torch.equal(rows, pages)
    case = Case(2, [(80, 2)], (64, 32, 5), block_tokens=16)
    case.pool, case.tables = rows, torch.tensor([[3, 0, 4, 1, 2]], dtype=torch.int32)
    got = case.run(CPU)
    case.pool = pages
    assert_close(got, case.run(REFERENCE))
