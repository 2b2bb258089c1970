"""A failure of one sequence ends only that sequence, with a typed error.

The others get the tokens of a run without faults, and no block, lease, pin or place in a queue is lost.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from operator import attrgetter
from typing import Any, ClassVar

import pytest
import torch

from attnstore.core.eviction import EVICTION_POLICIES
from attnstore_worker.cache.moving.load import Load, LoadPlan, Prompt
from attnstore_worker.cache.planning.observation import Answer, Step
from attnstore_worker.cache.pool.block_table import BlockTable
from attnstore_worker.cache.store.transfer import Transfer
from attnstore_worker.engine import Engine, EngineOptions, FinishReason, SamplingParams
from attnstore_worker.engine import Sequence as Prompted
from attnstore_worker.engine.runner import Drawn
from attnstore_worker.engine.sampler import Sampler, peaks
from attnstore_worker.engine.sequence import Chunk
from attnstore_worker.engine.speculative import accepted_tokens
from attnstore_worker.errors import LogitsNotFinite, SequenceFailed
from attnstore_worker.model import LoadedModel
from attnstore_worker.testing import FixedPlanner, MemoryStore
from tests.samples import eventually

NAN, INF = torch.nan, torch.inf

SPOILT: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "NaN at one place": lambda row: row.index_fill(0, torch.tensor(7), NAN),
    "NaN everywhere": lambda row: torch.full_like(row, NAN),
    "one positive infinity": lambda row: row.index_fill(0, torch.tensor(7), INF),
    "positive infinities": lambda row: torch.full_like(row, INF),
    "negative infinities": lambda row: torch.full_like(row, -INF),
    "NaN beside an infinity": lambda row: row.index_fill(0, torch.tensor(7), INF).index_fill(0, torch.tensor(3), NAN),
}
HOW: list[dict[str, Any]] = [
    {},
    {"temperature": 0.2},
    {"temperature": 0.7, "top_k": 20},
    {"temperature": 0.2, "top_p": 0.9},
    {"temperature": 0.7, "top_k": 20, "top_p": 0.9, "stops": ("never said",)},
]
"""Each draws from few tokens, so that the rounding of batches of other shapes changes no draw."""


class OnPurpose(Exception):
    """An error that is not one of AttnStore's."""


def options(model: LoadedModel, blocks: int = 60, **others: Any) -> EngineOptions:
    return EngineOptions(pool_bytes=blocks * model.layout(16).page_bytes, chunk_tokens=64, **others)


def prompts(count: int, seed: int) -> list[list[int]]:
    """A third of them repeat themselves, so that drafts are made."""
    generator = random.Random(seed)
    made = []
    for number in range(count):
        token_ids = [generator.randrange(3, 49_000) for _ in range(generator.randint(20, 100))]
        made.append(token_ids[:9] * 8 if number % 3 == 0 else token_ids)
    return made


def finish(engine: Engine) -> dict[Prompted, str]:
    """Runs to the end, looking for lost blocks after every step; returns the texts."""
    texts: dict[Prompted, str] = {}
    while not engine.idle:
        for token in engine.step():
            texts[token.sequence] = texts.get(token.sequence, "") + token.text
        engine.check()
    return texts


def assert_nothing_is_held(engine: Engine, store: MemoryStore | None = None) -> None:
    """Waits for the last writes, and checks that no block, prefetch, lease or announcement is held."""
    assert engine.flush(30_000)
    assert eventually(lambda: engine.flush(1) and engine.statistics().pool.held == 0)
    engine.check()
    assert not engine._residency._prefetch._running
    assert not engine._residency._prefetch._tried
    assert engine.statistics().quarantined == 0
    if store is not None:
        assert eventually(lambda: not store.leases)


@contextmanager
def rows_spoilt(engine: Engine, spoil: Callable[[Chunk, torch.Tensor], torch.Tensor]) -> Iterator[None]:
    """The rows `[n, vocabulary]` of each chunk that gives tokens become what `spoil` makes of them."""
    run, compute = engine._runner.run, engine.model.decoder.logits
    running: list[Chunk] = []

    def noted(chunks: Sequence[Chunk], *args: Any, **kwargs: Any) -> Drawn:
        running[:] = chunks
        return run(chunks, *args, **kwargs)

    def spoilt(*args: Any) -> torch.Tensor:
        logits = compute(*args).clone()
        begin = 0
        for chunk in running:
            if chunk.gives_token:
                end = begin + 1 + len(chunk.drafts)
                logits[begin:end] = spoil(chunk, logits[begin:end])
                begin = end
        return logits

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine._runner, "run", noted)
        patch.setattr(engine.model.decoder, "logits", spoilt)
        yield


