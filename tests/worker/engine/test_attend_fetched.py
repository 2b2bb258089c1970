"""Chunks behind blocks in the store that fetch them layer by layer and attend here: the tokens are those of a resident run."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Executor, Future
from typing import Any

import pytest
import torch

import attnstore
from attnstore import errors
from attnstore.attention import create_attention
from attnstore.testing import StoreProcess
from attnstore.types import PageStatus, ReadResult
from attnstore_worker.cache.attending import fetched
from attnstore_worker.cache.attending.contexts import QueryShape
from attnstore_worker.cache.attending.fetched import FetchedLayers, FetchedPart
from attnstore_worker.cache.planning.attend_planner import ChunkForecast, ChunkWork, fetched_chunk_ms
from attnstore_worker.cache.planning.fixed_planners import FetchAll
from attnstore_worker.engine import AttendPolicy, Engine, FinishReason
from attnstore_worker.engine import Sequence as Prompted
from attnstore_worker.engine.attend_policy import chunk_choice
from attnstore_worker.errors import PagesLost
from attnstore_worker.model import LoadedModel
from tests.worker.cache.planning.test_attend_planner import taught
from tests.worker.engine.test_attend import NEW_TOKENS, options, prompt, resident, run

LONG = prompt(20 * 16)
"""More than twice what the pool holds."""


class Says(FetchAll):
    """A planner whose forecasts of chunks the test sets."""

    def __init__(self, fetch_ms: float) -> None:
        super().__init__(60_000)
        self._says = ChunkForecast(attend_ms=100.0, fetch_ms=fetch_ms)
        self.works: list[ChunkWork] = []

    def chunk_forecast(self, work: ChunkWork, /) -> ChunkForecast | None:
        self.works.append(work)
        return self._says


class Reading:
    """A client whose reads of layers can fail."""

    def __init__(self, client: attnstore.Client) -> None:
        self._client = client
        self.layers: list[int] = []
        self.fails_at: int | None = None
        self.fault: errors.AttnStoreError | PageStatus | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._client, name)

    def read(self, namespace: bytes, hashes: Any, buffers: Any, **named: Any) -> ReadResult:
        if "layers" not in named:
            return self._client.read(namespace, hashes, buffers, **named)
        self.layers.append(named["layers"][0])
        if len(self.layers) == self.fails_at:
            if isinstance(self.fault, PageStatus):
                return ReadResult((self.fault,) * len(hashes), 0)
            assert self.fault is not None
            raise self.fault
        return self._client.read(namespace, hashes, buffers, **named)


@pytest.fixture(scope="module")
def node() -> Iterator[StoreProcess]:
    with StoreProcess("--capacity", "64MiB", "--attend-threads", "1") as node:
        yield node


@pytest.fixture
def store(node: StoreProcess) -> Iterator[Reading]:
    with attnstore.connect(node.url, transport="tcp", deadline_ms=60_000) as client:
        assert isinstance(client, attnstore.Client)
        yield Reading(client)


def ran(model: LoadedModel, store: Reading, salt: str, planner: Says, attend: AttendPolicy = AttendPolicy.BEYOND_POOL) -> Prompted:
    wanted = options(model, salt, attend)
    with Engine(model, wanted, store=store._client, attend_store=store, planner=planner) as engine:  # type: ignore[arg-type]
        return run(engine, LONG)


@pytest.mark.parametrize("window_bytes", [1 << 23, 1], ids=["one window", "a window for each page"])
def test_chunks_that_are_forecast_to_be_faster_so_fetch_and_give_the_resident_tokens(
    tiny: LoadedModel, store: Reading, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest, window_bytes: int
) -> None:
    monkeypatch.setattr(fetched, "WINDOW_BYTES_MAX", window_bytes)
    planner = Says(fetch_ms=10.0)
    sequence = ran(tiny, store, request.node.name, planner)
    assert sequence.finish_reason is FinishReason.LENGTH
    assert sequence.generated == resident(tiny, LONG)
    assert set(store.layers) == set(range(tiny.layout(16).layers))
    assert store.layers.count(0) == store.layers.count(1)
    assert all(work.rows > 1 for work in planner.works), "a single row never fetches"


def test_chunks_that_are_forecast_to_be_slower_so_attend(tiny: LoadedModel, store: Reading, request: pytest.FixtureRequest) -> None:
    planner = Says(fetch_ms=95.0)  # less, but not by enough
    assert ran(tiny, store, request.node.name, planner).generated == resident(tiny, LONG)
    assert store.layers == []
    assert planner.works


def test_who_always_attends_is_not_asked(tiny: LoadedModel, store: Reading, request: pytest.FixtureRequest) -> None:
    planner = Says(fetch_ms=10.0)
    assert ran(tiny, store, request.node.name, planner, AttendPolicy.ALWAYS).generated == resident(tiny, LONG)
    assert store.layers == planner.works == []


@pytest.mark.parametrize(
    "fault", [errors.Unavailable("gone"), errors.DeadlineExceeded("late"), PageStatus.MISSING, PageStatus.CORRUPT]
)
@pytest.mark.parametrize("at", [1, 2, 3])
def test_a_fetch_that_fails_costs_a_step_that_is_computed_again_and_attends(
    tiny: LoadedModel, store: Reading, request: pytest.FixtureRequest, fault: errors.AttnStoreError | PageStatus, at: int
) -> None:
    store.fails_at, store.fault = at, fault
    wanted = options(tiny, request.node.name)
    with Engine(tiny, wanted, store=store._client, attend_store=store, planner=Says(10.0)) as engine:  # type: ignore[arg-type]
        sequence = run(engine, LONG)
        statistics = engine.attending()
        assert statistics is not None
        assert statistics.losses == 1
    assert sequence.finish_reason is FinishReason.LENGTH
    assert sequence.generated == resident(tiny, LONG)
    assert len(sequence.generated) == NEW_TOKENS


class Queue(Executor):
    """Runs nothing: the test ends the calls."""

    def __init__(self) -> None:
        self.futures: list[Future[Any]] = []

    def submit(self, *_: Any, **__: Any) -> Future[Any]:
        self.futures.append(Future())
        return self.futures[-1]


def test_a_fetch_that_fails_leaves_no_other_on_its_thread() -> None:
    layout = attnstore.PageLayout(layers=4, kv_heads=1, head_dim=64, block_tokens=16, dtype=attnstore.DType.FP32)
    queue, lost = Queue(), list[FetchedPart]()
    part = FetchedPart([attnstore.BlockHash(bytes(32))], 0, 2)
    layers = FetchedLayers([part], layout, 0.125, create_attention("reference"), lambda *_: True, queue, lost.append)
    queue.futures[0].set_exception(errors.Unavailable("gone"))
    with pytest.raises(PagesLost, match="gone"):
        layers.merge(0, torch.zeros(2, 1, 64), torch.zeros(2, 1, 64).numpy(), torch.zeros(2, 1).numpy())
    assert lost == [part]
    assert len(queue.futures) == 2
    assert queue.futures[1].cancelled()


def test_a_chunk_waits_for_its_first_window_and_for_what_takes_longer_than_computing() -> None:
    assert fetched_chunk_ms(100.0, 31, 2.0) == 102.0
    assert fetched_chunk_ms(10.0, 31, 2.0) == 62.0


def test_many_rows_behind_a_short_context_fetch_and_few_rows_behind_a_long_one_attend() -> None:
    layout = attnstore.PageLayout(layers=30, kv_heads=3, head_dim=64, block_tokens=16, dtype=attnstore.DType.FP32)
    fetches = chunk_choice(taught(), layout, QueryShape(q_heads=9, scale=0.125))
    assert fetches(8, 1024)
    assert not fetches(4096, 64)
    assert not fetches(1, 1)


def test_costs_that_are_not_known_decide_nothing() -> None:
    class Unknown(FetchAll):
        def chunk_forecast(self, work: ChunkWork, /) -> ChunkForecast | None:
            del work
            return None

    layout = attnstore.PageLayout(layers=2, kv_heads=1, head_dim=64, block_tokens=16, dtype=attnstore.DType.FP32)
    assert not chunk_choice(Unknown(1), layout, QueryShape(1, 1.0))(8, 1024)


def test_partials_that_are_not_finite_end_the_step(tiny: LoadedModel, store: Reading, request: pytest.FixtureRequest) -> None:
    """Pages whose keys are not finite cannot be sealed by this engine, but another writer may have stored them."""

    def spoiled(namespace: bytes, hashes: Any, buffers: Any, **named: Any) -> ReadResult:
        result = store._client.read(namespace, hashes, buffers, **named)
        if "layers" in named:
            torch.frombuffer(buffers[0], dtype=torch.float32).fill_(torch.nan)
        return result

    store.read = spoiled  # type: ignore[method-assign]
    sequence = ran(tiny, store, request.node.name, Says(10.0))
    assert sequence.finish_reason is FinishReason.LENGTH
    assert sequence.generated == resident(tiny, LONG)
