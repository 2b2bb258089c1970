"""The CPU backend against the reference."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from attnstore.attention import create_attention, merge, warm_up
from attnstore.attention.cpu import CpuAttention
from tests.attention.cases import SCORINGS, Case, Scoring, assert_close, random_case, scored_case

CPU = create_attention("cpu")
REFERENCE = create_attention("reference")


@pytest.mark.parametrize("seed", range(60))
def test_any_mixed_batch_agrees_with_the_reference(seed: int) -> None:
    case = random_case(seed)
    assert_close(case.run(CPU), case.run(REFERENCE))


@pytest.mark.parametrize("scoring", SCORINGS, ids=str)
def test_windows_caps_and_sinks_agree_in_every_phase_of_a_batch(scoring: Scoring) -> None:
    """A batch with decode, verification, a whole prompt, a later chunk that begins inside a block, and one shorter
    than any window.
    """
    kv_heads, group = ((3, 1), (1, 4), (2, 3))[SCORINGS.index(scoring) % 7 % 3]
    phases = ((1, 1), (97, 1), (83, 5), (60, 60), (207, 50), (37, 37))
    case = scored_case(scoring, phases, kv_heads=kv_heads, group=group)
    assert_close(case.run(CPU), case.run(REFERENCE))


@pytest.mark.parametrize("scoring", SCORINGS[::7], ids=str)
@pytest.mark.parametrize("rows", [1, 290])
def test_windows_caps_and_sinks_agree_over_several_chunks_panels_tiles_and_threads(scoring: Scoring, rows: int) -> None:
    case = scored_case(scoring, ((500, rows), (441, rows)), kv_heads=2, group=2, head_dim=128)
    assert_close(case.run(CpuAttention(3)), case.run(REFERENCE))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("soft_cap", [None, 1.5])
@pytest.mark.parametrize("sinks", [None, torch.tensor([1.0, -2.0])])
def test_rows_of_one_tile_may_see_windows_far_apart(dtype: torch.dtype, soft_cap: float | None, sinks: Tensor | None) -> None:
    """The window of a row may begin long after the first key of its tile, and end long before the last."""
    case = scored_case(Scoring(20, soft_cap, False, dtype), ((2000, 100),), kv_heads=1, group=2)
    positions = torch.randint(-3, 2100, (100,), dtype=torch.int32)
    far = Case(case.tensors, {**case.keywords, "sinks": sinks, "query_positions": positions})
    assert_close(far.run(CPU), far.run(REFERENCE))


@pytest.mark.parametrize(("head_dim", "block_tokens"), [(72, 16), (64, 2), (8, 1), (112, 20)])
def test_geometries_that_the_kernel_cannot_read_in_place_agree_too(head_dim: int, block_tokens: int) -> None:
    case = decode_case(context_tokens=100, rows=2, head_dim=head_dim, block_tokens=block_tokens)
    assert_close(case.run(CPU), case.run(REFERENCE))
    scored = Case(case.tensors, {**case.keywords, "sliding_window": 30, "soft_cap": 1.5, "sinks": torch.linspace(-2, 2, 9)})
    assert_close(scored.run(CPU), scored.run(REFERENCE))


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("rows", [1, 4])
def test_cutting_the_work_between_threads_does_not_change_the_result(threads: int, rows: int) -> None:
    case = decode_case(context_tokens=3000, rows=rows, kv_heads=8, seqs=3)
    assert_close(case.run(CpuAttention(threads)), case.run(REFERENCE))


def test_a_prefill_of_several_tiles_after_a_prefix_agrees() -> None:
    case = decode_case(context_tokens=900, rows=600)
    assert_close(case.run(CPU), case.run(REFERENCE))


def test_blocks_may_lie_any_distance_apart() -> None:
    case = decode_case(context_tokens=200, rows=3)
    query, pool, *tables = case.tensors
    slots = torch.zeros(pool.shape[0], pool[0].numel() + 96)
    slots[:, : pool[0].numel()] = pool.flatten(1)
    apart = slots.as_strided(pool.shape, (slots.stride(0), *pool.stride()[1:]))
    assert_close(Case((query, apart, *tables), case.keywords).run(CPU), case.run(REFERENCE))


@pytest.mark.parametrize("rows", [1, 40])
def test_what_lies_behind_the_context_in_its_last_block_is_never_read(rows: int) -> None:
    case = decode_case(context_tokens=83, rows=rows)
    _, pool, block_tables, _, _ = case.tensors
    want = case.run(REFERENCE)
    pool[block_tables[0, 83 // 16].long(), :, :, :, 83 % 16 :] = torch.nan
    assert_close(case.run(CPU), want)


@pytest.mark.parametrize("rows", [1, 2, 33])
def test_partials_over_parts_of_the_keys_merge_to_the_whole(rows: int) -> None:
    case = decode_case(context_tokens=200, rows=rows)
    query, pool, block_tables, _, query_starts = case.tensors
    positions = torch.arange(200 - rows, 200, dtype=torch.int32)
    parts = []
    for first_block, end_block in ((0, 3), (3, 3), (3, 4), (4, 13)):
        keys = torch.tensor([min(200, end_block * 16) - first_block * 16], dtype=torch.int32)
        part = (query, pool, block_tables[:, first_block:].contiguous(), keys, query_starts)
        parts.append(CPU.paged_attention(*part, **case.keywords, query_positions=positions - first_block * 16))
    assert_close(merge(*zip(*parts, strict=True)), case.run(REFERENCE))


def test_partials_of_16_bit_queries_come_in_fp32_where_asked() -> None:
    case = decode_case(context_tokens=200, rows=2, dtype=torch.bfloat16)
    wide = Case(case.tensors, {**case.keywords, "out_dtype": torch.float32})
    assert_close(wide.run(CPU), wide.run(REFERENCE))


def test_a_query_may_have_another_type_than_the_pool() -> None:
    for rows in (2, 40):
        case = decode_case(context_tokens=200, rows=rows, dtype=torch.bfloat16)
        query, *others = case.tensors
        mixed = Case((query.float() * 1.01, *others), case.keywords)
        assert_close(mixed.run(CPU), mixed.run(REFERENCE))


def test_the_next_step_may_reuse_the_tensors_of_the_last() -> None:
    case = decode_case(context_tokens=200, rows=1)
    case.run(CPU)
    case.tensors[3].fill_(120)
    assert_close(case.run(CPU), case.run(REFERENCE))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_warming_up_leaves_the_pool_as_it_was(dtype: torch.dtype) -> None:
    pool = torch.randn(2, 1, 2, 3, 16, 64).to(dtype)
    before = pool.clone()
    warm_up(CPU, pool, q_heads=9)
    assert torch.equal(pool, before)


def test_inference_mode_changes_nothing() -> None:
    for rows in (1, 60):
        case = decode_case(context_tokens=200, rows=rows)
        with torch.inference_mode():
            got = case.run(CPU)
        assert_close(got, case.run(REFERENCE))
        assert_close(case.run(CPU), case.run(REFERENCE))


def test_an_empty_batch_is_an_empty_result() -> None:
    none: Tensor = torch.empty(0, dtype=torch.int32)
    pool = torch.randn(4, 1, 2, 3, 16, 64)
    out, lse = CPU.paged_attention(
        torch.empty(0, 9, 64), pool, none.view(0, 4), none, torch.zeros(1, dtype=torch.int32), layer=0, scale=1.0
    )
    assert out.shape == (0, 9, 64)
    assert lse.shape == (0, 9)


def decode_case(
    *,
    context_tokens: int,
    rows: int,
    head_dim: int = 64,
    block_tokens: int = 16,
    kv_heads: int = 3,
    seqs: int = 1,
    dtype: torch.dtype = torch.float32,
) -> Case:
    """Sequences of equal length in scattered blocks; the last `rows` tokens of each are the query."""
    torch.manual_seed(context_tokens + rows)
    blocks = -(-context_tokens // block_tokens)
    return Case(
        (
            torch.randn(seqs * rows, kv_heads * 3, head_dim).to(dtype),
            torch.randn(seqs * blocks, 1, 2, kv_heads, block_tokens, head_dim).to(dtype),
            torch.randperm(seqs * blocks, dtype=torch.int32).view(seqs, blocks),
            torch.full((seqs,), context_tokens, dtype=torch.int32),
            torch.arange(seqs + 1, dtype=torch.int32) * rows,
        ),
        {"layer": 0, "scale": head_dim**-0.5},
    )