@pytest.mark.parametrize("spoilt", SPOILT)
@pytest.mark.parametrize("how", HOW, ids=str)
def test_no_token_is_drawn_from_a_row_that_is_not_finite_and_no_draw_is_used_up(spoilt: str, how: dict[str, Any]) -> None:
    row = torch.randn(50, generator=torch.Generator().manual_seed(3))
    (peak,) = peaks(row[None])
    expected = Sampler(SamplingParams(**how)).sample(row, peak)
    sampler = Sampler(SamplingParams(**how))
    bad = SPOILT[spoilt](row)
    with pytest.raises(LogitsNotFinite):
        sampler.sample(bad, peaks(bad[None])[0])
    assert sampler.sample(row, peak) == expected


@pytest.mark.parametrize("how", HOW, ids=str)
def test_negative_infinities_rule_tokens_out_and_are_no_fault(how: dict[str, Any]) -> None:
    row = torch.full((50,), -INF)
    row[[4, 9]] = torch.tensor([1.0, 2.0])
    (peak,) = peaks(row[None])
    sampler = Sampler(SamplingParams(**how))
    assert {sampler.sample(row, peak) for _ in range(50)} <= {4, 9}


@pytest.mark.gpu
def test_peaks_are_the_same_wherever_the_logits_lie() -> None:
    rows = torch.randn(8, 50, generator=torch.Generator().manual_seed(3)).round()
    for row, spoil in zip(rows, SPOILT.values(), strict=False):
        row[:] = spoil(row)
    for here, there in zip(peaks(rows), peaks(rows.cuda()), strict=True):
        assert here.is_finite == there.is_finite
        assert here == there or not here.is_finite


def test_verification_ends_before_a_row_that_is_not_finite_and_fails_at_the_first() -> None:
    rows = torch.full((4, 9), -10.0)
    for row, token in enumerate([3, 4, 5, 6]):
        rows[row, token] = 10.0
    rows[2] = NAN
    greedy = Sampler(SamplingParams())
    assert accepted_tokens(greedy, [3, 4, 5], rows.unbind(), peaks(rows)) == [3, 4]
    assert accepted_tokens(greedy, [3, 8, 5], rows.unbind(), peaks(rows)) == [3, 4]
    with pytest.raises(LogitsNotFinite):
        accepted_tokens(greedy, [5], rows[2:].unbind(), peaks(rows[2:]))


