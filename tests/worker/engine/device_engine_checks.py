"""Checks that `test_device_engine` runs in a process of its own: the whole engine on a simulated device that uses Triton.

With Triton's kernels, interpreted, where `TRITON_INTERPRET` says so, otherwise with the processor's kernels. Checks compare 64
tokens with those of the processor, in fp32. A wait that is missing is a race, which fails the check.

The time of an interpreted step grows with the programs of its kernels: those of each row, and in attention of each head of keys.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Items
from dataclasses import replace
from pathlib import Path

import pytest
from torch import Tensor

from attnstore.attention import create_attention
from attnstore.core.layout import DType
from attnstore.testing import StoreProcess
from attnstore_worker.cache import PageStore, Planner, Tier, open_store
from attnstore_worker.cache.moving.load import FetchOrder, LoadPlan
from attnstore_worker.cache.pool.block_table import BlockTable
from attnstore_worker.device.base import Graph
from attnstore_worker.device.host import HostDevice, HostGraph
from attnstore_worker.device.simulated import SimulatedDevice
from attnstore_worker.engine import (
    AttendPolicy,
    Engine,
    EngineOptions,
    FinishReason,
    SamplingParams,
    Sequence,
    device_runner,
    speculative,
)
from attnstore_worker.engine.device_runner import DeviceRunner
from attnstore_worker.engine.sequence import Chunk
from attnstore_worker.engine.step_tables import Sizes
from attnstore_worker.errors import OutOfDeviceMemory, SequenceFailed
from attnstore_worker.model import LoadedModel, load_model
from attnstore_worker.model.attention import PagedStep
from attnstore_worker.model.decoder import Decoder
from attnstore_worker.testing import FixedPlanner, MemoryStore, write_tiny_model
from tests.interpreter import cache_interpreter, omit_overflow_checks

cache_interpreter()
omit_overflow_checks()

BLOCK_TOKENS = 16
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
GREEDY = SamplingParams(max_tokens=64)
FIRST = SamplingParams(max_tokens=1)
ATTENTION = None if INTERPRETED else create_attention("cpu")
LENGTHS = (3, 16, 17, 40)


DEVICE = SimulatedDevice("late", uses_triton=True)
"""Of all engines here, one after the other."""


@pytest.fixture(autouse=True)
def no_race() -> Iterator[None]:
    yield
    assert DEVICE.races.found == []


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with one head of keys, and with tables so short that one program attends to all keys of a row."""
    folder = tmp_path_factory.mktemp("small-model")
    write_tiny_model(folder, context_tokens_max=256, kv_heads=1)
    return folder


@pytest.fixture(scope="module")
def on_device(folder: Path) -> LoadedModel:
    return load_model(folder, DType.FP32, device=DEVICE if INTERPRETED else HostDevice())


@pytest.fixture(scope="module")
def on_processor(folder: Path) -> LoadedModel:
    return load_model(folder, DType.FP32)


@pytest.fixture(scope="module")
def options(on_processor: LoadedModel) -> EngineOptions:
    return EngineOptions(pool_bytes=24 * on_processor.layout(BLOCK_TOKENS).page_bytes, chunk_tokens=32, sequences_max=6)


def prompts(first: int = 0) -> list[list[int]]:
    return [[(7 * position + first + number) % 900 + 5 for position in range(length)] for number, length in enumerate(LENGTHS)]


Generate = Callable[..., list[list[int]]]


@pytest.fixture(scope="module")
def generate(on_device: LoadedModel, options: EngineOptions) -> Generate:
    """Returns the tokens of the engine on the device. It computes prompts of `before` first, one after the other; `check` is called
    with the engine at the end.
    """

    def generate(
        prompts: list[list[int]],
        how: SamplingParams = GREEDY,
        *,
        before: Sequence[list[int]] = (),
        store: PageStore | None = None,
        planner: Planner | None = None,
        device: SimulatedDevice = DEVICE,
        check: Callable[[Engine], object] = Engine.check,
        **fields: object,
    ) -> list[list[int]]:
        changed = replace(options, **fields)  # type: ignore[arg-type]
        with Engine(on_device, changed, store=store, planner=planner, device=device, attention=ATTENTION) as engine:
            for each in before:
                engine.generate(each, FIRST)
            sequences = engine.generate_all(prompts, how)
            engine.check()
            assert engine.flush(30_000)
            check(engine)
            assert {len(sequence.generated) for sequence in sequences} == {how.max_tokens}
            return [sequence.generated for sequence in sequences]

    return generate


