"""Row kernels equal torch's operations for every element type, bit by bit where only a sum is rounded."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import rms_norm

from attnstore_worker.model.rows import added_and_normalized, fits, normalized, rotate

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
EPSILON = 1e-5


def tolerance(dtype: torch.dtype) -> dict[str, float]:
    bound = {torch.float32: 1e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10}[dtype]
    return {"atol": bound, "rtol": bound}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 576), (7, 64), (130, 32)])
def test_a_norm_is_torchs(dtype: torch.dtype, shape: tuple[int, int]) -> None:
    torch.manual_seed(1)
    hidden, weight = (3 * torch.randn(shape)).to(dtype), torch.randn(shape[1]).to(dtype)
    expected = rms_norm(hidden.float(), (shape[1],), weight.float(), EPSILON).to(dtype)
    torch.testing.assert_close(normalized(hidden, weight, EPSILON), expected, **tolerance(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_sum_is_rounded_as_torch_rounds_it_and_the_norm_is_that_of_the_sum(dtype: torch.dtype) -> None:
    torch.manual_seed(2)
    hidden, delta, weight = torch.randn(50, 64).to(dtype), (torch.randn(50, 64) * 2**-6).to(dtype), torch.ones(64, dtype=dtype)
    hidden[0], delta[0] = 1.0, torch.finfo(dtype).eps * (torch.arange(64) % 8) / 4  # ties among them
    expected = hidden + delta
    got = added_and_normalized(hidden, delta, weight, EPSILON)
    assert torch.equal(hidden, expected)
    torch.testing.assert_close(got, rms_norm(expected.float(), (64,), None, EPSILON).to(dtype), **tolerance(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_not_a_number_stays_so_and_what_is_too_large_becomes_infinite(dtype: torch.dtype) -> None:
    largest = torch.finfo(dtype).max
    hidden = torch.zeros(1, 32, dtype=dtype)
    hidden[0, :3] = torch.tensor([torch.nan, largest, -largest])
    delta = torch.zeros(1, 32, dtype=dtype)
    delta[0, 1:3] = torch.tensor([largest, -largest])
    added_and_normalized(hidden, delta, torch.ones(32, dtype=dtype), EPSILON)
    assert hidden[0, 0].isnan()
    assert hidden[0, 1:3].tolist() == [torch.inf, -torch.inf]


@pytest.mark.parametrize("dtype", DTYPES)
def test_only_the_heads_that_are_to_be_turned_are(dtype: torch.dtype) -> None:
    torch.manual_seed(3)
    heads = torch.randn(9, 5, 64).to(dtype)
    before = heads.clone()
    angles = torch.randn(9, 32) * 100
    rotate(heads, 3, angles.cos(), angles.sin())
    assert torch.equal(heads[:, 3:], before[:, 3:])
    first, second = before[:, :3].float().chunk(2, dim=-1)
    cosines, sines = angles.cos().unsqueeze(1), angles.sin().unsqueeze(1)
    expected = torch.cat((first * cosines - second * sines, second * cosines + first * sines), dim=-1).to(dtype)
    torch.testing.assert_close(heads[:, :3], expected, **tolerance(dtype))


def test_rows_that_cannot_be_worked_on_sixteen_at_a_time_are_known() -> None:
    assert fits(576, 64)
    assert not fits(576, 80)
    assert not fits(570, 64)
