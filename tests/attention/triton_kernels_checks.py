"""Checks that `test_triton` runs in a process of its own: the Triton kernels against the reference, interpreted or on a GPU."""

from __future__ import annotations

import pytest
import torch
import triton

from attnstore.attention import CheckedAttention, create_attention
from attnstore.attention.triton import TritonAttention, gather_pages, scatter_pages
from attnstore.errors import InvalidArgument
from tests.attention.cases import SCORINGS, Scoring, assert_close, random_case, scored_case

DEVICE = "cpu" if triton.knobs.runtime.interpret else "cuda"
REFERENCE = create_attention("reference")


@pytest.mark.parametrize("seed", range(16))
def test_any_mixed_batch_agrees_with_the_reference(seed: int) -> None:
    case = random_case(seed, context_tokens_max=90, rows_max=20).on(DEVICE)
    assert_close(case.run(CheckedAttention(TritonAttention(programs_wanted=1))), case.run(REFERENCE))


@pytest.mark.parametrize("scoring", [SCORINGS[3 * number + number % 3] for number in range(len(SCORINGS) // 3)], ids=str)
def test_windows_caps_and_sinks_agree_in_every_phase_of_a_batch(scoring: Scoring) -> None:
    """Combines every window, cap and sinks, and alternates the types."""
    number = SCORINGS.index(scoring)
    phases = [[(1, 1), (47, 1), (40, 9)], [(97, 1), (33, 1)]][number % 2]
    kv_heads, group = ((3, 1), (1, 4), (2, 3))[number % 7 % 3]
    case = scored_case(scoring, phases, kv_heads=kv_heads, group=group).on(DEVICE)
    assert_close(case.run(CheckedAttention(TritonAttention(programs_wanted=1))), case.run(REFERENCE))


@pytest.mark.parametrize("scoring", [each for each in SCORINGS if each.has_sinks][::6], ids=str)
def test_a_sink_counts_once_however_many_programs_share_the_keys(scoring: Scoring) -> None:
    case = scored_case(scoring, [(600, 1), (1, 1), (530, 2)], kv_heads=1, group=4).on(DEVICE)
    assert_close(case.run(CheckedAttention(TritonAttention(programs_wanted=1000))), case.run(REFERENCE))


@pytest.mark.parametrize("seed", range(100, 106))
def test_splitting_the_keys_over_programs_does_not_change_the_result(seed: int) -> None:
    case = random_case(seed, context_tokens_max=800, rows_max=2).on(DEVICE)
    assert_close(case.run(CheckedAttention(TritonAttention(programs_wanted=1000))), case.run(REFERENCE))


def test_pages_survive_a_gather_and_a_scatter() -> None:
    torch.manual_seed(0)
    pool = torch.randn(9, 2, 2, 3, 16, 64).bfloat16().to(DEVICE)
    ids = torch.tensor([7, 0, 3], dtype=torch.int32, device=DEVICE)
    pages = gather_pages(pool, ids)
    assert torch.equal(pages, pool[ids.long()])
    other = torch.zeros_like(pool)
    scatter_pages(pages, ids, other)
    assert torch.equal(other[ids.long()], pages)
    assert int(other.flatten(1).any(dim=1).sum()) == 3


def test_copies_refuse_what_does_not_fit() -> None:
    pool = torch.zeros(4, 1, 2, 3, 16, 64, device=DEVICE)
    with pytest.raises(InvalidArgument):
        gather_pages(pool, torch.zeros(2, dtype=torch.int64, device=DEVICE))
    with pytest.raises(InvalidArgument):
        scatter_pages(pool[:2], torch.zeros(3, dtype=torch.int32, device=DEVICE), pool)
    with pytest.raises(InvalidArgument):
        gather_pages(pool.transpose(3, 4), torch.zeros(2, dtype=torch.int32, device=DEVICE))
