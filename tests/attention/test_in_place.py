"""Attention over pages scattered through memory equals the reference, and partials over any split merge to the whole."""

from __future__ import annotations

import itertools
import random

import pytest
import torch
from torch import Tensor

from attnstore.attention.in_place import InPlaceAttention, PagesInPlace, Rows, rows_from
from attnstore.attention.merge import merge
from attnstore.attention.reference import ReferenceAttention
from attnstore.copying import address_of
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
    [partial] = attention.attend([Rows(PagesInPlace(layout, views), query)], 1, SCALE)
    out, lse = reference(query, pages, 1)
    torch.testing.assert_close(partial.out, out, rtol=0, atol=2e-5)
    torch.testing.assert_close(partial.lse, lse, rtol=0, atol=2e-5)


def test_sets_asked_together_are_answered_as_alone(attention: InPlaceAttention) -> None:
    torch.manual_seed(5)
    pages = torch.randn(12, *LAYOUT.shape)
    views = scattered(pages, 5)
    parts = [(0, 1, 1), (1, 9, 3), (9, 12, 2)]
    asked = [
        Rows(PagesInPlace(LAYOUT, views[begin:end]), torch.randn(rows, Q_HEADS, LAYOUT.head_dim)) for begin, end, rows in parts
    ]
    together = attention.attend(asked, 0, SCALE)
    for one, partial in zip(asked, together, strict=True):
        [alone] = attention.attend([one], 0, SCALE)
        torch.testing.assert_close(partial.out, alone.out, rtol=0, atol=1e-6)
        torch.testing.assert_close(partial.lse, alone.lse, rtol=0, atol=1e-6)


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
    partials = [attention.attend([Rows(PagesInPlace(LAYOUT, part), query)], 0, SCALE)[0] for part in splits]
    out, lse = merge([partial.out for partial in partials], [partial.lse for partial in partials])
    want_out, want_lse = reference(query, pages, 0)
    assert float((out - want_out).norm() / want_out.norm()) < 1e-5
    assert float((lse - want_lse).abs().max() / want_lse.abs().max()) < 1e-5


def test_a_row_that_is_not_finite_is_refused() -> None:
    rows = torch.zeros(2, Q_HEADS, 64)
    rows[1, 3, 7] = torch.inf
    with pytest.raises(InvalidArgument, match="finite"):
        rows_from(memoryview(rows.numpy()).cast("B"), Q_HEADS, 64)


def test_opaque_pages_cannot_be_attended_to() -> None:
    layout = PageLayout(layers=1, kv_heads=1, head_dim=16, dtype=DType.OPAQUE)
    with pytest.raises(InvalidArgument, match="opaque"):
        PagesInPlace(layout, [memoryview(bytes(layout.page_bytes))])


def test_rows_of_memory_that_is_read_only_are_a_copy_because_torch_knows_only_memory_that_can_be_written() -> None:
    message = torch.arange(2 * Q_HEADS * 64, dtype=torch.float32).numpy().tobytes()
    rows = rows_from(message, Q_HEADS, 64)
    assert rows.numpy().tobytes() == message
    assert rows.data_ptr() != address_of(memoryview(message))
    received = memoryview(bytearray(message))
    assert rows_from(received, Q_HEADS, 64).data_ptr() == address_of(received)
