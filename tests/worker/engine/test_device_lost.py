"""A device that is lost: every stream ends with a typed error, the engine takes no more prompts, and no block stays held."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest
from torch import Tensor

from attnstore.attention import create_attention
from attnstore.errors import AttnStoreError, Unavailable
from attnstore_worker.device.base import Copies, Event, Wait
from attnstore_worker.device.simulated import SimulatedDevice
from attnstore_worker.engine import AsyncEngine, Engine, EngineOptions, SamplingParams, TokenStream
from attnstore_worker.errors import DeviceLost
from attnstore_worker.model import LoadedModel
from attnstore_worker.testing import MemoryStore
from tests.worker.device.watched_copies import WatchedCopies

LONG = SamplingParams(max_tokens=200)
END_S = 30.0


class LosableDevice(SimulatedDevice):
    """Every call that submits raises once `lost` is set; with `waits`, only waits for tokens do."""

    def __init__(self, *, waits: bool) -> None:
        super().__init__("late", uses_triton=True)
        self.lost = False
        self._waits = waits

    def lose(self) -> None:
        """Raises if the device is lost."""
        if self.lost:
            raise DeviceLost("the driver reported an error")

    def transfer(self, source: Tensor, target: Tensor) -> Event:
        if not self._waits:
            self.lose()
        return _LosableEvent(super().transfer(source, target), self.lose)

    def copies(self, blocks: Tensor) -> Copies:
        return WatchedCopies(super().copies(blocks), lambda *_: self.lose())


class _LosableEvent:
    def __init__(self, event: Event, lose: Callable[[], None]) -> None:
        self._event = event
        self._lose = lose

    def done(self) -> bool:
        return self._event.done()

    def wait(self, wait: Wait) -> None:
        self._lose()
        self._event.wait(wait)


def prompt(number: int) -> list[int]:
    return [(31 * position + 7 * number) % 900 + 5 for position in range(50)]


def engine_on(device: SimulatedDevice, tiny: LoadedModel, store: MemoryStore | None = None) -> Engine:
    options = EngineOptions(pool_bytes=64 * tiny.layout(16).page_bytes, chunk_tokens=64)
    return Engine(tiny, options, store=store, device=device, attention=create_attention("cpu"))


async def tokens_of(stream: TokenStream) -> list[int]:
    return [token.token_id async for token in stream]


@pytest.mark.parametrize("waits", [False, True], ids=["while it submits", "while it waits"])
async def test_a_device_that_is_lost_in_a_step_ends_all_streams_and_the_engine(tiny: LoadedModel, waits: bool) -> None:
    device = LosableDevice(waits=waits)
    engine = engine_on(device, tiny)
    with AsyncEngine(engine) as front:
        streams = [await front.submit(prompt(number), LONG) for number in range(3)]
        first = await anext(aiter(streams[0]))
        assert first.token_id >= 0
        device.lost = True
        ends = await asyncio.wait_for(asyncio.gather(*map(tokens_of, streams), return_exceptions=True), END_S)
        assert all(isinstance(end, AttnStoreError) for end in ends), ends
        with pytest.raises(Unavailable):
            await front.submit(prompt(3), LONG)
        assert not front.alive
    assert engine.idle
    assert engine.statistics().pool.held == 0
    engine.check()


async def test_a_device_that_is_lost_under_a_load_ends_its_stream(tiny: LoadedModel) -> None:
    """The pages that a store has cannot be copied up."""
    store = MemoryStore()
    with engine_on(SimulatedDevice("late", uses_triton=True), tiny, store) as engine:
        engine.generate(prompt(0), SamplingParams(max_tokens=1))
        assert engine.flush(30_000)
    device = LosableDevice(waits=False)
    engine = engine_on(device, tiny, store)
    with AsyncEngine(engine) as front:
        device.lost = True
        with pytest.raises(AttnStoreError):
            await asyncio.wait_for(tokens_of(await front.submit(prompt(0), LONG)), END_S)
        with pytest.raises(Unavailable):  # the engine ends soon after the stream
            await asyncio.wait_for(front.submit(prompt(1), LONG), END_S)
        assert not front.alive
    assert engine.statistics().pool.held == 0
    engine.check()