@pytest.fixture(scope="module")
def expected(on_processor: LoadedModel, options: EngineOptions) -> Generate:
    """Returns the tokens of the engine on the processor, without a store."""

    def expected(prompts: list[list[int]], how: SamplingParams = GREEDY) -> list[list[int]]:
        with Engine(on_processor, replace(options, pool_bytes=4 * options.pool_bytes)) as engine:
            return [engine.generate(each, how).generated for each in prompts]

    return expected


def found_in(tier: Tier, tokens: int) -> Callable[[Engine], None]:
    """Returns a check that so many tokens were hits of a tier."""

    def check(engine: Engine) -> None:
        assert engine.statistics().tiers[tier].hit_tokens == tokens

    return check


def test_tokens_are_equal_cold(generate: Generate, expected: Generate) -> None:
    batch = prompts()[2:3]
    assert generate(batch) == expected(batch)


class CapturesSome(SimulatedDevice):
    """A device with too little memory for every second graph, the first one included."""

    def __init__(self) -> None:
        super().__init__("late", uses_triton=True)
        self.captured: list[bool] = []
        self.replays = 0

    def capture(self, work: Callable[[], None]) -> Graph:
        self.captured.append(len(self.captured) % 2 == 1)
        if not self.captured[-1]:
            raise OutOfDeviceMemory("on purpose")
        graph = super().capture(work)

        def replay() -> None:
            self.replays += 1
            graph.replay()

        return HostGraph(replay)


def test_captured_steps_give_the_same_tokens_and_those_without_memory_are_left_out(
    on_device: LoadedModel, options: EngineOptions, expected: Generate
) -> None:
    """Of three sequences, which a step of four rows computes, and of the one that is left."""
    batch, device = prompts()[:3], CapturesSome()
    with Engine(on_device, options, device=device, attention=ATTENTION) as engine:
        engine.warm_up()
        sequences = [engine.submit(each, replace(GREEDY, max_tokens=most)) for each, most in zip(batch, (64, 6, 6), strict=True)]
        while not engine.idle:
            engine.step()
        engine.check()
        assert engine.statistics().pool.held == 0
    assert device.captured == [False, True] * (2 if INTERPRETED else 0), "8 rows are left out, 4 captured, 2 left out, 1 captured"
    assert (device.replays > 0) is INTERPRETED
    assert device.races.found == []
    for sequence, tokens in zip(sequences, expected(batch), strict=True):
        assert sequence.generated == tokens[: sequence.sampling.max_tokens]


