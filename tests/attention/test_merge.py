"""Merging partial results."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attnstore.attention import create_attention, merge
from attnstore.attention.factory import AttentionName
from attnstore.errors import InvalidArgument
from tests.attention.cases import paged


@settings(deadline=None, max_examples=60, derandomize=True)
@given(keys=st.integers(1, 80), cuts=st.lists(st.integers(0, 80), max_size=6), seed=st.integers(0, 2**16))
def test_any_split_merges_to_the_whole_within_1e_5(keys: int, cuts: list[int], seed: int) -> None:
    """Cuts may coincide, so some parts have no key or one key."""
    torch.manual_seed(seed)
    query, pool = torch.randn(2, 6, 64), torch.randn(keys, 1, 2, 2, 1, 64)
    reference = create_attention("reference")

    def part(begin: int, end: int) -> tuple[torch.Tensor, torch.Tensor]:
        return reference.paged_attention(
            query,
            pool,
            torch.arange(begin, end, dtype=torch.int32).view(1, -1),
            torch.tensor([end - begin], dtype=torch.int32),
            torch.tensor([0, 2], dtype=torch.int32),
            layer=0,
            scale=0.125,
            query_positions=torch.full((2,), keys, dtype=torch.int32),
        )

    bounds = sorted([0, *(min(cut, keys) for cut in cuts), keys])
    outs, lses = zip(*(part(begin, end) for begin, end in itertools.pairwise(bounds)), strict=True)
    out, lse = merge(outs, lses)
    whole_out, whole_lse = part(0, keys)
    assert (out - whole_out).norm() <= 1e-5 * whole_out.norm()
    torch.testing.assert_close(lse, whole_lse, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("holder", [0, 1, 2])
@pytest.mark.parametrize("rows", [1, 40])
@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_parts_merge_to_the_whole_where_exactly_one_holds_the_sinks(backend: AttentionName, rows: int, holder: int) -> None:
    torch.manual_seed(holder)
    keys, values = torch.randn(2, 2, 80, 64)
    query, sinks = 3 * torch.randn(rows, 6, 64), torch.randn(6)
    positions = torch.arange(80 - rows, 80, dtype=torch.int32)
    attention = create_attention(backend)

    def part(begin: int, end: int, sinks: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        return attention.paged_attention(
            query,
            *paged(keys[:, begin:end], values[:, begin:end], rows),
            layer=0,
            scale=0.125,
            query_positions=positions - begin,
            soft_cap=2.0,
            sinks=sinks,
        )

    bounds = enumerate([(0, 48), (48, 48), (48, 80)])
    parts = [part(begin, end, sinks if number == holder else None) for number, (begin, end) in bounds]
    torch.testing.assert_close(merge(*zip(*parts, strict=True)), part(0, 80, sinks), rtol=1e-5, atol=1e-5)


def test_an_empty_part_is_ignored_whatever_its_out_holds() -> None:
    out, lse = torch.randn(2, 3, 8), torch.randn(2, 3)
    merged = merge([torch.full_like(out, torch.nan), out], [torch.full_like(lse, -torch.inf), lse])
    torch.testing.assert_close(merged, (out, lse))


def test_only_empty_parts_are_empty() -> None:
    empty = torch.full((2, 3), -torch.inf)
    out, lse = merge([torch.ones(2, 3, 8)] * 2, [empty] * 2)
    assert bool((out == 0).all())
    assert bool((lse == -torch.inf).all())


def test_large_logarithms_do_not_overflow() -> None:
    out, lse = merge([torch.zeros(1, 1, 4), torch.ones(1, 1, 4)], [torch.full((1, 1), 1e4), torch.full((1, 1), 1e4)])
    torch.testing.assert_close(out, torch.full((1, 1, 4), 0.5))
    torch.testing.assert_close(lse, torch.full((1, 1), 1e4 + math.log(2)))


@pytest.mark.parametrize(
    ("outs", "lses"),
    [
        ([], []),
        ([torch.zeros(2, 3, 8)], []),
        ([torch.zeros(2, 3, 8)], [torch.zeros(3, 2)]),
        ([torch.zeros(2, 3, 8)], [torch.zeros(2, 3, dtype=torch.float64)]),
        ([torch.zeros(2, 3, 8), torch.zeros(2, 3, 4)], [torch.zeros(2, 3)] * 2),
    ],
)
def test_parts_that_do_not_fit_together_are_refused(outs: list[torch.Tensor], lses: list[torch.Tensor]) -> None:
    with pytest.raises(InvalidArgument):
        merge(outs, lses)
