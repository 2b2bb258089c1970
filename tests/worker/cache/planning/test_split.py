"""The planner's arithmetic: against brute force, against its own invariants, and in simulated links that fail."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from attnstore_worker.cache.moving.staging import part_pages
from attnstore_worker.cache.planning.estimators import PrefillCost
from attnstore_worker.cache.planning.link import LinkEstimate
from attnstore_worker.cache.planning.split import (
    FETCH_MARGIN,
    IDLE_SHARE,
    Costs,
    Split,
    Work,
    batch_blocks,
    best_lead,
    fetch_everything,
    fetch_ms,
    idle_budget,
    recompute_ms,
    search_head,
    split,
)

PAGE_BYTES = 368_640
MEASURED = PrefillCost(chunk_ms=24.0, token_ms=0.5, pair_ms=3.3e-4)
LINKS = st.builds(
    LinkEstimate,
    rtt_ms=st.floats(0, 500),
    request_ms=st.floats(0, 500),
    bytes_per_ms=st.floats(10, 1e8),
    spread=st.floats(1, 16),
    samples=st.floats(0.01, 20),
    age_ms=st.floats(0, 1e6),
)
PREFILLS = st.builds(PrefillCost, chunk_ms=st.floats(0, 100), token_ms=st.floats(1e-3, 10), pair_ms=st.floats(0, 1e-2))
COPIES = st.none() | LINKS
COSTS = st.builds(Costs, link=LINKS, prefill=PREFILLS, slowdown=st.floats(1, 4), copy=COPIES, layer_copy=COPIES)
HOST_COSTS = st.builds(Costs, link=LINKS, prefill=PREFILLS, slowdown=st.floats(1, 4))


def whole(tokens: int, hit_blocks: int, front: int = 0) -> Work:
    return Work(tokens, 16, 256, PAGE_BYTES, front, hit_blocks, hit_blocks, hit_blocks, layers=1)


@st.composite
def works(draw: st.DrawFn) -> Work:
    hit_blocks = draw(st.integers(1, 512))
    return whole(hit_blocks * 16 + draw(st.integers(1, 4000)), hit_blocks, draw(st.integers(0, hit_blocks - 1)))


def link(gbit_per_s: float, rtt_ms: float, spread: float = 1.1) -> LinkEstimate:
    return LinkEstimate(rtt_ms, rtt_ms, gbit_per_s * 1e6 / 8, spread, 8.0, 0.0)


def best(costs: Costs, work: Work) -> Split:
    """Returns the split of a prompt that has not waited yet."""
    return split(costs, work, idle_budget(costs.prefill, work))


def piped_ms(costs: Costs, blocks: int, batch: int) -> float:
    """Returns the end of the last batch, with the reads of all parts and their copies one after the other."""
    ended_ms = 0.0
    while blocks > 0:
        left, read_ms, copied_ms = min(batch, blocks), ended_ms, ended_ms
        blocks -= left
        while left > 0:
            part = left if costs.copy is None else min(left, part_pages(PAGE_BYTES))
            left -= part
            read_ms += costs.link.transfer_ms(part * PAGE_BYTES)
            copied_ms = max(read_ms, copied_ms) + (costs.copy.transfer_ms(part * PAGE_BYTES) if costs.copy is not None else 0.0)
        ended_ms = copied_ms
    return ended_ms


def brute_force_ms(costs: Costs, work: Work) -> float:
    """Returns the earliest first token over all meeting points, with every chunk, read and copy added up one by one."""
    tokens, prefill = work.block_tokens, costs.prefill

    def chunks(begin: int, end: int) -> float:
        total_ms = 0.0
        while begin < end:
            stop = min(end, (begin // work.chunk_tokens + 1) * work.chunk_tokens)
            total_ms += prefill.chunk(begin, stop)
            begin = stop
        return total_ms

    best_ms = chunks(work.front * tokens, work.tokens)
    idle_budget_ms = IDLE_SHARE * best_ms
    for meet in range(work.front, work.back):
        batch = min(batch_blocks(costs.link, work.page_bytes, costs.copy), work.back - meet)
        reads_ms = piped_ms(costs, work.back - meet, batch)
        computing_ms = costs.slowdown * chunks(work.front * tokens, meet * tokens)
        waited_for_ms = chunks(meet * tokens, work.back * tokens)
        first_ms = min(reads_ms, piped_ms(costs, batch, batch)) * costs.link.spread
        late_ms = max(reads_ms * min(costs.link.spread, FETCH_MARGIN), first_ms)
        if late_ms <= computing_ms + min(idle_budget_ms, waited_for_ms):
            best_ms = min(best_ms, max(computing_ms, reads_ms) + chunks(work.back * tokens, work.tokens))
    return best_ms


@given(COSTS, works())
def test_the_meeting_point_is_as_good_as_brute_force_finds(costs: Costs, work: Work) -> None:
    planned = best(costs, work)
    slack_ms = costs.prefill.chunk_ms * costs.slowdown + planned.work.block_tokens * costs.prefill.token_ms * costs.slowdown
    assert planned.ttft_ms <= brute_force_ms(costs, work) * 1.12 + slack_ms


@given(COSTS, works(), st.floats(-1e4, 1e4))
def test_no_plan_is_predicted_slower_than_computing_everything(costs: Costs, work: Work, idle_budget_ms: float) -> None:
    planned = split(costs, work, idle_budget_ms)
    assert planned.ttft_ms <= recompute_ms(costs.prefill, work)
    assert work.front <= planned.meet <= work.back


@given(COSTS, works())
def test_a_late_link_costs_no_more_than_the_idle_budget(costs: Costs, work: Work) -> None:
    planned = best(costs, work)
    everything_ms = recompute_ms(costs.prefill, work)
    assert planned.idle_budget_ms <= IDLE_SHARE * everything_ms
    if planned.fetches:
        waited_for = costs.prefill.span(planned.meet * 16, work.back * 16, work.chunk_tokens)
        assert planned.idle_budget_ms <= waited_for
        assert planned.fetch_ms <= planned.deadline_ms * (1 + 1e-9)


@given(PREFILLS, works(), st.floats(0, 50), st.floats(100, 1e6), st.floats(1, 100))
def test_more_bandwidth_never_makes_the_prediction_worse(
    prefill: PrefillCost, work: Work, rtt_ms: float, bytes_per_ms: float, factor: float
) -> None:
    slow = Costs(LinkEstimate(rtt_ms, rtt_ms, bytes_per_ms, 1.2, 8, 0), prefill, 1.1)
    fast = replace(slow, link=replace(slow.link, bytes_per_ms=bytes_per_ms * factor))
    slack_ms = 1.1 * (prefill.chunk_ms + 16 * (prefill.token_ms + prefill.pair_ms * work.tokens)) + rtt_ms
    assert best(fast, work).ttft_ms <= best(slow, work).ttft_ms * 1.12 + slack_ms


@settings(max_examples=30)
@given(HOST_COSTS, works(), st.floats(0, 1e6))
def test_the_leading_part_is_as_good_as_the_best_of_all(costs: Costs, work: Work, fetch_ms_max: float) -> None:
    batch = batch_blocks(costs.link, work.page_bytes)
    chosen = best_lead(costs, work, fetch_ms_max)
    parts = [replace(work, asked=end, back=end, hit_end=end) for end in range(work.front, work.hit_end + 1)]
    leads = [fetch_everything(costs, part) for part in parts]
    allowed = [lead for lead in leads if fetch_ms(costs.link, work.page_bytes, lead.work.back - work.front, batch) <= fetch_ms_max]
    best_ms = min(lead.slow_ms(costs.link) for lead in allowed)
    # The round trip of a read is one for many pages, so that time is not quite concave.
    assert chosen.slow_ms(costs.link) <= best_ms * (1 + 1e-9) + costs.link.request_ms * costs.link.spread
    assert chosen in leads
    assert chosen.slow_ms(costs.link) <= chosen.recompute_ms * (1 + 1e-9)


@given(LINKS, LINKS, st.integers(1, 20), st.integers(1, 8), st.booleans())
def test_a_pipeline_is_as_slow_as_its_slower_stage_and_one_part_of_the_other(
    link: LinkEstimate, copy: LinkEstimate, batches: int, parts: int, small: bool
) -> None:
    batch = parts if small else parts * part_pages(PAGE_BYTES)
    costs = Costs(link, MEASURED, 1.0, copy=copy)
    assert fetch_ms(link, PAGE_BYTES, batches * batch, batch, copy) == pytest.approx(piped_ms(costs, batches * batch, batch))


@given(LINKS, LINKS)
def test_a_batch_loses_little_to_the_part_that_is_read_or_copied_alone(link: LinkEstimate, copy: LinkEstimate) -> None:
    batch = batch_blocks(link, PAGE_BYTES, copy)
    part_bytes = min(batch, part_pages(PAGE_BYTES)) * PAGE_BYTES
    alone_ms = min(link.transfer_ms(part_bytes), copy.transfer_ms(part_bytes))
    assert alone_ms <= 0.25 * fetch_ms(link, PAGE_BYTES, batch, batch, copy)


@pytest.mark.parametrize(("gbit_per_s", "fetches"), [(400.0, True), (10.0, True), (0.001, False)])
def test_a_copy_to_a_device_counts_as_much_as_the_link(gbit_per_s: float, fetches: bool) -> None:
    costs = Costs(link(10.0, 0.1), MEASURED, 1.05, copy=link(gbit_per_s, 0.01))
    planned = best(costs, replace(whole(2048, 127), layers=30))
    assert planned.fetches == fetches
    assert planned.ttft_ms >= best(replace(costs, copy=None), replace(whole(2048, 127), layers=30)).ttft_ms


def test_pages_by_layers_have_the_speed_of_copies_of_layers() -> None:
    work = replace(whole(1024, 48), layers=30)
    costs = Costs(link(3.0, 0.1), MEASURED, 1.0, copy=link(400.0, 0.0))
    assert best(replace(costs, layer_copy=link(100.0, 0.0)), work).choice == "layers"
    assert best(replace(costs, layer_copy=link(0.3, 0.0)), work).choice == "fetch"


def test_equal_speeds_meet_in_the_middle_and_take_half_the_time() -> None:
    work = whole(4097, 256)
    prefill = PrefillCost(0.0, 1.0, 0.0)
    planned = best(Costs(LinkEstimate(0.0, 0.0, PAGE_BYTES / 16, 1.0, 8, 0), prefill, 1.0), work)
    assert planned.choice == "meet"
    assert planned.meet == pytest.approx(128, abs=1)
    assert planned.ttft_ms == pytest.approx(2048, rel=0.02)


@pytest.mark.parametrize(
    ("gbit_per_s", "rtt_ms", "choice"),
    [(10.0, 0.1, "fetch"), (0.1, 10.0, "meet"), (0.001, 50.0, "recompute")],
)
def test_fast_links_are_used_alone_slow_ones_beside_computing_and_hopeless_ones_not_at_all(
    gbit_per_s: float, rtt_ms: float, choice: str
) -> None:
    assert best(Costs(link(gbit_per_s, rtt_ms), MEASURED, 1.05), whole(2048, 127)).choice == choice


def test_an_uncertain_link_is_not_waited_for() -> None:
    work = whole(2048, 127)
    certain = best(Costs(link(10.0, 1.0), MEASURED, 1.0), work)
    uncertain = best(Costs(link(10.0, 1.0, spread=100.0), MEASURED, 1.0), work)
    assert certain.meet == 0
    assert uncertain.meet > 32


def test_what_is_being_read_is_waited_for_only_as_long_as_it_is_worth() -> None:
    work = replace(whole(2048, 127), asked=64, front=60)
    soon = best(Costs(link(0.3, 1.0), MEASURED, 1.0), replace(work, busy_ms=50.0))
    never = best(Costs(link(0.3, 1.0), MEASURED, 1.0), replace(work, busy_ms=50_000.0))
    assert soon.fetches
    assert not never.fetches


def test_idle_time_is_taken_from_the_idle_budget() -> None:
    costs = Costs(link(1.0, 1.0), MEASURED, 1.0)
    fresh = best(costs, whole(2048, 127))
    spent = split(costs, whole(2048, 127), -1.0)
    assert fresh.idle_budget_ms > 0
    assert spent.idle_budget_ms == 0


@pytest.mark.parametrize(
    ("gbit_per_s", "rtt_ms", "tokens", "least", "most"),
    [(10.0, 0.1, 2048, 0, 0), (0.01, 50.0, 2048, 127, 127)],
)
def test_while_the_tiers_are_asked_only_a_slow_link_has_the_prompt_computed(
    gbit_per_s: float, rtt_ms: float, tokens: int, least: int, most: int
) -> None:
    work = whole(tokens, (tokens - 1) // 16)
    assert least <= search_head(Costs(link(gbit_per_s, rtt_ms), MEASURED, 1.0), work) <= most


def test_reads_are_large_enough_to_hide_their_round_trips() -> None:
    slow = link(1.0, 50.0)
    batch = batch_blocks(slow, PAGE_BYTES)
    assert slow.rtt_ms <= 0.13 * fetch_ms(slow, PAGE_BYTES, batch, batch)
    assert batch_blocks(link(0.01, 0.1), PAGE_BYTES) == 1


def test_a_split_says_what_it_is() -> None:
    planned = best(Costs(link(10.0, 0.1), MEASURED, 1.0), whole(2048, 127))
    assert isinstance(planned, Split)
    assert (planned.fetches, planned.choice) == (True, "fetch")
    assert planned.ttft_ms == max(planned.compute_ms, planned.fetch_ms) + planned.tail_ms


def test_a_long_chunk_behind_the_hits_is_computed_as_they_come() -> None:
    work = replace(whole(1024, 48), layers=30)
    costs = Costs(link(3.0, 0.1), MEASURED, 1.0)
    planned = best(costs, work)
    assert planned.choice == "layers"
    assert planned.ttft_ms < best(costs, replace(work, layers=1)).ttft_ms
    assert planned.ttft_ms > planned.tail_ms
