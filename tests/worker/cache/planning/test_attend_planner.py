"""The fourth choice: its arithmetic, what it learns from, and an engine that follows it with the right tokens."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

import attnstore
from attnstore import errors
from attnstore.clock import MonotonicClock
from attnstore.testing import ManualClock, StoreProcess
from attnstore_worker.cache import CostPlanner, FetchAll
from attnstore_worker.cache.moving.load import Prompt
from attnstore_worker.cache.planning.attend_planner import GAIN_MIN, AttendForecast
from attnstore_worker.cache.planning.observation import Step
from attnstore_worker.cache.pool.tier import Tier
from attnstore_worker.cache.store.transfer import Transfer, TransferKind
from attnstore_worker.engine import AttendPolicy, Engine, EngineOptions, SamplingParams
from attnstore_worker.engine import Sequence as Prompted
from attnstore_worker.model import LoadedModel

MS = st.floats(0.1, 1e5)
LAYERS, PAGE_BYTES, ROW_BYTES = 30, 368_640, 139_320


def forecast(*, attend: float = 0.0, load: float = 1_000.0, rent: float = 10.0) -> AttendForecast:
    return AttendForecast(attend_ttft_ms=attend, attend_step_ms=30.0 + rent, load_ttft_ms=load, resident_step_ms=30.0)


def test_short_answers_attend_and_long_ones_load() -> None:
    assert forecast().attends(10)
    assert not forecast().attends(200)


def test_where_a_step_at_the_node_is_no_longer_nothing_is_ever_moved() -> None:
    assert forecast(rent=-5).attends(10_000)
    assert not forecast(rent=-5).moves(spent=10_000, expected=10_000, most=10_000)


def test_a_sequence_moves_when_enough_tokens_are_expected_or_were_paid_for() -> None:
    assert forecast().moves(spent=0, expected=200, most=200)
    assert not forecast().moves(spent=0, expected=50, most=200)
    assert forecast().moves(spent=120, expected=0, most=200)
    assert not forecast().moves(spent=120, expected=0, most=20)  # too near its end


@given(attend=MS, load=MS, rent=MS, length=st.integers(1, 5_000), expected=st.integers(0, 5_000))
def test_whatever_was_expected_a_sequence_pays_little_more_than_twice_the_better_choice(
    attend: float, load: float, rent: float, length: int, expected: int
) -> None:
    costs = forecast(attend=attend, load=load, rent=rent)
    rent_paid = 0.0
    for step in range(length):
        if costs.moves(spent=step, expected=max(expected - step, 0), most=5_000 - step):
            rent_paid += load
            break
        rent_paid += rent
    best = min(rent * length, load)
    surplus = rent_paid - best
    assert surplus <= (1 + GAIN_MIN) * load + rent


def test_the_blocks_of_a_victim_are_worth_what_having_them_again_costs() -> None:
    assert forecast().leaves(10, other_load_ms=1_000.0)
    assert not forecast().leaves(200, other_load_ms=1_000.0)


# What it learns from


def taught(*, attended_ms: float | None = None, opens_in_ms: float = 0.2) -> CostPlanner:
    """Prefill takes 1 ms per token, steps take 30 ms, the link has 0.5 ms and 1 Gb/s."""
    planner = CostPlanner(ManualClock(), 256)
    for begin in range(0, 1024, 256):
        planner.stepped(Step(0.0, 256.0, ((begin, begin + 256),)))
    planner.stepped(Step(0.0, 30.0, ((1024, 1025),)))
    planner.transferred(Transfer(Tier.REMOTE, TransferKind.MATCH, 0.0, 0.5, 10, 10, 0, failed=False))
    for pages in (1, 8):
        size = pages * PAGE_BYTES
        planner.transferred(Transfer(Tier.REMOTE, TransferKind.READ, 0.0, 0.5 + size / 125_000, pages, pages, size, failed=False))
    planner.transferred(Transfer(Tier.REMOTE, TransferKind.ATTEND, 0.0, opens_in_ms, 10, 10, 0, failed=False))
    if attended_ms is not None:
        for _ in range(20):
            planner.stepped(Step(0.0, attended_ms, ((2048, 2049),), LAYERS, ROW_BYTES))
    return planner


def asked(tokens: int = 2_048, resident: int = 0) -> Prompt:
    return Prompt(1, tokens, 16, PAGE_BYTES, LAYERS, resident, (tokens - 1) // 16)


def test_nothing_is_forecast_before_everything_was_measured() -> None:
    planner = CostPlanner(ManualClock(), 256)
    assert planner.attend_forecast(asked(), 127, ROW_BYTES) is None
    planner.transferred(Transfer(Tier.REMOTE, TransferKind.ATTEND, 0.0, 0.2, 10, 10, 0, failed=False))
    assert planner.attend_forecast(asked(), 127, ROW_BYTES) is None


def test_before_the_first_attended_step_the_formula_speaks() -> None:
    found = taught().attend_forecast(asked(), 127, ROW_BYTES)
    assert found is not None
    assert found.resident_step_ms == pytest.approx(30)
    assert found.attend_step_ms == pytest.approx(30 + LAYERS * 0.2 + ROW_BYTES / 125_000, rel=0.05)
    assert found.load_ttft_ms == pytest.approx(127 * PAGE_BYTES / 125_000 + 17, rel=0.2)


def test_attended_steps_correct_the_formula_and_teach_nothing_else() -> None:
    before, after = taught().report(), taught(attended_ms=93.0).report()
    assert (after.decode_ms, after.prefill) == (before.decode_ms, before.prefill)
    found = taught(attended_ms=93.0).attend_forecast(asked(), 127, ROW_BYTES)
    assert found is not None
    assert found.attend_step_ms == pytest.approx(93, rel=0.05)


def test_blocks_that_are_here_make_loading_cheaper() -> None:
    whole, half = (taught().attend_forecast(asked(resident=blocks), 127, ROW_BYTES) for blocks in (0, 64))
    assert whole is not None
    assert half is not None
    assert half.load_ttft_ms < 0.6 * whole.load_ttft_ms
    assert half.attend_step_ms == whole.attend_step_ms


def test_a_decision_to_attend_is_on_record_with_what_it_was_weighed_against() -> None:
    planner = taught()
    found = planner.attend_forecast(asked(), 127, ROW_BYTES)
    assert found is not None
    planner.attending(asked(), 127, found)
    decision = planner._log.get(1)
    assert decision is not None
    assert (decision.choice, decision.hit_end) == ("attend", 127)
    assert decision.forecasts == {"attend": found.attend_ttft_ms, "planned": found.load_ttft_ms}


# The engine

BLOCKS = 12


class Scripted(FetchAll):
    """A planner whose forecasts the test sets."""

    def __init__(self) -> None:
        super().__init__(60_000)
        self.says: AttendForecast | None = None
        self.decided = 0

    def attend_forecast(self, prompt: Prompt, remote_blocks: int, row_bytes: int, /) -> AttendForecast | None:
        del prompt, remote_blocks, row_bytes
        return self.says

    def attending(self, prompt: Prompt, remote_blocks: int, forecast: AttendForecast, /) -> None:
        del prompt, remote_blocks, forecast
        self.decided += 1


@pytest.fixture(scope="module")
def node() -> Iterator[StoreProcess]:
    with StoreProcess("--capacity", "64MiB", "--attend-threads", "1") as node:
        yield node


@pytest.fixture
def client(node: StoreProcess) -> Iterator[attnstore.Client]:
    with attnstore.connect(node.url, transport="tcp", deadline_ms=60_000) as client:
        yield client


def options(model: LoadedModel, salt: str, blocks: int = BLOCKS, attend: AttendPolicy = AttendPolicy.MEASURED) -> EngineOptions:
    """A pool of `blocks` blocks, and pages that only this test uses."""
    pool_bytes = blocks * model.layout(16).page_bytes
    return EngineOptions(pool_bytes=pool_bytes, chunk_tokens=32, attend=attend, store_deadline_ms=60_000, tenant_salt=salt.encode())


def prompt_of(tokens: int, seed: int = 0) -> list[int]:
    return [(11 * index * index + 5 * index + seed) % 4096 + 10 for index in range(tokens)]


def resident(model: LoadedModel, token_ids: list[int], tokens: int) -> list[int]:
    with Engine(model, EngineOptions(pool_bytes=64 * model.layout(16).page_bytes, chunk_tokens=32)) as engine:
        return engine.generate(token_ids, SamplingParams(max_tokens=tokens)).generated


def warmed(engine: Engine, token_ids: list[int]) -> None:
    """Puts the prompt's pages into the store, not into the pool."""
    engine.generate(token_ids, SamplingParams(max_tokens=1))
    assert engine.flush(60_000)
    engine.drop_cached()


