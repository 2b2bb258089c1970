"""Attention over pages scattered through memory equals the reference, and partials over any split merge to the whole."""

from __future__ import annotations

import itertools
import random

import pytest
import torch
from torch import Tensor

from attnstore.attention.in_place import Asked, InPlaceAttention, PagesInPlace, PreparedQuery
from attnstore.attention.merge import merge
from attnstore.attention.reference import ReferenceAttention
from attnstore.core.layout import DType, PageLayout
from attnstore.errors import InvalidArgument

LAYOUT = PageLayout(layers=2, kv_heads=2, head_dim=64, block_tokens=16, dtype=DType.FP32)
Q_HEADS = 6
SCALE = 0.125


@pytest.fixture(scope="module")
def attention() -> InPlaceAttention:
    return InPlaceAttention(threads=1)


def scattered(pages: Tensor, seed: int) -> list[memoryview]:
    """Copies pages to unaligned places in separate memory."""
    rng = random.Random(seed)
    views = []
    for page in pages:
        data = page.contiguous().view(torch.uint8).view(-1).numpy().tobytes()
        offset = 64 * rng.randrange(8)
        memory = bytearray(offset + len(data))
        memory[offset:] = data
        views.append(memoryview(memory)[offset:])
    return views


def bytes_of(rows: Tensor) -> memoryview:
    return memoryview(rows.numpy()).cast("B")


def prepared(attention: InPlaceAttention, layout: PageLayout, *asked: tuple[list[memoryview], Tensor]) -> PreparedQuery:
    """Returns a query whose rows are loaded."""
    sets = [PagesInPlace(layout, views) for views, _ in asked]
    query = attention.prepare(sets, [len(rows) for _, rows in asked], Asked(Q_HEADS, SCALE))
    query.load(bytes_of(torch.cat([rows for _, rows in asked])))
    return query


def result(query: PreparedQuery) -> tuple[Tensor, Tensor]:
    out, lse = (torch.frombuffer(bytearray(view), dtype=torch.float32) for view in (query.out, query.lse))
    return out.view(-1, Q_HEADS, LAYOUT.head_dim), lse.view(-1, Q_HEADS)


def reference(query: Tensor, pages: Tensor, layer: int) -> tuple[Tensor, Tensor]:
    """Attends from every row to every key of the pages, in fp32."""
    rows, blocks = len(query), len(pages)
    return ReferenceAttention().paged_attention(
        query,
        pages,
        torch.arange(blocks, dtype=torch.int32).unsqueeze(0),
        torch.tensor([blocks * LAYOUT.block_tokens], dtype=torch.int32),
        torch.tensor([0, rows], dtype=torch.int32),
        layer=layer,
        scale=SCALE,
        query_positions=torch.full((rows,), 1 << 20, dtype=torch.int32),
        out_dtype=torch.float32,
    )


@pytest.mark.parametrize("dtype", [DType.FP32, DType.FP16, DType.BF16])
@pytest.mark.parametrize("rows", [1, 3, 100])
def test_scattered_pages_give_what_the_reference_gives(attention: InPlaceAttention, dtype: DType, rows: int) -> None:
    torch.manual_seed(rows)
    layout = PageLayout(layers=2, kv_heads=2, head_dim=64, block_tokens=16, dtype=dtype)
    torch_dtype = {DType.FP32: torch.float32, DType.FP16: torch.float16, DType.BF16: torch.bfloat16}[dtype]
    pages = torch.randn(9, *layout.shape).to(torch_dtype)
    query = torch.randn(rows, Q_HEADS, layout.head_dim)
    views = scattered(pages, rows)
    asked = prepared(attention, layout, (views, query))
    for layer in (1, 0):  # the memory is used again
        asked.load(bytes_of(query))
        attention.attend([asked], layer)
        out, lse = result(asked)
        want_out, want_lse = reference(query, pages, layer)
        torch.testing.assert_close(out, want_out, rtol=0, atol=2e-5)
        torch.testing.assert_close(lse, want_lse, rtol=0, atol=2e-5)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("most", [3, 100])