@pytest.mark.usefixtures("each_device")
@pytest.mark.parametrize("speculate", [False, True])
@pytest.mark.parametrize("spoilt", SPOILT)
def test_only_the_sequence_whose_row_is_not_finite_fails(tiny: LoadedModel, spoilt: str, speculate: bool) -> None:
    """For every way to sample. Before that row, the sequence got the right tokens."""
    batch = prompts(len(HOW) * 2, seed=4)
    how = [SamplingParams(max_tokens=12, seed=number, **HOW[number // 2]) for number in range(len(batch))]

    def run(spoil: Callable[[Chunk, torch.Tensor], torch.Tensor]) -> tuple[list[Prompted], dict[Prompted, str]]:
        with Engine(tiny, options(tiny, 120, speculate=speculate)) as engine, rows_spoilt(engine, spoil):
            sequences = [engine.submit(*each) for each in zip(batch, how, strict=True)]
            texts = finish(engine)
            assert_nothing_is_held(engine)
            return sequences, texts

    def spoil(chunk: Chunk, rows: torch.Tensor) -> torch.Tensor:
        """Spoils the rows of every second sequence that follow five generated tokens or more."""
        first = 5 - len(chunk.sequence.generated)
        if chunk.sequence.sequence_id % 2 == 0 and first < len(rows):
            rows[max(first, 0) :] = SPOILT[spoilt](rows[0])
        return rows

    expected, expected_texts = run(lambda _, rows: rows)
    sequences, texts = run(spoil)
    for right, sequence in zip(expected, sequences, strict=True):
        if sequence.sequence_id % 2 == 0:
            assert sequence.finish_reason is FinishReason.FAILED
            assert isinstance(sequence.error, LogitsNotFinite)
            assert sequence.generated == right.generated[:5]
        else:
            assert (sequence.finish_reason, sequence.error) == (FinishReason.LENGTH, None)
            assert sequence.generated == right.generated
            assert texts[sequence] == expected_texts[right]


@pytest.mark.usefixtures("each_device")
def test_what_a_chunk_without_numbers_wrote_is_found_by_nobody(tiny: LoadedModel, store: MemoryStore) -> None:
    token_ids = prompts(2, seed=6)[1][:48]
    with Engine(tiny, options(tiny), store=store) as engine:
        with rows_spoilt(engine, lambda _, rows: torch.full_like(rows, NAN)), pytest.raises(LogitsNotFinite):
            engine.generate(token_ids, SamplingParams(max_tokens=4))
        assert_nothing_is_held(engine, store)
        assert not store.pages
        again = engine.generate([*token_ids, 5], SamplingParams(max_tokens=4))
        assert again.admission is not None
        assert again.admission.hit_tokens == 0


class RaisingObserver:
    """An observer whose methods all raise."""

    def __init__(self) -> None:
        self.told: set[type] = set()

    def _refuse(self, observation: object) -> None:
        self.told.add(type(observation))
        raise OnPurpose

    transferred = stepped = loaded = answered = _refuse


def test_an_observer_that_raises_costs_nobody_anything(tiny: LoadedModel, store: MemoryStore) -> None:
    token_ids, how = prompts(2, seed=7)[1], SamplingParams(max_tokens=4)
    observer = RaisingObserver()
    with Engine(tiny, options(tiny), store=store) as engine:
        expected = engine.generate(token_ids, how).generated
        assert engine.flush(30_000)
    with Engine(tiny, options(tiny), store=store, observer=observer) as engine:
        sequence = engine.generate(token_ids, how)
        assert sequence.generated == expected
        assert sequence.admission is not None
        assert sequence.admission.remote_tokens > 0
        assert_nothing_is_held(engine, store)
    assert observer.told == {Transfer, Step, Load, Answer}


class RaisingPlanner(FixedPlanner):
    """A planner that raises in the methods named."""

    def __init__(self, *mistakes: str) -> None:
        super().__init__(LoadPlan(0, 99, 1, 60_000.0))
        self._mistakes = mistakes
        for mistake in mistakes:
            setattr(self, mistake, self._raise)

    def _raise(self, *_: object) -> Any:
        raise OnPurpose

    def prefetches(self, prompt: Prompt) -> bool:
        del prompt
        return True


@pytest.mark.parametrize("mistake", ["search", "load", "replan", "prefetches"])
def test_a_planner_that_raises_costs_hits_and_no_more(tiny: LoadedModel, store: MemoryStore, mistake: str) -> None:
    batch, how = prompts(4, seed=8), SamplingParams(max_tokens=4)
    with Engine(tiny, options(tiny), store=store) as engine:
        expected = [sequence.generated for sequence in engine.generate_all(batch, how)]
        assert engine.flush(30_000)
    with Engine(tiny, options(tiny, sequences_max=1), store=store, planner=RaisingPlanner(mistake)) as engine:
        assert [sequence.generated for sequence in engine.generate_all(batch, how)] == expected
        assert_nothing_is_held(engine, store)


def test_a_prompt_that_cannot_be_announced_leaves_no_place_in_the_queue_taken(
    tiny: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Engine(tiny, options(tiny)) as engine:
        with monkeypatch.context() as patch:
            patch.setattr(engine._cache, "announce", _raise)
            with pytest.raises(OnPurpose):
                engine.submit([5, 6, 7])
        assert engine.idle
        assert len(engine.generate([5, 6, 7], SamplingParams(max_tokens=2)).generated) == 2


def test_an_end_that_goes_wrong_gives_back_all_the_rest_and_stays_an_end(
    tiny: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Engine(tiny, options(tiny)) as engine:
        monkeypatch.setattr(engine._residency._prefetch, "forget", _raise)
        for steps in range(3):
            sequence = engine.submit([5, 6, 7], SamplingParams(max_tokens=2))
            with monkeypatch.context() as patch:
                patch.setattr(engine._residency._prefetch, "forget", lambda _: None)
                for _ in range(min(steps, 1)):
                    engine.step()
            engine.cancel(sequence)
            assert sequence.finish_reason is FinishReason.CANCELLED
            assert engine.idle
            assert engine.statistics().pool.held == 0
            engine.check()


def _raise(*_: object) -> Any:
    raise OnPurpose


class FaultInjector:
    """Makes operations of an engine fail at random for some sequences: rows, samplers, texts, blocks, and their ends."""

    FAULTY: ClassVar = {
        "_cache": ("admit", "prefetch", "grow", "seal"),
        "_cache.loads": ("advance", "claim", "abandon"),
    }

    def __init__(self, engine: Engine, generator: random.Random, patch: pytest.MonkeyPatch) -> None:
        self._engine = engine
        self._random = generator
        self.doomed: set[int] = set()
        """By their second token, which nobody else has."""
        for owner, names in self.FAULTY.items():
            for name in names:
                subject = attrgetter(owner)(engine)
                patch.setattr(subject, name, self._faulty(getattr(subject, name), after=name == "abandon"))
        patch.setattr(BlockTable, "is_intact", self._faulty(BlockTable.is_intact, after=False))
        patch.setattr(engine._residency._prefetch, "forget", self._faulty(engine._residency._prefetch.forget, after=True))

    def doom(self, sequence: Prompted) -> None:
        """From now on something may fail."""
        self.doomed.add(sequence.token_ids[1])
        assert sequence.text_stream is not None
        for owner, name in [(sequence.sampler, "sample"), (sequence.text_stream, "push"), (sequence.text_stream, "finish")]:
            setattr(owner, name, self._sometimes(getattr(owner, name)))

    def spoil(self, chunk: Chunk, rows: torch.Tensor) -> torch.Tensor:
        """As `rows_spoilt` requires."""
        if chunk.sequence.token_ids[1] in self.doomed and self._random.random() < 0.05:
            return self._random.choice(list(SPOILT.values()))(rows[0]).expand_as(rows)
        return rows

    def _sometimes(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def called(*args: Any) -> Any:
            if self._random.random() < 0.05:
                raise OnPurpose
            return call(*args)

        return called

    def _faulty(self, call: Callable[..., Any], *, after: bool) -> Callable[..., Any]:
        """Raises for a doomed sequence, `after` the call or instead of it."""

        def called(*args: Any) -> Any:
            fails = self._concerns_doomed(args) and self._random.random() < 0.05
            if fails and not after:
                raise OnPurpose
            result = call(*args)
            if fails:
                raise OnPurpose
            return result

        return called

    def _concerns_doomed(self, args: Sequence[Any]) -> bool:
        subject = args[0]
        if isinstance(subject, list):
            return subject[1] in self.doomed
        scheduler = self._engine._scheduler
        for sequence in [*scheduler.running, *scheduler.waiting]:
            if subject is not None and subject in (sequence, sequence.table, sequence.load):
                return sequence.token_ids[1] in self.doomed
        return False


@pytest.mark.usefixtures("each_device")
@pytest.mark.parametrize(("seed", "each_device"), list(enumerate(["cpu", "early", "late"] * 2)), indirect=["each_device"])
def test_whatever_fails_for_some_sequences_the_others_get_their_tokens_and_nothing_is_lost(
    tiny: LoadedModel, store: MemoryStore, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    print(f"seed {seed}")
    generator = random.Random(seed)
    batch = prompts(30, seed)
    for number, token_ids in enumerate(batch):
        token_ids[1] = 10_000 + number  # the prompt's name
    how = [SamplingParams(max_tokens=12, seed=number, **generator.choice(HOW)) for number in range(len(batch))]
    speculate = generator.random() < 0.5
    with Engine(tiny, options(tiny, 400, speculate=speculate)) as engine:
        for each in zip(batch, how, strict=True):
            engine.submit(*each)
        running = [*engine._scheduler.waiting]
        expected_texts = finish(engine)
        expected = {sequence.token_ids[1]: sequence for sequence in running}
    small = options(
        tiny,
        40,
        sequences_max=6,
        speculate=speculate,
        store_deadline_ms=5_000,
        eviction=generator.choice(EVICTION_POLICIES),
        prefetch_sequences=2,
        host_pool_bytes=generator.choice([0, 20]) * tiny.layout(16).page_bytes,
    )
    planner = FixedPlanner(LoadPlan(0, 99, 2, 60_000.0), searching=2)
    with Engine(tiny, small, store=store, planner=planner, observer=RaisingObserver()) as engine, monkeypatch.context() as patch:
        saboteur = FaultInjector(engine, generator, patch)
        live: list[Prompted] = []
        texts: dict[Prompted, str] = {}
        todo = list(zip(batch, how, strict=True)) * 2  # the second time, pages are found
        with rows_spoilt(engine, saboteur.spoil):
            while todo or not engine.idle:
                if todo and generator.random() < 0.5:
                    token_ids, sampling = todo.pop(0)
                    live.append(engine.submit(token_ids, sampling, priority=generator.randrange(2)))
                    if token_ids[1] % 3 == 0:
                        saboteur.doom(live[-1])
                for token in engine.step():
                    texts[token.sequence] = texts.get(token.sequence, "") + token.text
                engine.check()
    assert_nothing_is_held(engine, store)
    failed = [sequence for sequence in live if sequence.finish_reason is FinishReason.FAILED]
    assert len(failed) > 3
    assert all(isinstance(sequence.error, SequenceFailed) for sequence in failed)
    assert engine.batching().failures == len(failed)
    for sequence in live:
        right = expected[sequence.token_ids[1]]
        if sequence.token_ids[1] not in saboteur.doomed:
            assert sequence.finish_reason is right.finish_reason
            assert sequence.generated == right.generated
            assert texts[sequence] == expected_texts[right]
        assert sequence.generated == right.generated[: len(sequence.generated)]
