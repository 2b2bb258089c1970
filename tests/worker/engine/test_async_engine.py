"""The engine behind asyncio: streams of many at once, each of which ends exactly once."""

from __future__ import annotations

import asyncio
import random
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from attnstore.errors import InvalidArgument, Overloaded, Unavailable
from attnstore_worker.engine import AsyncEngine, Engine, EngineOptions, FinishReason, SamplingParams, TokenStream
from attnstore_worker.errors import ContextOverflow, SequenceFailed, StepFailed
from attnstore_worker.model import LoadedModel

LONG = SamplingParams(max_tokens=300)


@pytest.fixture
def engine(tiny: LoadedModel) -> Iterator[Engine]:
    """Room for 640 tokens, two sequences at once and three that wait."""
    options = EngineOptions(pool_bytes=40 * tiny.layout(16).page_bytes, chunk_tokens=64, sequences_max=2, waiting_max=3)
    with Engine(tiny, options) as engine:
        yield engine
        engine.check()
        assert engine.idle
        assert engine.statistics().pool.held == 0


def prompt(seed: int) -> list[int]:
    generator = random.Random(seed)
    return [generator.randrange(3, 49_000) for _ in range(20)]


async def tokens_of(stream: TokenStream) -> list[int]:
    return [token.token_id async for token in stream]


async def test_streams_give_the_tokens_of_running_alone(engine: Engine, tiny: LoadedModel) -> None:
    how = SamplingParams(max_tokens=12)
    with AsyncEngine(engine) as front:
        streams = [await front.submit(prompt(seed), how) for seed in range(2)]
        generated = await asyncio.gather(*map(tokens_of, streams))
        assert [stream.finish_reason for stream in streams] == [FinishReason.LENGTH] * 2
        assert [stream.prompt_tokens for stream in streams] == [20, 20]
    with Engine(tiny, engine.options) as alone:
        assert generated == [alone.generate(prompt(seed), how).generated for seed in range(2)]


async def test_leaving_a_stream_early_cancels_its_sequence(engine: Engine) -> None:
    with AsyncEngine(engine) as front:
        stream = await front.submit(prompt(1), LONG)
        async with stream:
            async for _ in stream:
                break
        assert len(await tokens_of(stream)) < 299
        assert stream.finish_reason is FinishReason.CANCELLED
        assert front.snapshot.batching.running == 0


async def test_a_waiting_stream_can_be_cancelled(engine: Engine) -> None:
    with AsyncEngine(engine) as front:
        streams = [await front.submit(prompt(seed), LONG) for seed in range(3)]
        for stream in reversed(streams):
            stream.cancel()
        await asyncio.gather(*map(tokens_of, streams))
        assert {stream.finish_reason for stream in streams} == {FinishReason.CANCELLED}


async def test_what_the_engine_refuses_is_raised_to_the_caller(engine: Engine) -> None:
    with AsyncEngine(engine) as front:
        with pytest.raises(ContextOverflow):
            await front.submit([5] * 700, LONG)
        outcomes = await asyncio.gather(*(front.submit(prompt(seed), LONG) for seed in range(8)), return_exceptions=True)
        streams = [outcome for outcome in outcomes if isinstance(outcome, TokenStream)]
        assert {type(outcome) for outcome in outcomes} == {TokenStream, Overloaded}
        for stream in streams:
            stream.cancel()
        await asyncio.gather(*map(tokens_of, streams))


async def test_cancelling_the_submission_itself_leaves_nothing_behind(engine: Engine) -> None:
    with AsyncEngine(engine) as front:
        task = asyncio.ensure_future(front.submit(prompt(1), LONG))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert await tokens_of(await front.submit(prompt(2), SamplingParams(max_tokens=2)))


async def test_closing_ends_every_stream_and_refuses_the_next(engine: Engine) -> None:
    front = AsyncEngine(engine)
    streams = [await front.submit(prompt(seed), LONG) for seed in range(3)]
    await asyncio.to_thread(front.close)
    for ended in await asyncio.gather(*map(tokens_of, streams), return_exceptions=True):
        assert isinstance(ended, Unavailable)
    assert not front.alive
    with pytest.raises(Unavailable):
        await front.submit(prompt(1), LONG)
    front.close()


