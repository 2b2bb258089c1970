"""The engine with models: the tokens do not depend on where the KV came from."""

from __future__ import annotations

import pydoc_data.topics
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from attnstore.attention import create_attention
from attnstore.core.eviction import EVICTION_POLICIES
from attnstore.core.layout import DType
from attnstore.errors import InvalidArgument, Unavailable
from attnstore.types import PageStatus
from attnstore_worker.engine import Engine, EngineOptions, FinishReason, SamplingParams, Sequence
from attnstore_worker.engine.sequence import next_chunk
from attnstore_worker.errors import ContextOverflow, PoolTooSmall
from attnstore_worker.model import LoadedModel, load_model
from attnstore_worker.testing import MemoryStore

WAIT_MS = 30_000
TINY_OPTIONS = EngineOptions(pool_bytes=1 << 20, chunk_tokens=64)


def greedy(tokens: int) -> SamplingParams:
    return SamplingParams(max_tokens=tokens)


def prompt(model: LoadedModel, tokens: int) -> list[int]:
    text = "\n\n".join(pydoc_data.topics.topics[name] for name in sorted(pydoc_data.topics.topics))
    ids: list[int] = model.tokenizer(text[: tokens * 8], verbose=False).input_ids
    assert len(ids) >= tokens
    return ids[:tokens]


def run(model: LoadedModel, options: EngineOptions, token_ids: list[int], new_tokens: int, store: MemoryStore | None) -> Sequence:
    """Runs one request in an engine of its own, and checks that the engine holds nothing afterwards."""
    with Engine(model, options, store=store) as engine:
        sequence = engine.generate(token_ids, greedy(new_tokens))
        assert engine.flush(WAIT_MS)
        engine.check()
        assert engine.statistics().pool.held == 0
        return sequence


def hit_tokens(sequence: Sequence) -> int:
    assert sequence.admission is not None
    return sequence.admission.hit_tokens


@pytest.mark.slow
def test_64_greedy_tokens_are_equal_for_hits_of_every_length(model: LoadedModel, store: MemoryStore) -> None:
    options = EngineOptions(pool_bytes=20 * model.layout(16).page_bytes, chunk_tokens=64)
    token_ids = prompt(model, 10 * 16 + 1)
    expected = run(model, options, token_ids, 64, None).generated
    assert run(model, options, token_ids, 64, store).generated == expected
    pages = dict(store.pages)
    names = list(pages)
    for hits in range(11):
        partial = MemoryStore()
        partial.pages = {name: pages[name] for name in names[:hits]}
        warm = run(model, options, token_ids, 64, partial)
        assert hit_tokens(warm) == hits * 16
        assert warm.generated == expected, f"with {hits} blocks from the store"


def test_the_logits_are_those_of_transformers_own_attention(model: LoadedModel) -> None:
    token_ids = prompt(model, 150)
    with Engine(model, EngineOptions(pool_bytes=16 * model.layout(16).page_bytes, chunk_tokens=64)) as engine:
        sequence = engine.submit(token_ids, replace(greedy(1), logits=True))
        while not (tokens := engine.step()):
            pass
    assert sequence.finish_reason is FinishReason.LENGTH
    module = model.module
    module.set_attn_implementation("sdpa")
    try:
        with torch.inference_mode():
            expected = module(torch.tensor([token_ids]), use_cache=False, logits_to_keep=1).logits[0, -1]
    finally:
        module.set_attn_implementation("attnstore_paged")
    assert tokens[0].logits is not None
    torch.testing.assert_close(tokens[0].logits, expected, atol=2e-3, rtol=1e-4)


@pytest.mark.usefixtures("each_device")
@pytest.mark.parametrize("blocks", range(7))
def test_a_tiny_model_gives_the_same_tokens_for_every_hit_length(tiny: LoadedModel, store: MemoryStore, blocks: int) -> None:
    token_ids = prompt(tiny, 100)
    expected = run(tiny, TINY_OPTIONS, token_ids, 20, store).generated
    store.pages = dict(list(store.pages.items())[:blocks])
    warm = run(tiny, TINY_OPTIONS, token_ids, 20, store)
    assert hit_tokens(warm) == blocks * 16
    assert warm.generated == expected


@pytest.mark.usefixtures("each_device")
def test_generated_blocks_are_reused_by_a_prompt_that_continues_them(tiny: LoadedModel, store: MemoryStore) -> None:
    first = run(tiny, TINY_OPTIONS, prompt(tiny, 40), 30, store)
    longer = [*first.token_ids, 5, 6, 7]
    warm = run(tiny, TINY_OPTIONS, longer, 10, store)
    assert hit_tokens(warm) == 64, "69 tokens had their KV in the pool, which is four whole blocks"
    assert warm.generated == run(tiny, TINY_OPTIONS, longer, 10, None).generated


