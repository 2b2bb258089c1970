"""Computing behind pages that arrive layer by layer: it overlaps, and what rests on a page that did not come is void."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
from torch import Tensor

from attnstore.attention import AttentionBackend, create_attention
from attnstore.testing import ManualClock, StoreProcess
from attnstore.types import PageStatus
from attnstore_worker.cache import STORE_TRANSPORTS, open_store
from attnstore_worker.cache.moving.load import FetchOrder, Load, LoadEnd, LoadPlan, Prompt, SearchPlan
from attnstore_worker.cache.moving.mover import Mover
from attnstore_worker.engine import Engine, EngineOptions, SamplingParams
from attnstore_worker.errors import PagesLost
from attnstore_worker.model import LoadedModel
from attnstore_worker.testing import FixedPlanner, MemoryStore
from experiments.overlap import Shape, measure

WAIT_MS = 30_000
LAYERS = LoadPlan(0, 99, 99, float(WAIT_MS), FetchOrder.LAYERS)
HOW = SamplingParams(max_tokens=8)
PROMPT = [3 + 7 * index % 1000 for index in range(120)]
"""Seven blocks that can be hit, and eight tokens behind them."""


class Layers:
    """An attention backend that says which layer it has begun."""

    def __init__(self, on_layer: Callable[[int], None]) -> None:
        self._backend: AttentionBackend = create_attention("reference")
        self._on_layer = on_layer

    def paged_attention(self, *arguments: Any, layer: int, **others: Any) -> tuple[Tensor, Tensor]:
        self._on_layer(layer)
        return self._backend.paged_attention(*arguments, layer=layer, **others)


def options(model: LoadedModel) -> EngineOptions:
    return EngineOptions(pool_bytes=20 * model.layout(16).page_bytes, chunk_tokens=64, store_deadline_ms=WAIT_MS)


@pytest.fixture
def expected(tiny: LoadedModel, store: MemoryStore) -> list[int]:
    """The tokens behind the prompt, whose pages are in the store afterwards."""
    with Engine(tiny, options(tiny), store=store) as engine:
        generated = engine.generate(PROMPT, HOW).generated
        assert engine.flush(WAIT_MS)
    return generated


def finish(engine: Engine) -> None:
    assert engine.flush(WAIT_MS)
    engine.check()
    assert engine.statistics().pool.held == 0


@pytest.mark.usefixtures("each_device")
def test_a_layer_is_computed_while_the_next_one_is_on_its_way(tiny: LoadedModel, store: MemoryStore, expected: list[int]) -> None:
    """The store sends the second layer only after the first was computed: without overlap this would never end."""
    computed = [threading.Event() for _ in range(2)]

    def wait_for_the_one_before(layer: int) -> None:
        if layer:
            assert computed[layer - 1].wait(WAIT_MS / 1e3)

    store.before_layer = wait_for_the_one_before
    attention = Layers(lambda layer: computed[layer].set())
    with Engine(tiny, options(tiny), store=store, planner=FixedPlanner(LAYERS), attention=attention) as engine:  # type: ignore[arg-type]
        sequence = engine.generate(PROMPT, HOW)
        assert sequence.admission is not None
        assert sequence.admission.remote_tokens == 112
        assert engine.batching().tokens_computed == 8 + 7, "eight of the prompt, and all but the last of the answer"
        finish(engine)
    assert sequence.generated == expected


@pytest.mark.usefixtures("each_device")
@pytest.mark.parametrize("status", [PageStatus.CORRUPT, PageStatus.INCOMPLETE, PageStatus.MISSING])
@pytest.mark.parametrize("position", [0, 3, 6])
def test_a_page_that_turns_out_corrupt_in_its_last_layer_voids_the_step(
    tiny: LoadedModel, store: MemoryStore, expected: list[int], status: PageStatus, position: int
) -> None:
    store.read_status = lambda index: status if index == position else PageStatus.OK
    store.before_layer = lambda _: threading.Event().wait(0.05)
    with Engine(tiny, options(tiny), store=store, planner=FixedPlanner(LAYERS)) as engine:
        sequence = engine.generate(PROMPT, HOW)
        assert sequence.generated == expected
        assert engine.generate(PROMPT, HOW).generated == expected, "nothing wrong was sealed"
        finish(engine)


@pytest.mark.usefixtures("each_device")
def test_layers_that_stop_coming_are_given_up(tiny: LoadedModel, store: MemoryStore, expected: list[int]) -> None:
    planner, going_on = FixedPlanner(LAYERS), threading.Event()

    def stall(layer: int) -> None:
        if layer:
            planner.gives_up = True
            going_on.wait(WAIT_MS / 1e3)

    store.before_layer = stall
    with Engine(tiny, options(tiny), store=store, planner=planner) as engine:
        sequence = engine.submit(PROMPT, HOW)
        while not sequence.generated:
            engine.step()
            engine.check()
        assert engine.statistics().quarantined == 7
        going_on.set()
        while sequence.finish_reason is None:
            engine.step()
        assert sequence.generated == expected
        finish(engine)


@pytest.mark.usefixtures("each_device")
def test_with_others_to_compute_the_pages_are_waited_for_and_nobody_stalls(
    tiny: LoadedModel, store: MemoryStore, expected: list[int]
) -> None:
    going_on = threading.Event()
    store.before_layer = lambda layer: layer and going_on.wait(WAIT_MS / 1e3)  # type: ignore[func-returns-value]
    with Engine(tiny, options(tiny), store=store, planner=FixedPlanner(LAYERS)) as engine:
        other = engine.submit([5, 6, 7], SamplingParams(max_tokens=20))
        engine.step()
        sequence = engine.submit(PROMPT, HOW)
        while len(other.generated) < 10:
            engine.step()
        assert sequence.generated == []
        going_on.set()
        while sequence.finish_reason is None:
            engine.step()
            engine.check()
        assert sequence.generated == expected


@pytest.mark.usefixtures("each_device")
@pytest.mark.parametrize("transport", STORE_TRANSPORTS)
def test_every_transport_serves_a_plan_by_layers(tiny: LoadedModel, transport: str) -> None:
    with StoreProcess("--capacity", "64MiB") as node, open_store(node.url, deadline_ms=WAIT_MS, transport=transport) as store:
        with Engine(tiny, options(tiny), store=store) as first_worker:
            expected = first_worker.generate(PROMPT, HOW).generated
            assert first_worker.flush(WAIT_MS)
        with Engine(tiny, options(tiny), store=store, planner=FixedPlanner(LAYERS)) as engine:
            sequence = engine.generate(PROMPT, HOW)
            assert sequence.generated == expected
            assert sequence.admission is not None
            assert sequence.admission.remote_tokens == 112
            finish(engine)


def test_the_experiment_gets_the_same_tokens_from_all_three_ways(tiny: LoadedModel) -> None:
    (row,) = measure(tiny, Shape(hit_tokens=256, chunk_tokens=64, repetitions=2), [1.0])
    assert row.tokens_equal
    assert min(row.transfer_ms, row.compute_ms, row.sequential_ttft_ms, row.overlapped_ttft_ms) > 0


class TestWaitingForLayers:
    """By itself: a load of three blocks by layers."""

    def load(self) -> Load:
        load = Load(Prompt(1, 13, 4, 64, 9, 0, 3), SearchPlan(1e9), 0.0)
        load.found(3, 0.0)
        load.begin(LAYERS, 0.0)
        assert load.next_batch(0.0, 99) == range(3)
        return load

    def wait(self, load: Load, layer: int | None, *, give_up: bool = False) -> None:
        Mover(ManualClock()).wait_layer(load, layer, lambda: give_up)

    def test_opens_with_the_first_layer_and_lets_through_those_that_came(self) -> None:
        load = self.load()
        assert not load.may_compute_behind(0)
        load.layer_arrived(0, 3)
        assert load.may_compute_behind(0)
        self.wait(load, 0)
        with pytest.raises(PagesLost, match="in time"):
            self.wait(load, 1, give_up=True)

    def test_closes_for_ever_when_a_page_is_lost(self) -> None:
        load = self.load()
        load.layer_arrived(0, 3)
        load.layer_arrived(1, 2)
        assert not load.may_compute_behind(0)
        with pytest.raises(PagesLost, match="not all"):
            self.wait(load, 0)
        load.arrived(range(3), 0)
        with pytest.raises(PagesLost):
            self.wait(load, None)

    def test_a_complete_read_lets_everything_through(self) -> None:
        load = self.load()
        load.arrived(range(3), 0)
        self.wait(load, 7)
        self.wait(load, None)

    def test_a_load_that_is_cancelled_or_fails_lets_nothing_through(self) -> None:
        for end in (Load.finish, lambda load: load.cancel(LoadEnd.RELEASED, 0.0)):
            load = self.load()
            load.layer_arrived(0, 3)
            end(load)
            with pytest.raises(PagesLost, match="not all"):
                self.wait(load, 0)