def run(engine: Engine, *sequences: Prompted) -> None:
    while any(sequence.finish_reason is None for sequence in sequences):
        engine.step()
        engine.check()


def test_measured_costs_need_a_planner_that_measures(tiny: LoadedModel, client: attnstore.Client) -> None:
    with pytest.raises(errors.InvalidArgument, match="measures costs"):
        Engine(tiny, options(tiny, "none"), store=client)


@pytest.mark.parametrize(("says", "attends"), [(forecast(), True), (forecast(attend=500.0, load=1.0), False), (None, False)])
def test_hits_are_attended_to_where_that_is_forecast_to_be_better(
    tiny: LoadedModel, client: attnstore.Client, says: AttendForecast | None, attends: bool
) -> None:
    planner, token_ids = Scripted(), prompt_of(6 * 16 + 5)
    with Engine(tiny, options(tiny, f"better {says}"), store=client, planner=planner) as engine:
        warmed(engine, token_ids)
        planner.says = says
        sequence = engine.submit(token_ids, SamplingParams(max_tokens=8))
        run(engine, sequence)
        attending = engine.attending()
        assert attending is not None
        assert (attending.round_trips > 0) is attends
        assert planner.decided == int(attends)
        assert attending.pages_open == 0
        assert sequence.generated == resident(tiny, token_ids, 8)


