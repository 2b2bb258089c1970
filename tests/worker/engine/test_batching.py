"""Many sequences at once: each gets the tokens that it would get alone, and no block is ever lost."""

from __future__ import annotations

import random
import time
from collections import Counter
from itertools import cycle

import pytest
import torch

from attnstore.core.eviction import EVICTION_POLICIES
from attnstore.errors import InvalidArgument, Overloaded
from attnstore.types import PageStatus
from attnstore_worker.cache.moving.load import FetchOrder, Load, LoadPlan, Prompt, SearchPlan
from attnstore_worker.engine import Engine, EngineOptions, FinishReason, SamplingParams, Sequence
from attnstore_worker.engine.sampler import Sampler, peaks
from attnstore_worker.errors import StepFailed
from attnstore_worker.model import LoadedModel
from attnstore_worker.options import WRITE_POLICIES
from attnstore_worker.testing import MemoryStore

WAIT_MS = 30_000


def options(model: LoadedModel, blocks: int, **others: int | str) -> EngineOptions:
    return EngineOptions(pool_bytes=blocks * model.layout(16).page_bytes, chunk_tokens=64, **others)  # type: ignore[arg-type]


def prompts(count: int, seed: int = 1, shortest: int = 20, longest: int = 150) -> list[list[int]]:
    generator = random.Random(seed)
    return [[generator.randrange(3, 49_000) for _ in range(generator.randint(shortest, longest))] for _ in range(count)]


def alone(model: LoadedModel, token_ids: list[int], sampling: SamplingParams) -> list[int]:
    with Engine(model, options(model, 40)) as engine:
        return engine.generate(token_ids, sampling).generated


def finish(engine: Engine) -> None:
    """Runs to the end, and looks for lost blocks after every step."""
    while not engine.idle:
        engine.step()
        engine.check()
    give_up_s = time.monotonic() + WAIT_MS / 1e3
    while engine.statistics().pool.held > 0:  # until the last transfer ends
        assert time.monotonic() < give_up_s
        engine.flush(1)
        time.sleep(0.001)
    engine.check()


@pytest.mark.usefixtures("each_device")
def test_sequences_in_a_batch_get_the_tokens_of_running_alone(tiny: LoadedModel) -> None:
    sampling = [SamplingParams(max_tokens=20, temperature=0.8 * (i % 2), top_k=50, top_p=0.9, seed=i) for i in range(8)]
    with Engine(tiny, options(tiny, 100)) as engine:
        sequences = [engine.submit(each, how) for each, how in zip(prompts(8), sampling, strict=True)]
        finish(engine)
        assert engine.batching().steps < 60, "they ran together, not one after another"
    for sequence, how in zip(sequences, sampling, strict=True):
        assert sequence.generated == alone(tiny, sequence.token_ids[: sequence.prompt_tokens], how)


