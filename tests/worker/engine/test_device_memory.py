"""A device with too little memory: an engine that does not fit is refused and leaves no thread, and a step behind layers that does
not fit costs its sequence only. `device_engine_checks` has other steps, and decode steps that cannot be captured.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace
from typing import TypeVar

import pytest
import torch
from torch import Tensor

from attnstore.attention import create_attention
from attnstore.core.layout import PageLayout
from attnstore_worker.cache.moving.load import FetchOrder, LoadPlan
from attnstore_worker.device.pages import PagePool
from attnstore_worker.device.simulated import SimulatedDevice
from attnstore_worker.engine import Engine, EngineOptions, FinishReason, SamplingParams
from attnstore_worker.errors import OutOfDeviceMemory, StepFailed
from attnstore_worker.model import LoadedModel
from attnstore_worker.model.attention import PagedStep, at_once
from attnstore_worker.model.decoder import Decoder
from attnstore_worker.options import WRITE_POLICIES
from attnstore_worker.testing import FixedPlanner, MemoryStore
from tests.samples import eventually

HOW = SamplingParams(max_tokens=4)
Memory = TypeVar("Memory")


def options(model: LoadedModel, write_policy: str = "write-behind") -> EngineOptions:
    page_bytes = model.layout(16).page_bytes
    return EngineOptions(
        pool_bytes=30 * page_bytes,
        host_pool_bytes=4 * page_bytes,
        chunk_tokens=32,
        sequences_max=6,
        write_policy=write_policy,
    )


def prompt(number: int, tokens: int = 50) -> list[int]:
    return [(31 * position + 7 * number) % 900 + 5 for position in range(tokens)]


@pytest.fixture(scope="module")
def expected(tiny: LoadedModel) -> Callable[[list[int]], list[int]]:
    """Returns the processor's tokens."""

    def expected(token_ids: list[int]) -> list[int]:
        with Engine(tiny, options(tiny)) as engine:
            return engine.generate(token_ids, HOW).generated

    return expected


class Allocating(SimulatedDevice):
    """A device that has memory for `allocations` tensors."""

    def __init__(self, allocations: int) -> None:
        super().__init__("late", uses_triton=True)
        self.left = allocations

    def blocks(self, layout: PageLayout, capacity: int) -> Tensor:
        return self._made(lambda: super(Allocating, self).blocks(layout, capacity))

    def host_pages(self, layout: PageLayout, pool_bytes: int) -> PagePool:
        return self._made(lambda: super(Allocating, self).host_pages(layout, pool_bytes))

    def pinned(self, *shape: int, dtype: torch.dtype) -> Tensor:
        return self._made(lambda: super(Allocating, self).pinned(*shape, dtype=dtype))

    def _made(self, make: Callable[[], Memory]) -> Memory:
        self.left -= 1
        if self.left < 0:
            raise OutOfDeviceMemory("on purpose")
        return make()


@pytest.mark.parametrize("write_policy", WRITE_POLICIES)
def test_an_engine_that_does_not_fit_is_refused_and_leaves_no_thread(tiny: LoadedModel, write_policy: str) -> None:
    def create(device: Allocating) -> Engine:
        attention = create_attention("cpu")
        return Engine(tiny, options(tiny, write_policy), store=MemoryStore(), device=device, attention=attention)

    roomy = Allocating(1_000)
    create(roomy).close()
    before = threading.active_count()
    for allocations in range(1_000 - roomy.left):
        with pytest.raises(OutOfDeviceMemory):
            create(Allocating(allocations))
        assert eventually(lambda: threading.active_count() <= before, 5.0), f"a thread is left after {allocations} allocations"


class NoRoomBehindLayers:
    """A decoder without memory for steps that wait for layers, while `is_short`."""

    capturable = False

    def __init__(self, decoder: Decoder) -> None:
        self._decoder = decoder
        self.is_short = True

    def logits(self, token_ids: Tensor, positions: Tensor, rows: Tensor, step: PagedStep) -> Tensor:
        logits = self._decoder.logits(token_ids, positions, rows, step)
        if self.is_short and step.before_layer is not at_once:
            raise OutOfDeviceMemory("on purpose")
        return logits


def run_to_the_end(engine: Engine) -> None:
    while not engine.idle:
        engine.step()


def test_a_step_behind_layers_that_does_not_fit_ends_its_sequence_and_holds_nothing(
    tiny: LoadedModel, expected: Callable[[list[int]], list[int]]
) -> None:
    store = MemoryStore()
    with Engine(tiny, options(tiny), store=store) as engine:
        engine.generate(prompt(0), HOW)
        assert engine.flush(30_000)
    store.before_layer = lambda _: threading.Event().wait(0.05)  # type: ignore[assignment,return-value]
    device, decoder = SimulatedDevice("late", uses_triton=True), NoRoomBehindLayers(tiny.decoder)
    planner = FixedPlanner(LoadPlan(0, 99, 99, 30_000.0, FetchOrder.LAYERS))
    with Engine(
        replace(tiny, decoder=decoder),
        options(tiny),
        store=store,
        planner=planner,
        device=device,
        attention=create_attention("cpu"),
    ) as engine:
        sequence = engine.submit(prompt(0), HOW)
        with pytest.raises(OutOfDeviceMemory):
            run_to_the_end(engine)
        assert (sequence.finish_reason, type(sequence.error)) == (FinishReason.FAILED, StepFailed)
        assert eventually(lambda: engine.flush(1) and engine.statistics().pool.held == 0)
        engine.check()
        assert engine.statistics().quarantined == 0
        decoder.is_short = False
        for number in range(2):
            assert engine.generate(prompt(number), HOW).generated == expected(prompt(number))
        engine.check()
    device.close()
    assert device.races.found == []
