"""Products of a few rows with the rows of a matrix, against torch, for every element type."""

# mypy: disable-error-code="untyped-decorator,no-untyped-call,no-untyped-def"

from __future__ import annotations

from typing import Any

import pytest
import torch
from numba import njit

from attnstore.attention import dots, simd
from attnstore.attention.dots import COLUMNS, OUTPUTS, ROWS
from attnstore.attention.simd import ELEMENTS


@pytest.fixture(params=["as this machine does it", "few registers, no bf16 products"])
def machine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param != "as this machine does it":
        monkeypatch.setattr(simd, "HAS_BF16_PRODUCTS", False)
        monkeypatch.setattr(dots, "_TOGETHER", 1)


@pytest.mark.usefixtures("machine")
@pytest.mark.parametrize("ahead_bytes", [0, 4608])
@pytest.mark.parametrize("width", [COLUMNS, 5 * COLUMNS])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rows_are_multiplied_from_anywhere_to_anywhere(dtype: torch.dtype, width: int, ahead_bytes: int) -> None:
    compiled = dots._dot_rows(ahead_bytes)  # compiled again, for the simulated machine

    @njit
    def run(weights, inputs, outputs):
        compiled(weights, 7, inputs, 3, width, outputs, 2, 11)

    torch.manual_seed(5)
    weights, inputs = torch.randn(7 + OUTPUTS * width).to(dtype), torch.randn(3 + ROWS * width).to(dtype)
    outputs = torch.full((2 + ROWS * 11,), torch.nan)
    run(flat(weights), flat(inputs), outputs.numpy())
    expected = inputs[3:].view(ROWS, width).double() @ weights[7:].view(OUTPUTS, width).double().T
    got = torch.stack([outputs[2 + row * 11 : 2 + row * 11 + OUTPUTS] for row in range(ROWS)])
    torch.testing.assert_close(got, expected.float(), atol=1e-4, rtol=1e-5)
    assert int(outputs.isnan().sum()) == len(outputs) - ROWS * OUTPUTS


def flat(rows: torch.Tensor) -> Any:
    return rows.view(ELEMENTS[rows.dtype]).numpy()