def test_for_lack_of_room_one_attends_so_that_another_keeps_its_blocks(tiny: LoadedModel, client: attnstore.Client) -> None:
    planner = Scripted()
    prompts = [prompt_of(4 * 16 + 3, seed) for seed in (3, 4)]
    with Engine(tiny, options(tiny, "room"), store=client, planner=planner) as engine:
        for token_ids in prompts:  # also here: a load may be so slow that the other sequence has ended before
            engine.generate(token_ids, SamplingParams(max_tokens=1))
            assert engine.flush(60_000)
        # No sequence attends by choice, and having the blocks here again costs as much as anything else.
        planner.says = forecast(attend=1e6, load=1e6, rent=1.0)
        sequences = [engine.submit(token_ids, SamplingParams(max_tokens=40)) for token_ids in prompts]
        run(engine, *sequences)
        attending = engine.attending()
        assert attending is not None
        assert attending.round_trips > 0
        assert engine.batching().preemptions == 0
        assert [each.generated for each in sequences] == [resident(tiny, token_ids, 40) for token_ids in prompts]


def test_without_forecasts_lack_of_room_preempts_as_ever(tiny: LoadedModel, client: attnstore.Client) -> None:
    prompts = [prompt_of(4 * 16 + 3, seed) for seed in (5, 6)]
    with Engine(tiny, options(tiny, "preempts"), store=client, planner=Scripted()) as engine:
        sequences = [engine.submit(token_ids, SamplingParams(max_tokens=40)) for token_ids in prompts]
        run(engine, *sequences)
        assert engine.batching().preemptions > 0
        assert [each.generated for each in sequences] == [resident(tiny, token_ids, 40) for token_ids in prompts]


def test_with_costs_that_are_really_measured_the_tokens_stay_right_and_decisions_are_recorded(
    tiny: LoadedModel, client: attnstore.Client
) -> None:
    clock = MonotonicClock()
    planner = CostPlanner(clock, 32)
    prompts = [prompt_of(7 * 16 + 3, seed) for seed in range(6)]
    # A model this small may compute so fast that the planner never uses the link; a worker that always reads shows it.
    with Engine(
        tiny,
        options(tiny, "real", attend=AttendPolicy.NEVER),
        store=client,
        clock=clock,
        planner=FetchAll(60_000),
        observer=planner,
    ) as engine:
        warmed(engine, prompt_of(7 * 16 + 3, seed=6))
        engine.generate(prompt_of(7 * 16 + 3, seed=6), SamplingParams(max_tokens=1))
    with Engine(tiny, options(tiny, "real"), store=client, clock=clock, planner=planner, observer=planner) as engine:
        for token_ids in prompts:
            warmed(engine, token_ids)
            # Longer than the pool, so it has to attend, which teaches the costs.
            engine.generate(prompt_of(BLOCKS * 16 + 40, seed=token_ids[0]), SamplingParams(max_tokens=3))
        known = []
        for token_ids in prompts:
            engine.drop_cached()
            sequence = engine.generate(token_ids, SamplingParams(max_tokens=6))
            engine.check()
            assert sequence.generated == resident(tiny, token_ids, 6)
            known.append(planner.report().attend is not None)
        assert any(known)  # not each time: a read that misses its deadline on a busy machine has the link measured again
        assert len(planner.decisions(len(prompts))) == len(prompts)
