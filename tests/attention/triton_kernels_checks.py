"""Checks that `test_triton` runs in a process of its own: the Triton kernels against the reference, interpreted or on a GPU."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import triton
from torch import Tensor

from attnstore.attention import CheckedAttention, create_attention, merge
from attnstore.attention.triton import (
    TritonAttention,
    gather_pages,
    gather_runs,
    merge_partials,
    scatter_pages,
    scatter_runs,
)
from attnstore.errors import InvalidArgument
from attnstore_worker.device.engine_blocks import EngineBlocks
from tests.attention.cases import SCORINGS, Case, Scoring, assert_close, random_case, scored_case
from tests.interpreter import cache_interpreter

cache_interpreter()

DEVICE = "cpu" if triton.knobs.runtime.interpret else "cuda"
REFERENCE = create_attention("reference")
PLAIN = Scoring(None, None, has_sinks=False, dtype=torch.float32)


@pytest.fixture(autouse=True)
def temporaries(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """Lets new memory hold NaN, so that what is not written shows. Returns the tensors of `torch.empty`."""
    made: list[Tensor] = []

    def poisoned(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def make_poisoned(*shape: Any, **fields: Any) -> Tensor:
            tensor = make(*shape, **fields)
            return tensor.fill_(math.nan) if tensor.is_floating_point() else tensor

        return make_poisoned

    def recorded(*shape: Any, **fields: Any) -> Tensor:
        made.append(poisoned(torch_empty)(*shape, **fields))
        return made[-1]

    torch_empty = torch.empty
    monkeypatch.setattr(torch, "empty_like", poisoned(torch.empty_like))
    monkeypatch.setattr(torch, "empty", recorded)
    return made


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


@pytest.mark.parametrize(("seed", "programs"), [(100, 1000), (101, 40), (102, 13), (103, 1000), (104, 7), (105, 64)])
def test_splitting_the_keys_over_programs_does_not_change_the_result(seed: int, programs: int) -> None:
    case = random_case(seed, context_tokens_max=800, rows_max=2).on(DEVICE)
    assert_close(case.run(CheckedAttention(TritonAttention(programs))), case.run(REFERENCE))


def test_a_long_context_among_short_ones_is_shared_by_the_programs(temporaries: list[Tensor]) -> None:
    """And only that one is split."""
    programs, long, short = 8, 3000, 60
    phases = [(short, 1), (short, 2), (long, 1), (short, 1), (short, 1)]
    case = scored_case(PLAIN, phases, kv_heads=1, group=3).on(DEVICE)
    temporaries.clear()
    assert_close(case.run(TritonAttention(programs)), case.run(REFERENCE))
    _, partial_lses, _ = temporaries  # lse, lses and outs of the splits
    written = int((~partial_lses[:, 0, 0].isnan()).sum())
    assert written == round(long / ((long + 4 * short) / programs))


@pytest.mark.parametrize("rows", [2, 5, 8])
def test_guesses_are_checked_with_a_few_rows_for_each_sequence(rows: int) -> None:
    phases = [(40, rows), (700, rows), (16, rows), (rows, rows)]
    case = scored_case(PLAIN, phases, kv_heads=2, group=4).on(DEVICE)
    assert_close(case.run(CheckedAttention(TritonAttention(24))), case.run(REFERENCE))


def test_more_sequences_than_a_program_counts_at_once() -> None:
    phases = [(7, 0)] * 126 + [(520, 1), (3, 2), (9, 1), (530, 2)]
    case = scored_case(PLAIN, phases, kv_heads=1, group=1).on(DEVICE)
    assert_close(case.run(CheckedAttention(TritonAttention(4))), case.run(REFERENCE))


def with_padding(case: Case, padding: int) -> Case:
    """The same call with rows of padding, whose context is empty and whose table names no block."""
    query, pool, block_tables, context_lens, query_starts = case.tensors
    last = int(query_starts[-1])
    ends = torch.arange(last + 1, last + padding + 1, dtype=torch.int32, device=DEVICE)
    return Case(
        (
            torch.cat([query, torch.full_like(query[:1], math.nan).expand(padding, -1, -1)]),
            pool,
            torch.cat([block_tables, torch.full_like(block_tables[:1], 1 << 30).expand(padding, -1)]),
            torch.cat([context_lens, torch.zeros(padding, dtype=torch.int32, device=DEVICE)]),
            torch.cat([query_starts, ends]),
        ),
        case.keywords,
    )


@pytest.mark.parametrize("programs", [1, 16])
def test_rows_of_padding_read_nothing_and_give_nothing(programs: int) -> None:
    case = scored_case(PLAIN, [(700, 1), (20, 1)], kv_heads=1, group=4).on(DEVICE)
    out, lse = with_padding(case, 3).run(TritonAttention(programs))
    assert_close((out[:2], lse[:2]), case.run(REFERENCE))
    assert not out[2:].any()
    assert (lse[2:] == -math.inf).all()


def part_of(case: Case, begin: int, blocks: int) -> Case:
    """The call over `blocks` blocks from block `begin` on, for rows that come after all of them."""
    query, pool, tables, _, query_starts = case.tensors
    lengths = torch.full((len(tables),), blocks * 16, dtype=torch.int32, device=DEVICE)
    positions = torch.full((len(query),), 1 << 20, dtype=torch.int32, device=DEVICE)
    keywords = {**case.keywords, "query_positions": positions, "out_dtype": torch.float32}
    return Case((query, pool, tables[:, begin : begin + blocks].contiguous(), lengths, query_starts), keywords)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_partials_from_elsewhere_merge_in_place(dtype: torch.dtype) -> None:
    case = scored_case(Scoring(None, None, has_sinks=False, dtype=dtype), [(64, 1), (64, 2)], kv_heads=2, group=2).on(DEVICE)
    here, *elsewhere = (part_of(case, *part).run(REFERENCE) for part in ((0, 1), (1, 2), (3, 1)))
    expected = merge(*zip(here, *elsewhere, strict=True))
    out, lse = here[0].to(dtype), here[1].clone()
    merge_partials(out, lse, torch.stack([part[0] for part in elsewhere]), torch.stack([part[1] for part in elsewhere]))
    assert_close((out, lse), (expected[0].to(dtype), expected[1]))


def test_partials_merge_into_their_rows_alone() -> None:
    """Rows of padding, and rows without a partial, stay; an empty partial changes nothing, and its memory is not read."""
    torch.manual_seed(2)
    out, lse = torch.randn(5, 3, 80, device=DEVICE), torch.randn(5, 3, device=DEVICE)
    lse[3], out[3] = -math.inf, math.nan  # a row whose keys are all elsewhere
    outs, lses = torch.randn(2, 4, 3, 80, device=DEVICE), torch.randn(2, 4, 3, device=DEVICE)
    lses[0, 0], outs[0, 0] = -math.inf, math.nan
    lses[:, 2], outs[:, 2] = math.nan, math.nan
    ids = torch.tensor([4, 3, -1, 0], dtype=torch.int32, device=DEVICE)
    expected_out, expected_lse = out.clone(), lse.clone()
    for number, row in enumerate(ids.tolist()):
        if row >= 0:
            merged = merge([out[row : row + 1], *outs[:, number, None]], [lse[row : row + 1], *lses[:, number, None]])
            expected_out[row], expected_lse[row] = merged[0][0], merged[1][0]
    merge_partials(out, lse, outs, lses, ids)
    torch.testing.assert_close(out, expected_out, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(lse, expected_lse, rtol=1e-6, atol=1e-6)


def test_all_partials_empty_give_an_empty_row() -> None:
    out, lse = torch.full((1, 1, 16), math.nan, device=DEVICE), torch.full((1, 1), -math.inf, device=DEVICE)
    merge_partials(out, lse, out.clone()[None], lse.clone()[None])
    assert not out.any()
    assert lse.item() == -math.inf


@pytest.mark.parametrize(
    "change",
    [
        {"outs": torch.zeros(1, 3, 2, 16)},
        {"lses": torch.zeros(1, 2, 2, dtype=torch.float64)},
        {"row_ids": torch.zeros(2, dtype=torch.int64)},
        {"outs": torch.zeros(1, 2, 16, 2).transpose(2, 3)},
    ],
    ids=["rows", "type", "ids", "order"],
)
def test_partials_that_do_not_match_are_refused(change: dict[str, Tensor]) -> None:
    fitting = {
        "out": torch.zeros(2, 2, 16, device=DEVICE),
        "lse": torch.zeros(2, 2, device=DEVICE),
        "outs": torch.zeros(1, 2, 2, 16, device=DEVICE),
        "lses": torch.zeros(1, 2, 2, device=DEVICE),
    }
    with pytest.raises(InvalidArgument):
        merge_partials(**{**fitting, **{name: value.to(DEVICE) for name, value in change.items()}})


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


ORDERS = {"heads first": (0, 1, 2, 3), "tokens first": (0, 2, 1, 3), "heads outermost": (2, 0, 1, 3)}


@pytest.mark.parametrize("separate", [False, True], ids=["one memory", "a memory for each layer"])
@pytest.mark.parametrize("order", ORDERS.values(), ids=ORDERS.keys())
def test_blocks_in_runs_survive_a_gather_and_a_scatter(order: tuple[int, ...], separate: bool) -> None:
    """Layers `[blocks, heads, tokens, content]` in memory of another order."""
    torch.manual_seed(0)
    sizes = [9, 2, 16, 12]

    def cache() -> list[Tensor]:
        shape, back = [sizes[each] for each in order], [order.index(each) for each in range(4)]
        if separate:
            memories = [torch.randint(256, shape, dtype=torch.uint8, device=DEVICE) for _ in range(3)]
        else:
            memories = list(torch.randint(256, [3, *shape], dtype=torch.uint8, device=DEVICE))
        return [memory.permute(back) for memory in memories]

    source, target = cache(), cache()
    before = [layer.clone() for layer in target]
    ids = torch.tensor([7, 0, 3], dtype=torch.int32, device=DEVICE)
    others = [block for block in range(9) if block not in ids.tolist()]
    runs = EngineBlocks(source).runs()
    table = runs.table.to(DEVICE)
    pages = torch.empty(3, len(table) * runs.words, dtype=runs.cache.dtype, device=DEVICE)
    gather_runs(runs.cache, table, runs.words, ids, pages)
    wanted = torch.stack([layer[ids.long()] for layer in source], dim=1)
    assert torch.equal(pages.view(torch.uint8), wanted.reshape(3, -1))
    runs = EngineBlocks(target).runs()
    scatter_runs(runs.cache, runs.table.to(DEVICE), runs.words, ids, pages)
    for layer, old, new in zip(target, before, source, strict=True):
        assert torch.equal(layer[ids.long()], new[ids.long()])
        assert torch.equal(layer[others], old[others])


def test_copies_of_runs_refuse_what_does_not_fit() -> None:
    cache, table = torch.zeros(64, dtype=torch.int64, device=DEVICE), torch.zeros(2, 2, dtype=torch.int64, device=DEVICE)
    ids = torch.zeros(3, dtype=torch.int32, device=DEVICE)
    for pages, wrong in (
        (torch.zeros(3, 8, dtype=torch.int32, device=DEVICE), ids),
        (torch.zeros(3, 9, dtype=torch.int64, device=DEVICE), ids),
        (torch.zeros(8, 3, dtype=torch.int64, device=DEVICE).T, ids),
        (torch.zeros(3, 8, dtype=torch.int64, device=DEVICE), ids.long()),
    ):
        with pytest.raises(InvalidArgument):
            gather_runs(cache, table, 4, wrong, pages)
