"""The operations on lanes, each against numpy or torch, for every element type."""

# mypy: disable-error-code="untyped-decorator,no-untyped-call,no-untyped-def"

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from numba import njit

from attnstore.attention import simd
from attnstore.attention.functions import tanh
from attnstore.attention.simd import (
    ELEMENTS,
    LANES,
    divide,
    dot,
    interleave,
    load,
    move,
    splat,
    store,
    total,
    transpose_pairs,
)

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def flat(rows: torch.Tensor) -> Any:
    return rows.view(ELEMENTS[rows.dtype]).view(-1).numpy()


def product(x: torch.Tensor, y: torch.Tensor) -> float:
    """Compiled again, for the machine that `simd` is made to assume."""

    @njit
    def compiled(x, y):
        sums = splat(np.float32(0.0))
        for at in range(0, x.shape[0], 2 * LANES):
            sums = dot(x, at, y, at, sums)
        return total(sums)

    return float(compiled(flat(x), flat(y)))


@pytest.mark.parametrize("with_instruction", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_dot_sums_products(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, with_instruction: bool) -> None:
    if with_instruction and not simd.HAS_BF16_PRODUCTS:
        pytest.skip("this machine multiplies no pairs of bf16")
    monkeypatch.setattr(simd, "HAS_BF16_PRODUCTS", with_instruction)
    torch.manual_seed(4)
    x, y = torch.randn(96).to(dtype), torch.randn(96).to(dtype)
    assert product(x, y) == pytest.approx(float(x.double() @ y.double()), abs=1e-4)


@pytest.mark.parametrize("with_instruction", [True, False])
def test_rounding_to_bf16_is_torchs(monkeypatch: pytest.MonkeyPatch, with_instruction: bool) -> None:
    if with_instruction and not simd.HAS_BF16_PRODUCTS:
        pytest.skip("this machine rounds to bf16 in several instructions only")
    monkeypatch.setattr(simd, "HAS_BF16_PRODUCTS", with_instruction)

    @njit
    def rounded(source, target):
        for at in range(0, source.shape[0], LANES):
            store(target, at, load(source, at))

    ties = 1.0 + torch.arange(64) * 2.0**-9  # every fourth is half-way between two bf16
    values = torch.cat((ties, -ties, torch.tensor([torch.inf, -torch.inf, 3.4e38, 0.0, -0.0] + [1e-30] * 11)))
    got = torch.empty(len(values), dtype=torch.bfloat16)
    rounded(values.numpy(), flat(got))
    assert torch.equal(got, values.bfloat16())


def test_divide_is_division() -> None:
    @njit
    def divided(x, y, target):
        store(target, 0, divide(load(x, 0), load(y, 0)))

    x, y = np.arange(1, 17, dtype=np.float32), np.arange(17, 1, -1, dtype=np.float32)
    target = np.empty(16, np.float32)
    divided(x, y, target)
    assert np.array_equal(target, x / y)


def test_tanh_is_tanh_and_keeps_nan() -> None:
    @njit
    def computed(source, target):
        for at in range(0, source.shape[0], LANES):
            store(target, at, tanh(load(source, at)))

    magnitudes = np.concatenate((np.geomspace(1e-30, 1e30, 4096), np.linspace(0.29, 0.31, 496), [0.0, np.inf] * 8))
    source = np.concatenate((magnitudes, -magnitudes)).astype(np.float32)
    target = np.empty_like(source)
    computed(source, target)
    np.testing.assert_allclose(target, np.tanh(source.astype(np.float64)), rtol=5e-7, atol=0)
    source[3] = np.nan
    computed(source, target)
    assert np.flatnonzero(np.isnan(target)).tolist() == [3]


@pytest.mark.parametrize("dtype", DTYPES)
def test_move_moves_bits_from_anywhere_to_anywhere(dtype: torch.dtype) -> None:
    @njit
    def moved(target, source):
        move(target, 3, source, 5)

    source, target = torch.randn(40).to(dtype), torch.zeros(40, dtype=dtype)
    source[7] = torch.nan
    moved(flat(target), flat(source))
    assert np.array_equal(flat(target)[3:19], flat(source)[5:21], equal_nan=True)
    assert not target[:3].any()
    assert not target[19:].any()


@pytest.mark.parametrize("keeps", [(True, True), (True, False), (False, True), (False, False)])
def test_interleave_takes_turns(keeps: tuple[bool, bool]) -> None:
    @njit
    def interleaved(target, source, first, second):
        interleave(target, 1, source, 2, 30, first, second)

    source, target = np.arange(50, dtype=np.uint16) + 1, np.zeros(40, np.uint16)
    interleaved(target, source, *keeps)
    expected = np.stack((source[2:18] * keeps[0], source[30:46] * keeps[1]), axis=1).reshape(-1)
    assert np.array_equal(target[1:33], expected)


def test_transpose_pairs_puts_the_same_pair_of_four_rows_side_by_side() -> None:
    @njit
    def transposed(target, source):
        transpose_pairs(target, 4, 12, source, 1, 40)

    source, target = np.arange(200, dtype=np.uint16), np.zeros(4 + 16 * 12, np.uint16)
    transposed(target, source)
    for pair in range(16):
        row = target[4 + pair * 12 : 4 + pair * 12 + 8]
        assert row.tolist() == [1 + step * 40 + 2 * pair + element for step in range(4) for element in range(2)]
