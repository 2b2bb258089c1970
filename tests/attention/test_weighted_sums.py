"""Weighted sums of rows, against torch, on machines with many registers and with few."""

# mypy: disable-error-code="untyped-decorator,no-untyped-call,no-untyped-def"

from __future__ import annotations

import pytest
import torch
from numba import njit

from attnstore.attention import weighted_sums
from attnstore.attention.dots import ROWS
from attnstore.attention.simd import LANES


@pytest.mark.parametrize("together", [1, 4])
@pytest.mark.parametrize("results", [1, ROWS])
@pytest.mark.parametrize("columns", [LANES, 7 * LANES])
def test_what_is_kept_and_the_weighted_rows_are_summed_and_nothing_else_is_written(
    monkeypatch: pytest.MonkeyPatch, together: int, results: int, columns: int
) -> None:
    monkeypatch.setattr(weighted_sums, "_TOGETHER", together)
    compiled = weighted_sums._sums(results)  # compiled again, for the simulated machine
    width, stride, tokens = columns + 3, columns + 5, 9

    @njit
    def run(outs, keeps, weights, rows, columns):
        compiled(outs, 2, stride, keeps, weights, 1, 11, rows, width, 3, tokens, columns)

    torch.manual_seed(columns + results)
    outs = torch.randn(2 + results * stride)
    keeps, weights, rows = torch.rand(results), torch.randn(1 + results * 11), torch.randn(tokens * width)
    before = outs.clone()
    run(outs.numpy(), keeps.numpy(), weights.numpy(), rows.numpy(), columns)
    shares = weights[1:].view(results, 11)[:, 3:tokens]
    expected = before.clone()
    for result in range(results):
        at = slice(2 + result * stride, 2 + result * stride + columns)
        expected[at] = before[at] * keeps[result] + shares[result] @ rows.view(tokens, width)[3:, :columns]
    torch.testing.assert_close(outs, expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(outs[:2], before[:2])