async def test_a_step_that_raises_fails_its_streams_and_the_next_ones_are_computed(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    compute = engine.model.decoder.logits
    broken = iter([False, False, True])

    def break_once(*args: Any, **kwargs: Any) -> object:
        if next(broken, False):
            raise torch.OutOfMemoryError("on purpose")
        return compute(*args, **kwargs)

    monkeypatch.setattr(engine.model.decoder, "logits", break_once)
    with AsyncEngine(engine) as front:
        stream = await front.submit(prompt(1), LONG)
        with pytest.raises(StepFailed):
            await tokens_of(stream)
        assert stream.finish_reason is FinishReason.FAILED
        assert await tokens_of(stream) == [], "it has ended"
        assert len(await tokens_of(await front.submit(prompt(2), SamplingParams(max_tokens=2)))) == 2
        assert front.alive
        assert front.snapshot.batching.failures == 1
    assert "on purpose" in caplog.text


async def test_an_engine_that_can_compute_nothing_any_more_fails_all_streams(
    tiny: LoadedModel, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Those that ran in the step, one that waits, and one that comes later."""
    engine = Engine(tiny, EngineOptions(pool_bytes=1 << 20, chunk_tokens=64, sequences_max=1))
    lost = threading.Event()
    compute = engine.model.decoder.logits

    def lose(*args: Any, **kwargs: Any) -> object:
        if lost.is_set():
            raise RuntimeError("the device is lost")
        return compute(*args, **kwargs)

    monkeypatch.setattr(engine.model.decoder, "logits", lose)
    with AsyncEngine(engine) as front:
        streams = [await front.submit(prompt(seed), LONG) for seed in range(2)]
        lost.set()
        ends = await asyncio.gather(*map(tokens_of, streams), return_exceptions=True)
        assert [type(end) for end in ends] == [StepFailed, Unavailable]
        with pytest.raises(Unavailable):
            await front.submit(prompt(3), LONG)
        assert not front.alive
    assert "the device is lost" in caplog.text
    assert engine.idle
    assert engine.statistics().pool.held == 0


async def test_a_prompt_that_cannot_even_be_looked_at_is_its_callers_error_alone(engine: Engine) -> None:
    how = SamplingParams(max_tokens=3)
    with AsyncEngine(engine) as front:
        for wrong in (["five"], [5.5], [None], [1 << 70]):
            with pytest.raises(InvalidArgument):
                await front.submit(wrong, how)  # type: ignore[arg-type]
        with pytest.raises(SequenceFailed):
            await front.submit(prompt(1), SamplingParams(max_tokens=3, seed=5.5))  # type: ignore[arg-type]
        assert len(await tokens_of(await front.submit(prompt(1), how))) == 3


async def test_an_engine_that_fails_fails_every_stream(
    tiny: LoadedModel, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    engine = Engine(tiny, EngineOptions(pool_bytes=1 << 20, chunk_tokens=64))

    def broken() -> None:
        raise RuntimeError("on purpose")

    monkeypatch.setattr(engine, "step", broken)
    with AsyncEngine(engine) as front, pytest.raises(Unavailable):
        await tokens_of(await front.submit(prompt(1), LONG))
    assert not front.alive
    assert "on purpose" in caplog.text
    assert engine.idle
    assert engine.statistics().pool.held == 0


def test_a_stream_whose_event_loop_is_gone_is_cancelled(engine: Engine) -> None:
    with AsyncEngine(engine) as front:

        async def submit() -> None:
            await front.submit(prompt(1), LONG)

        asyncio.run(submit())
        assert asyncio.run(_generate(front)) == 2


async def _generate(front: AsyncEngine) -> int:
    return len(await tokens_of(await front.submit(prompt(2), SamplingParams(max_tokens=2))))