def test_sets_and_queries_asked_together_are_answered_as_alone(threads: int, most: int) -> None:
    attention = InPlaceAttention(threads)
    torch.manual_seed(5)
    pages = torch.randn(300, *LAYOUT.shape)
    views = scattered(pages, 5)
    parts = [(0, 1, 1), (1, 9, most), (9, 300, 2)]
    asked = [(views[begin:end], torch.randn(rows, Q_HEADS, LAYOUT.head_dim)) for begin, end, rows in parts]
    alone = []
    for one in asked:
        query = prepared(attention, LAYOUT, one)
        attention.attend([query], 0)
        alone.append(result(query))
    together = prepared(attention, LAYOUT, *asked), prepared(attention, LAYOUT, asked[2])
    attention.attend(together, 0)
    for query, expected in zip(together, (alone, alone[2:]), strict=True):
        out, lse = result(query)
        torch.testing.assert_close(out, torch.cat([each[0] for each in expected]), rtol=0, atol=2e-6)
        torch.testing.assert_close(lse, torch.cat([each[1] for each in expected]), rtol=0, atol=2e-6)


@pytest.mark.parametrize("seed", range(8))
def test_partials_over_random_splits_merge_to_within_1e_5_of_the_reference(attention: InPlaceAttention, seed: int) -> None:
    rng = random.Random(seed)
    torch.manual_seed(seed)
    pages = torch.randn(24, *LAYOUT.shape)
    views = scattered(pages, seed)
    query = torch.randn(rng.choice([1, 2, 5]), Q_HEADS, LAYOUT.head_dim)
    cuts = sorted(rng.sample(range(1, 24), rng.randrange(1, 6)))
    ends = [0, *cuts, 24]
    splits = [views[begin:end] for begin, end in itertools.pairwise(ends)] + [[]]  # including an empty part
    rng.shuffle(splits)
    asked = [prepared(attention, LAYOUT, (part, query)) for part in splits]
    for one in asked:
        attention.attend([one], 0)
    outs, lses = zip(*map(result, asked), strict=True)
    out, lse = merge(outs, lses)
    want_out, want_lse = reference(query, pages, 0)
    assert float((out - want_out).norm() / want_out.norm()) < 1e-5
    assert float((lse - want_lse).abs().max() / want_lse.abs().max()) < 1e-5


@pytest.mark.parametrize("bad", [torch.inf, -torch.inf, torch.nan])
def test_a_row_that_is_not_finite_is_refused(attention: InPlaceAttention, bad: float) -> None:
    rows = torch.zeros(2, Q_HEADS, 64)
    query = prepared(attention, LAYOUT, (scattered(torch.zeros(1, *LAYOUT.shape), 0), rows))
    rows[1, 3, 7] = bad
    with pytest.raises(InvalidArgument, match="finite"):
        query.load(bytes_of(rows))


def test_rows_of_another_size_are_refused(attention: InPlaceAttention) -> None:
    rows = torch.zeros(2, Q_HEADS, 64)
    query = prepared(attention, LAYOUT, (scattered(torch.zeros(1, *LAYOUT.shape), 0), rows))
    with pytest.raises(InvalidArgument, match="bytes"):
        query.load(bytes_of(rows[:1]))


def test_rows_of_memory_that_is_read_only_are_loaded_too(attention: InPlaceAttention) -> None:
    torch.manual_seed(1)
    views, rows = scattered(torch.randn(2, *LAYOUT.shape), 0), torch.randn(2, Q_HEADS, 64)
    results = []
    for given in (bytes_of(rows), bytes(bytes_of(rows))):
        query = prepared(attention, LAYOUT, (views, rows * 0))
        query.load(given)
        attention.attend([query], 0)
        results.append(bytes(query.out))
    assert results[0] == results[1]


def test_opaque_pages_cannot_be_attended_to() -> None:
    layout = PageLayout(layers=1, kv_heads=1, head_dim=16, dtype=DType.OPAQUE)
    with pytest.raises(InvalidArgument, match="opaque"):
        PagesInPlace(layout, [memoryview(bytes(layout.page_bytes))])
