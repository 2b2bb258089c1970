"""Sizes, slices and refusals of `PageLayout`."""

from __future__ import annotations

import dataclasses
from itertools import pairwise

import pytest

from attnstore.core.layout import DType, PageLayout
from attnstore.errors import InvalidArgument
from attnstore.limits import LATENT_DIM_MAX, LATENT_DIM_STEP, PAGE_BYTES_MAX

LAYOUT = PageLayout(layers=30, kv_heads=3, head_dim=64, dtype=DType.FP32)


def test_the_page_size_is_the_product_of_its_shape() -> None:
    elements = 1
    for extent in LAYOUT.shape:
        elements *= extent
    assert LAYOUT.page_bytes == elements * 4 == 737_280


def test_layer_slices_tile_the_page() -> None:
    slices = [LAYOUT.layer_slice(layer, layer + 1) for layer in range(LAYOUT.layers)]
    assert slices[0][0] == 0
    assert slices[-1][1] == LAYOUT.page_bytes
    assert all(left[1] == right[0] for left, right in pairwise(slices))


def test_layer_end_zero_means_all_layers() -> None:
    assert LAYOUT.layer_slice(0, 0) == (0, LAYOUT.page_bytes)
    assert LAYOUT.layer_slice(29, 0) == (29 * LAYOUT.layer_bytes, LAYOUT.page_bytes)


@pytest.mark.parametrize(("begin", "end"), [(-1, 2), (3, 3), (5, 4), (0, 31), (30, 0)])
def test_a_layer_range_outside_the_layout_is_refused(begin: int, end: int) -> None:
    with pytest.raises(InvalidArgument, match="layer range"):
        LAYOUT.layer_slice(begin, end)


@pytest.mark.parametrize("field", ["layers", "kv_heads", "head_dim", "block_tokens", "tp_size"])
@pytest.mark.parametrize("value", [0, -1, (1 << 20) + 1])
def test_a_field_out_of_range_is_refused_by_name(field: str, value: int) -> None:
    with pytest.raises(InvalidArgument, match=f"layout.{field} is {value}"):
        dataclasses.replace(LAYOUT, **{field: value})


@pytest.mark.parametrize(("rank", "size"), [(1, 1), (-1, 2), (8, 8)])
def test_a_rank_outside_its_group_is_refused(rank: int, size: int) -> None:
    with pytest.raises(InvalidArgument, match="tp_rank"):
        dataclasses.replace(LAYOUT, tp_rank=rank, tp_size=size)


def test_a_page_over_the_maximum_is_refused_and_one_at_the_maximum_is_not() -> None:
    largest = PageLayout(layers=1, kv_heads=1, head_dim=1 << 20, block_tokens=PAGE_BYTES_MAX >> 21, dtype=DType.OPAQUE)
    assert largest.page_bytes == PAGE_BYTES_MAX
    with pytest.raises(InvalidArgument, match="fewer block_tokens"):
        dataclasses.replace(largest, layers=2)


@pytest.mark.parametrize("row_dim", [576, 48])
def test_a_page_of_latents_has_one_row_for_each_token_and_layer(row_dim: int) -> None:
    layout = PageLayout.of_latents(layers=3, row_dim=row_dim, block_tokens=16, dtype=DType.BF16)
    assert layout.row_dim == row_dim
    assert layout.layer_bytes == 16 * row_dim * 2
    assert layout.page_bytes == 3 * 16 * row_dim * 2


def test_latents_that_no_layout_can_have_are_refused() -> None:
    with pytest.raises(InvalidArgument, match="even"):
        PageLayout.of_latents(layers=1, row_dim=575)
    layout = PageLayout.of_latents(layers=1, row_dim=576)
    layout.check_latents(512)
    layout.check_latents(576)
    for value_dim in (0, 500, 608):
        with pytest.raises(InvalidArgument, match="value_dim"):
            layout.check_latents(value_dim)
    with pytest.raises(InvalidArgument, match="3 kv_heads"):
        LAYOUT.check_latents(64)
    for row_dim in (16, 48, LATENT_DIM_MAX + LATENT_DIM_STEP):
        with pytest.raises(InvalidArgument, match="row_dim"):
            PageLayout.of_latents(layers=1, row_dim=row_dim).check_latents(32)


@pytest.mark.parametrize("dtype", list(DType))
def test_a_dtype_survives_its_code(dtype: DType) -> None:
    assert DType.from_code(dtype.code) is dtype


@pytest.mark.parametrize("code", [0, 5, -1])
def test_an_unknown_dtype_code_is_refused(code: int) -> None:
    with pytest.raises(InvalidArgument, match="dtype code"):
        DType.from_code(code)