@pytest.mark.usefixtures("each_device")
@pytest.mark.parametrize(
    ("eviction", "each_device"), list(zip(EVICTION_POLICIES, cycle(["cpu", "early", "late"]))), indirect=["each_device"]
)
@pytest.mark.parametrize("with_store", [False, True])
def test_a_pool_of_a_quarter_of_what_eight_sequences_need_changes_no_token(
    tiny: LoadedModel, store: MemoryStore, eviction: str, with_store: bool
) -> None:
    how = SamplingParams(max_tokens=60)
    batch = prompts(8, seed=3, shortest=60, longest=100)
    needed = sum(-(-(len(each) + 60) // 16) for each in batch)
    small = options(tiny, needed // 4, eviction=eviction)
    with Engine(tiny, small, store=store if with_store else None) as engine:
        sequences = [engine.submit(each, how) for each in batch]
        finish(engine)
        assert engine.batching().preemptions > 0
    for sequence, token_ids in zip(sequences, batch, strict=True):
        assert sequence.finish_reason is FinishReason.LENGTH
        assert sequence.generated == alone(tiny, token_ids, how)


@pytest.mark.slow
def test_the_real_model_gives_equal_tokens_in_a_quarter_of_the_pool(model: LoadedModel) -> None:
    """In fp32. Where a token differs, its logit must have been a near tie with that of the expected one; ties are printed."""
    how = SamplingParams(max_tokens=24, logits=True)
    batch = prompts(8, seed=5, shortest=30, longest=40)
    with Engine(model, options(model, 40)) as engine:
        expected = [engine.generate(each, how).generated for each in batch]
    with Engine(model, options(model, 7)) as engine:
        sequences = [engine.submit(each, how) for each in batch]
        logits: dict[int, list[torch.Tensor]] = {sequence.sequence_id: [] for sequence in sequences}
        while not engine.idle:
            for token in engine.step():
                assert token.logits is not None
                logits[token.sequence.sequence_id].append(token.logits)
            engine.check()
        assert engine.batching().preemptions > 0
    for sequence, tokens in zip(sequences, expected, strict=True):
        differing = next((i for i, pair in enumerate(zip(sequence.generated, tokens, strict=True)) if pair[0] != pair[1]), None)
        if differing is not None:
            row = logits[sequence.sequence_id][differing]
            gap = float(row[sequence.generated[differing]] - row[tokens[differing]])
            print(f"sequence {sequence.sequence_id} differs at token {differing}: a tie within {gap:.2g}")
            assert gap < 1e-3


def test_rows_are_sampled_together_as_each_by_itself() -> None:
    """Also where logits are equal, which is common in bf16."""
    generator = torch.Generator().manual_seed(3)
    logits = (torch.randn(12, 49_152, generator=generator) * 2).bfloat16().float()
    how = [SamplingParams(temperature=float(row % 3 == 2), seed=row) for row in range(12)]
    assert any((row == row.max()).sum() > 1 for row in logits)
    expected = [Sampler(each).sample(row, peaks(row[None])[0]) for each, row in zip(how, logits, strict=True)]
    together = zip(how, logits, peaks(logits), strict=True)
    assert [Sampler(each).sample(row, peak) for each, row, peak in together] == expected
    greedy = [token for token, each in zip(expected, how, strict=True) if each.temperature == 0.0]
    lowest = [int((row == row.max()).nonzero()[0]) for row, each in zip(logits, how, strict=True) if each.temperature == 0.0]
    assert greedy == lowest


@pytest.mark.usefixtures("each_device")
def test_a_sequence_that_was_preempted_draws_the_same_tokens(tiny: LoadedModel) -> None:
    """Its random generator keeps its state: tokens that are computed again are not drawn again."""
    how = SamplingParams(max_tokens=50, temperature=1.0, seed=11)
    batch = prompts(4, seed=9, shortest=40, longest=50)
    with Engine(tiny, options(tiny, 12)) as engine:
        sequences = [engine.submit(each, how) for each in batch]
        finish(engine)
        assert any(sequence.preemptions for sequence in sequences)
    assert [sequence.generated for sequence in sequences] == [alone(tiny, each, how) for each in batch]


@pytest.mark.usefixtures("each_device")
@pytest.mark.parametrize(("seed", "each_device"), list(enumerate(["cpu", "early", "late"] * 2)), indirect=["each_device"])
def test_no_block_is_lost_whatever_is_cancelled_preempted_or_fails(tiny: LoadedModel, store: MemoryStore, seed: int) -> None:
    print(f"seed {seed}")
    generator = random.Random(seed)
    batch = prompts(24, seed=seed)
    how = SamplingParams(max_tokens=16)
    expected: dict[int, list[int]] = {}
    small = options(
        tiny,
        24,
        sequences_max=6,
        store_deadline_ms=20,
        eviction=generator.choice(EVICTION_POLICIES),
        write_policy=generator.choice(WRITE_POLICIES),
    )
    with Engine(tiny, small, store=store, planner=_AnyPlan(seed)) as engine:
        live: list[Sequence] = []
        while batch or not engine.idle:
            _break_something(store, generator)
            if batch and generator.random() < 0.4:
                # Half of the prompts come twice, so that some pages are found.
                index = generator.randrange(len(batch))
                token_ids = batch[index] if generator.random() < 0.5 else batch.pop(index)
                live.append(engine.submit(token_ids, how, priority=generator.randrange(2)))
            if live and generator.random() < 0.1:
                engine.cancel(generator.choice(live))
                engine.check()
            engine.step()
            engine.check()
        _mend(store)
        finish(engine)
    reasons = Counter(sequence.finish_reason for sequence in live)
    assert reasons[FinishReason.CANCELLED] > 0
    assert set(reasons) <= {FinishReason.CANCELLED, FinishReason.LENGTH, FinishReason.OVERLOADED}
    for sequence in live:
        token_ids = sequence.token_ids[: sequence.prompt_tokens]
        tokens = expected.setdefault(hash(tuple(token_ids)), alone(tiny, token_ids, how))
        assert sequence.generated == tokens[: len(sequence.generated)]


class _AnyPlan:
    """Makes any plan, even one that no sensible planner makes."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)

    def search(self, prompt: Prompt) -> SearchPlan | None:
        del prompt
        return self._random.choice([None, SearchPlan(20.0, self._compute_before()), SearchPlan(WAIT_MS, self._compute_before())])

    def plan(self, load: Load) -> LoadPlan | None:
        begin, end = sorted(self._random.randrange(-1, load.hit_end + 3) for _ in range(2))
        deadline_ms = self._random.choice([1.0, 20.0, 200.0])
        order = self._random.choice(list(FetchOrder))
        plan = LoadPlan(begin, end, self._random.randrange(0, 6), deadline_ms, order, self._compute_before())
        return self._random.choice([None, plan, plan, plan])

    def replan(self, load: Load, now_ms: float) -> LoadPlan | None:
        del now_ms
        assert load.plan is not None
        if self._random.random() < 0.1:
            return None
        begin, end = sorted(self._random.randrange(-1, load.hit_end + 3) for _ in range(2))
        batch_blocks = self._random.randrange(0, 6)
        return LoadPlan(begin, end, batch_blocks, load.plan.deadline_ms, load.plan.order, self._compute_before())

    def _compute_before(self) -> int:
        return self._random.choice([0, self._random.randrange(20), 99])

    def prefetches(self, prompt: Prompt) -> bool:
        del prompt
        return self._random.random() < 0.7


def _break_something(store: MemoryStore, generator: random.Random) -> None:
    if generator.random() < 0.1:
        _mend(store)
    if generator.random() < 0.1:
        store.failing = [generator.choice(["match", "read", "write", "release"])]
    if generator.random() < 0.1:
        broken = generator.choice([PageStatus.MISSING, PageStatus.CORRUPT, PageStatus.INCOMPLETE])
        store.read_status = lambda index: broken if index % 3 == 2 else PageStatus.OK
    if generator.random() < 0.1:
        store.on_page = lambda _: time.sleep(0.002)
    if generator.random() < 0.1:
        store.before_layer = lambda _: time.sleep(0.005)
    if generator.random() < 0.05:
        store.gate.clear()


def _mend(store: MemoryStore) -> None:
    store.failing = ()
    store.read_status = lambda _: PageStatus.OK
    store.on_page = store.before_layer = lambda _: None
    store.gate.set()


@pytest.mark.usefixtures("each_device")
def test_cancelling_gives_every_block_back_at_every_stage(tiny: LoadedModel) -> None:
    token_ids = prompts(1, seed=2, shortest=150)[0]
    for steps in range(6):  # waiting, three chunks of prefill, decoding
        with Engine(tiny, options(tiny, 20)) as engine:
            sequence = engine.submit(token_ids, SamplingParams(max_tokens=30))
            for _ in range(steps):
                engine.step()
            engine.cancel(sequence)
            assert sequence.finish_reason is FinishReason.CANCELLED
            assert engine.idle
            assert engine.statistics().pool.held == 0
            engine.check()
            engine.cancel(sequence)
            assert engine.generate(token_ids, SamplingParams(max_tokens=2)).finish_reason is FinishReason.LENGTH


@pytest.mark.usefixtures("each_device")
def test_a_step_that_raises_ends_its_sequences_and_the_others_go_on(tiny: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("on purpose")

    how = SamplingParams(max_tokens=3)
    batch = prompts(3, seed=8, shortest=20, longest=30)
    with Engine(tiny, options(tiny, 40, sequences_max=2)) as engine:
        sequences = [engine.submit(each, how) for each in batch]
        engine.step()
        with monkeypatch.context() as patch:
            patch.setattr(engine.model.decoder, "logits", broken)
            with pytest.raises(RuntimeError, match="on purpose"):
                engine.step()
        assert [sequence.finish_reason for sequence in sequences] == [FinishReason.FAILED, FinishReason.FAILED, None]
        assert [type(sequence.error) for sequence in sequences] == [StepFailed, StepFailed, type(None)]
        assert engine.statistics().pool.held == 0
        engine.check()
        finish(engine)
        assert sequences[2].generated == alone(tiny, batch[2], how)


def test_a_finished_sequence_cannot_be_cancelled_any_more(tiny: LoadedModel) -> None:
    with Engine(tiny, options(tiny, 20)) as engine:
        sequence = engine.generate([5, 6, 7], SamplingParams(max_tokens=1))
        engine.cancel(sequence)
        assert sequence.finish_reason is FinishReason.LENGTH


def test_a_higher_priority_runs_first(tiny: LoadedModel) -> None:
    with Engine(tiny, options(tiny, 40, sequences_max=1)) as engine:
        sequences = [engine.submit([5, 6, priority], SamplingParams(max_tokens=2), priority=priority) for priority in (0, 1, 2)]
        finished: list[int] = []
        while not engine.idle:
            finished += [token.sequence.priority for token in engine.step() if token.sequence.finish_reason is not None]
    assert finished == [2, 1, 0]
    assert all(sequence.finish_reason is FinishReason.LENGTH for sequence in sequences)


def test_a_full_queue_refuses_and_generate_all_waits_for_room(tiny: LoadedModel) -> None:
    with Engine(tiny, options(tiny, 40, sequences_max=2, waiting_max=2)) as engine:
        for _ in range(2):
            engine.submit([5, 6, 7])
        with pytest.raises(Overloaded):
            engine.submit([5, 6, 7])
        finish(engine)
        sequences = engine.generate_all(prompts(7), SamplingParams(max_tokens=3))
        assert [len(sequence.generated) for sequence in sequences] == [3] * 7


@pytest.mark.usefixtures("each_device")
def test_blocks_that_a_hanging_transfer_keeps_end_a_sequence_in_bounded_time(tiny: LoadedModel, store: MemoryStore) -> None:
    token_ids = prompts(1, seed=4, shortest=150)[0]
    small = options(tiny, 11, store_deadline_ms=20)
    with Engine(tiny, small, store=store) as engine:
        engine.generate(token_ids, SamplingParams(max_tokens=2))
        assert engine.flush(WAIT_MS)
        engine.generate(prompts(1, seed=6, shortest=150)[0], SamplingParams(max_tokens=2))
        assert engine.flush(WAIT_MS)
        store.gate.clear()
        sequence = engine.generate(token_ids, SamplingParams(max_tokens=2))
        assert sequence.finish_reason is FinishReason.OVERLOADED, "its own blocks are in quarantine"
        engine.check()
        _mend(store)
        finish(engine)
        again = engine.generate(token_ids, SamplingParams(max_tokens=2))
        assert again.finish_reason is FinishReason.LENGTH


def test_a_stop_string_ends_the_sequence_and_is_not_in_its_text(tiny: LoadedModel) -> None:
    token_ids = prompts(1)[0]

    def text_of(how: SamplingParams) -> tuple[str, Sequence]:
        with Engine(tiny, options(tiny, 20)) as engine:
            sequence = engine.submit(token_ids, how)
            text = ""
            while not engine.idle:
                text += "".join(token.text for token in engine.step())
        return text, sequence

    whole, _ = text_of(SamplingParams(max_tokens=30))
    stop = whole[20:26]
    text, sequence = text_of(SamplingParams(max_tokens=30, stops=(stop,)))
    assert sequence.finish_reason is FinishReason.STOP
    assert text == whole[: whole.index(stop)]
    assert len(sequence.generated) < 30


class TestSampling:
    """Samples one row of logits."""

    LOGITS = torch.tensor([0.0, 3.0, 2.0, 1.0, -1.0])
    PEAK = peaks(LOGITS[None])[0]

    def draws(self, params: SamplingParams) -> set[int]:
        sampler = Sampler(params)
        return {sampler.sample(self.LOGITS, self.PEAK) for _ in range(300)}

    def test_top_k_draws_from_the_k_likeliest(self) -> None:
        assert self.draws(SamplingParams(temperature=5.0, top_k=2)) == {1, 2}

    def test_top_p_draws_from_the_smallest_set_that_reaches_p(self) -> None:
        # softmax: 0.03, 0.63, 0.23, 0.09, 0.01
        assert self.draws(SamplingParams(temperature=1.0, top_p=0.63)) == {1}
        assert self.draws(SamplingParams(temperature=1.0, top_p=0.8)) == {1, 2}

    def test_a_k_beyond_the_vocabulary_allows_all_of_it(self) -> None:
        assert self.draws(SamplingParams(temperature=20.0, top_k=10_000)) == {0, 1, 2, 3, 4}

    def test_the_smallest_temperature_is_greedy(self) -> None:
        assert self.draws(SamplingParams(temperature=5e-324)) == {1}

    @pytest.mark.parametrize("top_p", [0.999, 1.0])
    def test_draws_follow_the_probabilities(self, top_p: float) -> None:
        sampler = Sampler(SamplingParams(temperature=1.0, top_p=top_p))
        counts = Counter(sampler.sample(self.LOGITS, self.PEAK) for _ in range(4000))
        expected = torch.softmax(self.LOGITS, dim=-1)
        assert all(abs(counts[token] / 4000 - float(expected[token])) < 0.04 for token in range(5))

    @pytest.mark.parametrize(
        "params",
        [{"top_k": 0}, {"top_p": 0.0}, {"top_p": 1.1}, {"top_p": float("nan")}, {"seed": -1}, {"seed": 1 << 64}, {"stops": ("",)}],
    )
    def test_parameters_out_of_range_are_refused(self, params: dict[str, float]) -> None:
        with pytest.raises(InvalidArgument, match=next(iter(params))):
            SamplingParams(**params)  # type: ignore[arg-type]