@pytest.mark.parametrize("chunk_tokens", [16, 48, 256])
def test_the_size_of_chunks_does_not_change_the_tokens(tiny: LoadedModel, chunk_tokens: int) -> None:
    token_ids = prompt(tiny, 130)
    options = EngineOptions(pool_bytes=1 << 20, chunk_tokens=chunk_tokens)
    assert run(tiny, options, token_ids, 20, None).generated == run(tiny, TINY_OPTIONS, token_ids, 20, None).generated


def test_chunks_end_at_absolute_multiples_whatever_was_hit() -> None:
    sequence = Sequence(1, list(range(100)), 100, greedy(1), 0.0)
    ends = []
    sequence.computed_tokens = 48
    while sequence.computed_tokens < 100:
        chunk = next_chunk(sequence, 32)
        assert chunk.gives_token == (chunk.end == 100)
        ends.append(chunk.end)
        sequence.computed_tokens = chunk.end
    assert ends == [64, 96, 100]


def _missing(store: MemoryStore) -> None:
    store.read_status = lambda _: PageStatus.MISSING


def _corrupt_from_the_third(store: MemoryStore) -> None:
    store.read_status = lambda index: PageStatus.OK if index < 2 else PageStatus.CORRUPT


def _late_from_the_second(store: MemoryStore) -> None:
    store.read_status = lambda index: PageStatus.OK if index < 1 else PageStatus.INCOMPLETE


def _absent(store: MemoryStore) -> None:
    store.failing = ["register_layout", "match", "read", "write", "release"]
    store.error = Unavailable("connection refused")


def _full(store: MemoryStore) -> None:
    store.write_verdict = PageStatus.NO_SPACE


def _hanging(store: MemoryStore) -> None:
    store.gate.clear()


@pytest.mark.usefixtures("each_device")
@pytest.mark.parametrize("fault", [_missing, _corrupt_from_the_third, _late_from_the_second, _absent, _full, _hanging])
def test_tokens_are_right_whatever_the_store_does(
    tiny: LoadedModel, store: MemoryStore, fault: Callable[[MemoryStore], None]
) -> None:
    token_ids = prompt(tiny, 100)
    expected = run(tiny, TINY_OPTIONS, token_ids, 20, store).generated
    fault(store)
    options = EngineOptions(pool_bytes=1 << 20, chunk_tokens=64, store_deadline_ms=20)
    with Engine(tiny, options, store=store) as engine:
        assert engine.generate(token_ids, greedy(20)).generated == expected
        other = [token + 1 for token in token_ids]
        assert engine.generate(other, greedy(20)).generated == run(tiny, TINY_OPTIONS, other, 20, None).generated
        engine.check()


@pytest.mark.usefixtures("each_device")
def test_evicted_blocks_come_back_from_the_store(tiny: LoadedModel, store: MemoryStore) -> None:
    options = EngineOptions(pool_bytes=8 * tiny.layout(16).page_bytes, chunk_tokens=64)
    first, second = prompt(tiny, 100), prompt(tiny, 200)[100:]
    with Engine(tiny, options, store=store) as engine:
        expected = engine.generate(first, greedy(10)).generated
        assert engine.flush(WAIT_MS)
        engine.generate(second, greedy(10))
        assert engine.statistics().pool.evicted > 0
        again = engine.generate(first, greedy(10))
        assert again.generated == expected
        assert again.admission is not None
        assert again.admission.remote_tokens > 0
        engine.check()


@pytest.mark.usefixtures("each_device")
def test_sequences_run_in_the_order_of_submission_and_do_not_disturb_each_other(tiny: LoadedModel) -> None:
    prompts = [prompt(tiny, 30 + 20 * index)[20 * index :] for index in range(3)]
    with Engine(tiny, TINY_OPTIONS) as engine:
        sequences = [engine.submit(token_ids, greedy(8)) for token_ids in prompts]
        finished: list[int] = []
        while len(finished) < 3:
            finished += [token.sequence.sequence_id for token in engine.step() if token.sequence.finish_reason is not None]
        assert finished == [sequence.sequence_id for sequence in sequences]
        assert engine.step() == []
    for sequence, token_ids in zip(sequences, prompts, strict=True):
        assert sequence.generated == run(tiny, TINY_OPTIONS, token_ids, 8, None).generated


def test_warming_up_leaves_no_trace(tiny: LoadedModel, store: MemoryStore) -> None:
    with Engine(tiny, TINY_OPTIONS, store=store) as engine:
        engine.warm_up()
        engine.check()
        assert engine.statistics().pool.free == engine.statistics().pool.capacity
        assert store.calls == ["register_layout"]
        assert store.pages == {}


def test_every_backend_of_attention_gives_the_same_tokens(tiny: LoadedModel) -> None:
    token_ids = prompt(tiny, 100)
    with Engine(tiny, TINY_OPTIONS, attention=create_attention("reference")) as engine:
        assert engine.generate(token_ids, greedy(20)).generated == run(tiny, TINY_OPTIONS, token_ids, 20, None).generated