def test_hits_of_every_length_in_the_pool_and_from_the_store(generate: Generate, expected: Generate) -> None:
    """The first blocks of a prompt, however many, are in the store, or in the pool after a shorter prompt."""
    store = MemoryStore()
    whole = prompts(50)[3:]
    wanted = expected(whole)
    generate(whole, FIRST, store=store)
    pages = dict(store.pages)
    for hits in range(1, len(whole[0]) // BLOCK_TOKENS + 1):
        part, tokens = MemoryStore(), hits * BLOCK_TOKENS
        part.pages = dict(list(pages.items())[:hits])
        assert generate(whole, store=part, check=found_in(Tier.REMOTE, tokens)) == wanted
        assert generate(whole, before=[whole[0][: tokens + 1]], check=found_in(Tier.HBM, tokens)) == wanted


def test_a_step_computes_behind_pages_that_arrive_layer_by_layer(generate: Generate, expected: Generate) -> None:
    store, batch = MemoryStore(), prompts(90)[3:]
    generate(batch, FIRST, store=store)

    def by_layers(engine: Engine) -> None:
        assert engine.statistics().remote.pages_read > 0

    plan = LoadPlan(0, 9_999, 9_999, 30_000.0, FetchOrder.LAYERS)
    assert generate(batch, store=store, planner=FixedPlanner(plan), check=by_layers) == expected(batch)


def test_pages_come_back_from_the_host_tier(generate: Generate, expected: Generate, options: EngineOptions) -> None:
    """A prompt that needs all blocks of the pool has moved them down."""
    batch = prompts(10)[3:]
    largest = [position % 700 + 11 for position in range(100)]
    fields = {"pool_bytes": 7 * options.pool_bytes // 24, "host_pool_bytes": options.pool_bytes}
    got = generate(batch, before=[*batch, largest], check=found_in(Tier.HOST, 2 * BLOCK_TOKENS), **fields)
    assert got == expected(batch)


@pytest.fixture(scope="module")
def node() -> Iterator[StoreProcess]:
    with StoreProcess("--capacity", "64MiB", "--attend-threads", "1") as node:
        yield node


def test_pages_come_from_a_node(generate: Generate, expected: Generate, node: StoreProcess) -> None:
    batch = prompts(30)[3:]
    for how, hits in ((FIRST, 0), (GREEDY, 2)):
        with open_store(node.url, deadline_ms=30_000) as store:
            got = generate(batch, how, store=store, check=found_in(Tier.SHARED, hits * BLOCK_TOKENS))
    assert got == expected(batch)


def test_a_sequence_attends_to_blocks_that_stay_in_a_node(generate: Generate, expected: Generate, node: StoreProcess) -> None:
    """Partials merge by Triton's kernel where it is interpreted."""
    batch, device = prompts(40)[3:], SimulatedDevice("late", uses_triton=INTERPRETED)

    def attended(engine: Engine) -> None:
        counts = engine.attending()
        assert counts is not None
        assert counts.round_trips >= GREEDY.max_tokens

    for how, check in ((FIRST, Engine.check), (GREEDY, attended)):
        with open_store(node.url, deadline_ms=30_000) as store:
            fields = {"attend": AttendPolicy.ALWAYS, "store_deadline_ms": 30_000, "device": device}
            got = generate(batch, how, store=store, check=check, **fields)
    assert got == expected(batch)
    assert device.races.found == []


def test_preempted_sequences_continue_with_the_same_tokens(generate: Generate, expected: Generate, options: EngineOptions) -> None:
    def preempted(engine: Engine) -> None:
        assert engine.batching().preemptions > 0

    batch = [each[:14] for each in prompts(60)[1:3]]
    assert generate(batch, pool_bytes=8 * options.pool_bytes // 24, check=preempted) == expected(batch)


def test_drafts_are_verified_on_the_device(generate: Generate, expected: Generate, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the drafts, which are made from the answers here, two thirds are right."""
    batch = prompts(65)[:2]
    wanted = expected(batch)
    answers = dict(zip(map(tuple, batch), wanted, strict=True))

    def draft(token_ids: Items[int], drafts_max: int) -> tuple[int, ...]:
        prompt = next(prompt for prompt in answers if tuple(token_ids[: len(prompt)]) == prompt)
        known = len(token_ids) - len(prompt)
        return (*answers[prompt][known : known + 2], 1)[:drafts_max]

    def accepted(engine: Engine) -> None:
        counts = engine.batching()
        assert 0 < counts.drafts_accepted < counts.drafts_checked

    monkeypatch.setattr(speculative, "draft", draft)
    assert generate(batch, speculate=True, check=accepted) == wanted


def test_drafts_from_resident_blocks_are_the_next_tokens_where_all_blocks_are(
    on_device: LoadedModel, expected: Generate, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some are drafted for longer than others. Steps are captured where Triton is interpreted."""
    batch = prompts(75)[1:3]
    wanted = expected(batch, SamplingParams(max_tokens=4))
    monkeypatch.setattr(device_runner, "_buckets", lambda _: [2])
    pool = DEVICE.blocks(on_device.layout(BLOCK_TOKENS), 4)
    attention = ATTENTION or create_attention("triton")
    runner = DeviceRunner(on_device, pool, attention, None, DEVICE, Sizes(64, 8, 2), before_step=lambda: None)
    runner.warm_up()
    sequences = [Sequence(number, [*each], len(each), GREEDY, 0.0) for number, each in enumerate(batch)]
    for number, sequence in enumerate(sequences):
        sequence.table = BlockTable(BLOCK_TOKENS, [3 - number, number])
    drawn = runner.run([Chunk(sequence, 0, sequence.prompt_tokens) for sequence in sequences])
    for index, sequence in enumerate(sequences):
        sequence.token_ids += drawn.tokens(index)
    last = [Chunk(sequence, sequence.prompt_tokens, sequence.prompt_tokens + 1) for sequence in sequences]
    drafts = runner.draft_resident(last[::-1], [3, 1])
    assert drafts == [wanted[1][1:], wanted[0][1:2]]


def test_sampled_tokens_do_not_depend_on_the_batch(on_device: LoadedModel, options: EngineOptions) -> None:
    how = [SamplingParams(max_tokens=5, temperature=0.9, top_k=40, top_p=0.95, seed=seed) for seed in range(3)]
    batch = prompts(70)[:3]
    with Engine(on_device, options, device=DEVICE, attention=ATTENTION) as engine:
        sequences = [engine.submit(token_ids, each) for token_ids, each in zip(batch, how, strict=True)]
        while not engine.idle:
            engine.step()
        alone = engine.generate(batch[1], how[1])
    assert alone.generated == sequences[1].generated
    assert all(sequence.finish_reason is FinishReason.LENGTH for sequence in sequences)


def test_a_sequence_that_is_cancelled_at_any_stage_leaves_the_others_their_tokens(
    generate: Generate, on_device: LoadedModel, options: EngineOptions, expected: Generate
) -> None:
    """While it waits, in its prefill, after its first token, after more tokens, and while its pages are read."""
    [kept_prompt, *_, in_store], store = prompts(80), MemoryStore()
    generate([in_store], FIRST, store=store)
    store.gate.clear()
    stages = [(prompts(100 * steps)[3], steps, drawn) for steps, drawn in ((0, 0), (1, 0), (2, 1), (5, 4))]
    with Engine(on_device, options, store=store, device=DEVICE, attention=ATTENTION) as engine:
        kept = engine.submit(kept_prompt, GREEDY)
        for prompt, steps, drawn in [*stages, (in_store, 2, 0)]:
            given_up = engine.submit(prompt, GREEDY)
            for _ in range(steps):
                engine.step()
            assert len(given_up.generated) == drawn
            assert (given_up.load is not None) is (prompt is in_store)
            engine.cancel(given_up)
            engine.check()
        store.gate.set()
        while not engine.idle:
            engine.step()
        engine.check()
        assert engine.flush(30_000)
        assert engine.statistics().pool.held == 0
    assert [kept.generated] == expected([kept_prompt])


def test_logits_are_given_to_those_who_ask_for_them(on_device: LoadedModel, options: EngineOptions) -> None:
    with Engine(on_device, options, device=DEVICE, attention=ATTENTION) as engine:
        for asks in (False, True):
            sequence = engine.submit(prompts()[0], SamplingParams(max_tokens=1, logits=asks))
            tokens = []
            while sequence.finish_reason is None:
                tokens += engine.step()
            [token] = tokens
            assert (token.logits is not None) is asks
    assert token.logits is not None
    assert int(token.logits.argmax()) == token.token_id


class Cramped:
    """A decoder on a device with too little memory for a step of more than `tokens_max` tokens."""

    capturable = False

    def __init__(self, decoder: Decoder, tokens_max: int) -> None:
        self._decoder = decoder
        self._tokens_max = tokens_max
        self.refused = 0

    def logits(self, token_ids: Tensor, positions: Tensor, rows: Tensor, step: PagedStep) -> Tensor:
        if len(token_ids) > self._tokens_max:
            self.refused += 1
            raise OutOfDeviceMemory(f"{len(token_ids)} tokens")
        return self._decoder.logits(token_ids, positions, rows, step)


@pytest.mark.parametrize("tokens_max", [35, 20], ids=["all fit alone", "one does not fit"])
def test_a_step_without_memory_is_computed_in_parts_and_only_what_does_not_fit_alone_fails(
    on_device: LoadedModel, options: EngineOptions, expected: Generate, tokens_max: int
) -> None:
    how = replace(GREEDY, max_tokens=3)
    decoder = Cramped(on_device.decoder, tokens_max)
    with Engine(replace(on_device, decoder=decoder), options, device=DEVICE, attention=ATTENTION) as engine:
        sequences = [engine.submit(each, how) for each in prompts(700)]
        while not engine.idle:
            engine.step()
            engine.check()
        assert engine.statistics().pool.held == 0
    assert decoder.refused
    *short, long = zip(sequences, expected(prompts(700), how), strict=True)
    assert all(sequence.generated == tokens for sequence, tokens in short)
    if tokens_max < options.chunk_tokens:
        assert isinstance(long[0].error, SequenceFailed)
        assert "does not fit: 32 tokens" in str(long[0].error)
    else:
        assert long[0].generated == long[1]
