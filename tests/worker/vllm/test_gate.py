"""When a hit is claimed, and what teaches it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest

from attnstore.testing import ManualClock
from attnstore_worker.cache.planning.estimators import PrefillCost
from attnstore_worker.cache.planning.observation import Step
from attnstore_worker.cache.planning.split import Work, recompute_ms
from attnstore_worker.cache.pool.tier import Tier
from attnstore_worker.cache.store.transfer import Transfer, TransferKind
from attnstore_worker.vllm.gate import PREFILL_UNMEASURED, Gate

PAGE_BYTES = 1 << 20
LOAD_MS_MAX = 1e9
WORK = Work(
    tokens=16 * 100 + 1,
    block_tokens=16,
    chunk_tokens=512,
    page_bytes=PAGE_BYTES,
    front=0,
    asked=100,
    back=100,
    hit_end=100,
    layers=4,
)
CHUNKS = [(begin, begin + 512) for begin in range(0, 8192, 512)]


def read(elapsed_ms: float, *, failed: bool = False) -> Transfer:
    return Transfer(Tier.REMOTE, TransferKind.READ, 0.0, elapsed_ms, 1, 1, PAGE_BYTES, failed)


def gate(page_ms: float, cost: PrefillCost | None = None) -> Gate:
    """One that has seen pages come in `page_ms` each, and chunks computed at this cost."""
    made = Gate(ManualClock(), load_ms_max=LOAD_MS_MAX)
    for _ in range(8):
        made.transferred(read(page_ms))
    for begin, end in CHUNKS if cost is not None else ():
        made.stepped(Step(0.0, cost.chunk(begin, end), ((begin, end),)))  # type: ignore[union-attr]
    return made


def pays(made: Gate, work: Work) -> bool:
    """Returns whether the gate wants all hits; it may want none otherwise, and no part of them."""
    blocks = made.blocks_to_fetch(work)
    assert blocks in (0, work.hit_end - work.front)
    return blocks > 0


@pytest.mark.parametrize("cost", [PrefillCost(1.0, 0.5, 0.0), PrefillCost(20.0, 0.2, 0.0001)])
@pytest.mark.parametrize(("factor", "is_faster"), [(0.5, True), (1.5, False)])
def test_a_hit_is_claimed_where_its_pages_come_before_its_tokens_are_computed(
    cost: PrefillCost, factor: float, is_faster: bool
) -> None:
    saved_ms = recompute_ms(cost, WORK) - cost.span(1600, 1601, 512)
    assert pays(gate(factor * saved_ms / 100, cost), WORK) == is_faster


def test_the_local_blocks_of_a_prompt_are_no_gain_of_a_fetch() -> None:
    cost = PrefillCost(1.0, 0.5, 0.0)
    one = replace(WORK, front=99)
    assert pays(gate(4.0, cost), one)
    assert not pays(gate(12.0, cost), one)
    assert not pays(gate(4.0, cost), replace(WORK, front=100))


def test_what_a_chunk_attends_to_is_part_of_its_cost() -> None:
    cost = PrefillCost(1.0, 0.1, 0.001)
    early, late = (replace(WORK, tokens=16 * end + 1, front=end - 50, asked=end, back=end, hit_end=end) for end in (50, 500))
    measured = gate((recompute_ms(cost, early) + 20) / 50, cost)
    assert not pays(measured, early)
    assert pays(measured, late)


def test_what_longer_contexts_cost_than_any_seen_is_no_reason_to_fetch() -> None:
    long = replace(WORK, tokens=100_001, hit_end=6_250, back=6_250, asked=6_250)
    short_only = Gate(ManualClock(), load_ms_max=LOAD_MS_MAX)
    short_only.stepped(Step(0.0, 100.0, ((0, 200),)))
    for _ in range(8):
        short_only.transferred(read(10.0))
    assert not pays(short_only, long), "a page's 16 tokens take 8 ms, if a token takes as long as one of the short step"
    cost = PrefillCost(10.0, 0.45, 0.001)
    for begin in range(0, 100_000, 5_000):
        short_only.stepped(Step(0.0, cost.chunk(begin, begin + 512), ((begin, begin + 512),)))
    assert pays(short_only, replace(long, hit_end=5_900, back=5_900, asked=5_900))


def test_a_step_of_many_requests_teaches_as_much_as_one_of_one() -> None:
    cost = PrefillCost(5.0, 0.2, 0.0)
    alone, together = gate(1.5, cost), gate(1.5)
    for begin, end in CHUNKS:
        chunks = ((begin, end), (0, 100), (700, 800))
        together.stepped(Step(0.0, 5.0 + 0.2 * sum(end - begin for begin, end in chunks), chunks))
    for hits in range(1, 101):
        work = replace(WORK, front=100 - hits)
        assert pays(alone, work) == pays(together, work)


COST = PrefillCost(5.0, 0.2, 0.0001)
DECODE = PrefillCost(5.0, 0.0, 0.002)
"""The attention of decoding is bound by memory."""
DECODES = tuple((context, context + 1) for context in range(100, 8_100, 500))


def decode_ms(rows: Sequence[tuple[int, int]]) -> float:
    return DECODE.chunk_ms + sum(DECODE.pair_ms * (begin + end) / 2 for begin, end in rows)


def mixed(made: Gate) -> Gate:
    """Sees steps that compute prompts and decode."""
    for begin, end in CHUNKS:
        took_ms = COST.chunk(begin, end) + COST.token_ms * len(DECODES) + decode_ms(DECODES) - DECODE.chunk_ms
        made.stepped(Step(0.0, took_ms, ((begin, end), *DECODES)))
    return made


def test_prompts_are_learned_also_beside_many_long_decodes() -> None:
    alone, together = gate(5.0, COST), gate(5.0)
    for rows in range(1, len(DECODES) + 1):
        together.stepped(Step(0.0, decode_ms(DECODES[-rows:]), DECODES[-rows:]))
    mixed(together)
    works = [replace(WORK, front=100 - hits) for hits in range(1, 101)]
    fetched = [alone.blocks_to_fetch(work) for work in works]
    assert [together.blocks_to_fetch(work) for work in works] == fetched
    assert 0 in fetched
    assert max(fetched) > 0


def test_while_the_cost_of_decoding_is_unknown_a_step_that_also_decodes_teaches_nothing() -> None:
    page_ms = 0.8 * recompute_ms(COST, WORK) / 100
    assert pays(gate(page_ms, COST), WORK)
    assert not pays(mixed(gate(page_ms)), WORK), "prefill counts as fast until it is measured"


def test_decoding_says_nothing_of_prefill() -> None:
    decoding = gate(0.9 * recompute_ms(PREFILL_UNMEASURED, WORK) / 100 / 1.2)
    assert pays(decoding, WORK)
    decoding.stepped(Step(0.0, 0.001, tuple((tokens, tokens + 1) for tokens in range(1000, 1256))))
    assert pays(decoding, WORK)


def test_before_it_is_measured_prefill_is_as_fast_as_on_a_fast_gpu() -> None:
    assert recompute_ms(PREFILL_UNMEASURED, replace(WORK, tokens=20_000, hit_end=1250, back=1250, asked=1250)) == 1000
    assert pays(gate(0.5), WORK)
    assert not pays(gate(1.0), WORK)


def test_of_a_context_longer_than_any_seen_that_part_is_fetched_which_is_known_to_pay() -> None:
    cost = PrefillCost(0.0, 0.01, 0.001)  # at 512 tokens a token takes 0.5 ms
    seen = gate(5.0, cost)  # up to 8,192 tokens
    work = replace(WORK, tokens=16 * 1000 + 1, front=400, asked=1000, back=1000, hit_end=1000)
    assert seen.blocks_to_fetch(work) == 8192 // 16 - 400
    assert seen.blocks_to_fetch(replace(work, front=512)) == 0
    seen.stepped(Step(0.0, cost.chunk(16_000, 16_512), ((16_000, 16_512),)))
    assert seen.blocks_to_fetch(work) == 600


def test_a_part_is_fetched_that_saves_a_step() -> None:
    cost = PrefillCost(100.0, 0.001, 0.0)  # a small model: a step takes the same time for few tokens as for many
    made = gate(10.0, cost)
    for tokens in range(64, 512, 32):
        made.stepped(Step(0.0, cost.chunk(0, tokens), ((0, tokens),)))
    work = replace(WORK, tokens=1100, front=30, asked=65, back=65, hit_end=65)
    assert made.blocks_to_fetch(work) == 2, "the last tokens of the first 512"
    assert made.blocks_to_fetch(replace(work, front=32)) == 0, "32 pages take as long as three steps"


def test_no_load_is_begun_that_would_take_too_long() -> None:
    made = Gate(ManualClock(), load_ms_max=500.0)
    for _ in range(96):
        made.transferred(read(10.0))
        made.stepped(Step(0.0, 10_000.0, ((0, 512),)))
    assert made.blocks_to_fetch(WORK) in (49, 50), "pages of 10 ms"
    assert made.blocks_to_fetch(replace(WORK, front=80)) == 20


def test_failed_transfers_and_writes_teach_nothing() -> None:
    untaught = Gate(ManualClock(), load_ms_max=LOAD_MS_MAX)
    untaught.transferred(read(0.001, failed=True))
    untaught.transferred(replace(read(0.001), kind=TransferKind.WRITE))
    untaught.transferred(replace(read(0.001), kind=TransferKind.COPY))
    assert untaught.is_stale
    assert not pays(untaught, WORK)
    untaught.transferred(read(0.001))
    assert not untaught.is_stale