def test_a_stop_token_ends_the_sequence(tiny: LoadedModel) -> None:
    token_ids = prompt(tiny, 30)
    expected = run(tiny, TINY_OPTIONS, token_ids, 10, None).generated
    with Engine(tiny, TINY_OPTIONS) as engine:
        stopped = engine.generate(token_ids, SamplingParams(max_tokens=10, stop_token_ids=frozenset([expected[4]])))
    assert stopped.finish_reason is FinishReason.STOP
    assert stopped.generated == expected[: expected.index(expected[4]) + 1]


def test_the_seed_decides_what_is_drawn(tiny: LoadedModel) -> None:
    def draw(seed: int) -> list[int]:
        with Engine(tiny, TINY_OPTIONS) as engine:
            return engine.generate(prompt(tiny, 20), SamplingParams(max_tokens=12, temperature=1.0, seed=seed)).generated

    assert draw(1) == draw(1)
    assert draw(1) != draw(2)


def test_generation_ends_where_the_context_or_the_pool_does(tiny: LoadedModel) -> None:
    roomy = EngineOptions(pool_bytes=40 * tiny.layout(16).page_bytes)
    in_context = run(tiny, roomy, prompt(tiny, 505), 100, None)
    assert in_context.finish_reason is FinishReason.CONTEXT_FULL
    assert len(in_context.token_ids) == tiny.context_tokens_max
    small = EngineOptions(pool_bytes=2 * tiny.layout(16).page_bytes)
    in_pool = run(tiny, small, prompt(tiny, 30), 100, None)
    assert in_pool.finish_reason is FinishReason.POOL_FULL
    assert in_pool.blocks_used == 2


def test_a_prompt_that_cannot_run_is_refused_with_the_limit(tiny: LoadedModel) -> None:
    with Engine(tiny, EngineOptions(pool_bytes=4 * tiny.layout(16).page_bytes)) as engine:
        with pytest.raises(PoolTooSmall, match="holds 64"):
            engine.submit(prompt(tiny, 65))
        with pytest.raises(ContextOverflow, match="512"):
            engine.submit(prompt(tiny, 512))
        with pytest.raises(InvalidArgument, match="empty"):
            engine.submit([])
        with pytest.raises(InvalidArgument, match="vocabulary"):
            engine.submit([1 << 20])
        engine.check()


@pytest.mark.usefixtures("each_device")
@pytest.mark.parametrize("eviction", EVICTION_POLICIES)
def test_what_is_evicted_never_changes_a_token(tiny: LoadedModel, eviction: str) -> None:
    """Four prompts, twice, through a pool that holds one and a half of them."""
    token_ids = prompt(tiny, 400)
    prompts = [token_ids[begin : begin + 100] for begin in range(0, 400, 100)] * 2
    expected = [run(tiny, TINY_OPTIONS, each, 4, None).generated for each in prompts]
    options = EngineOptions(pool_bytes=10 * tiny.layout(16).page_bytes, chunk_tokens=64, eviction=eviction)
    with Engine(tiny, options) as engine:
        sequences = [engine.submit(each, greedy(4)) for each in prompts]
        while any(sequence.finish_reason is None for sequence in sequences):
            engine.step()
            engine.check()
        assert [sequence.generated for sequence in sequences] == expected


def test_an_unknown_eviction_policy_is_refused(tiny: LoadedModel) -> None:
    with pytest.raises(InvalidArgument, match="'clock' is unknown"):
        Engine(tiny, EngineOptions(pool_bytes=1 << 20, eviction="clock"))


@pytest.mark.parametrize("options", [{"chunk_tokens": 0}, {"chunk_tokens": 24}, {"store_deadline_ms": 0}])
def test_options_that_do_not_fit_together_are_refused(options: dict[str, int]) -> None:
    with pytest.raises(InvalidArgument, match=next(iter(options))):
        EngineOptions(**options)


@pytest.mark.parametrize("sampling", [{"max_tokens": 0}, {"temperature": -1.0}, {"temperature": float("nan")}])
def test_sampling_out_of_range_is_refused(sampling: dict[str, float]) -> None:
    with pytest.raises(InvalidArgument, match=next(iter(sampling))):
        SamplingParams(**sampling)  # type: ignore[arg-type]


@pytest.mark.slow
def test_in_bf16_a_hit_changes_logits_by_rounding_only(store: MemoryStore, record_property: Callable[[str, object], None]) -> None:
    """The largest difference is recorded; it comes from the shape of the last step, which bf16 rounds differently."""
    model = load_model(dtype=DType.BF16)
    options = EngineOptions(pool_bytes=20 * model.layout(16).page_bytes, chunk_tokens=64)
    token_ids = prompt(model, 150)
    logits = []
    for _ in range(2):
        with Engine(model, options, store=store) as engine:
            engine.submit(token_ids, replace(greedy(1), logits=True))
            while not (tokens := engine.step()):
                pass
            assert engine.flush(WAIT_MS)
        assert tokens[0].logits is not None
        logits.append(tokens[0].logits)
    difference = float((logits[0] - logits[1]).abs().max())
    record_property("bf16_logit_difference_max", difference)
    spread = float(logits[0].max() - logits[0].mean())
    assert difference < 0.1 * spread
