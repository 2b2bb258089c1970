"""When a hit is claimed, and what teaches it."""

from __future__ import annotations

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
    made = Gate(ManualClock())
    for _ in range(8):
        made.transferred(read(page_ms))
    for begin, end in CHUNKS if cost is not None else ():
        made.stepped(Step(0.0, cost.chunk(begin, end), ((begin, end),)))  # type: ignore[union-attr]
    return made


@pytest.mark.parametrize("cost", [PrefillCost(1.0, 0.5, 0.0), PrefillCost(20.0, 0.2, 0.0001)])
@pytest.mark.parametrize(("factor", "pays"), [(0.5, True), (1.5, False)])
def test_a_hit_is_claimed_where_its_pages_come_before_its_tokens_are_computed(cost: PrefillCost, factor: float, pays: bool) -> None:
    saved_ms = recompute_ms(cost, WORK) - cost.span(1600, 1601, 512)
    assert gate(factor * saved_ms / 100, cost).fetch_pays(WORK) == pays


def test_the_local_blocks_of_a_prompt_are_no_gain_of_a_fetch() -> None:
    cost = PrefillCost(1.0, 0.5, 0.0)
    one = replace(WORK, front=99)
    assert gate(4.0, cost).fetch_pays(one)
    assert not gate(12.0, cost).fetch_pays(one)
    assert not gate(4.0, cost).fetch_pays(replace(WORK, front=100))


def test_what_a_chunk_attends_to_is_part_of_its_cost() -> None:
    cost = PrefillCost(1.0, 0.1, 0.001)
    early, late = (replace(WORK, tokens=16 * end + 1, front=end - 50, asked=end, back=end, hit_end=end) for end in (50, 500))
    measured = gate((recompute_ms(cost, early) + 20) / 50, cost)
    assert not measured.fetch_pays(early)
    assert measured.fetch_pays(late)


def test_what_longer_contexts_cost_than_any_seen_is_no_reason_to_fetch() -> None:
    long = replace(WORK, tokens=100_001, hit_end=6_250, back=6_250, asked=6_250)
    short_only = Gate(ManualClock())
    short_only.stepped(Step(0.0, 100.0, ((0, 200),)))
    for _ in range(8):
        short_only.transferred(read(10.0))
    assert not short_only.fetch_pays(long), "a page's 16 tokens take 8 ms, if a token takes as long as one of the short step"
    cost = PrefillCost(10.0, 0.45, 0.001)
    for begin in range(0, 100_000, 5_000):
        short_only.stepped(Step(0.0, cost.chunk(begin, begin + 512), ((begin, begin + 512),)))
    assert short_only.fetch_pays(replace(long, hit_end=5_900, back=5_900, asked=5_900))


def test_a_step_of_many_requests_teaches_as_much_as_one_of_one() -> None:
    cost = PrefillCost(5.0, 0.2, 0.0)
    alone, together = gate(1.5, cost), gate(1.5)
    for begin, end in CHUNKS:
        chunks = ((begin, end), (0, 100), (700, 701))
        together.stepped(Step(0.0, 5.0 + 0.2 * sum(end - begin for begin, end in chunks), chunks))
    for hits in range(1, 101):
        work = replace(WORK, front=100 - hits)
        assert alone.fetch_pays(work) == together.fetch_pays(work)


def test_decoding_says_nothing_of_prefill() -> None:
    decoding = gate(0.9 * recompute_ms(PREFILL_UNMEASURED, WORK) / 100 / 1.2)
    assert decoding.fetch_pays(WORK)
    decoding.stepped(Step(0.0, 0.001, tuple((tokens, tokens + 1) for tokens in range(1000, 1256))))
    assert decoding.fetch_pays(WORK)


def test_before_it_is_measured_prefill_is_as_fast_as_on_a_fast_gpu() -> None:
    assert recompute_ms(PREFILL_UNMEASURED, replace(WORK, tokens=20_000, hit_end=1250, back=1250, asked=1250)) == 1000
    assert gate(0.5).fetch_pays(WORK)
    assert not gate(1.0).fetch_pays(WORK)


def test_failed_transfers_and_writes_teach_nothing() -> None:
    untaught = Gate(ManualClock())
    untaught.transferred(read(0.001, failed=True))
    untaught.transferred(replace(read(0.001), kind=TransferKind.WRITE))
    assert untaught.is_stale
    assert not untaught.fetch_pays(WORK)
    untaught.transferred(read(0.001))
    assert not untaught.is_stale
