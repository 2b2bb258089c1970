"""A sequence that attends for long has its blocks fetched: it goes on attending until they are here, and if they do not come."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest

import attnstore
from attnstore import errors
from attnstore.testing import StoreProcess
from attnstore_worker.engine import AttendPolicy, Engine, EngineOptions, SamplingParams
from attnstore_worker.engine import Sequence as Prompted
from attnstore_worker.model import LoadedModel
from tests.worker.cache.planning.test_attend_planner import Scripted, forecast, options, prompt_of, resident, warmed

NEW_TOKENS = 40
PROMPT = prompt_of(6 * 16 + 5, seed=1)


class Gated:
    """A client whose reads wait until the test lets them through, or fail."""

    def __init__(self, client: attnstore.Client) -> None:
        self._client = client
        self.open = threading.Event()
        self.open.set()
        self.asked = threading.Event()
        self.error: errors.AttnStoreError | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._client, name)

    def read(self, *arguments: Any, **named: Any) -> Any:
        self.asked.set()
        assert self.open.wait(60)
        if self.error is not None:
            raise self.error
        return self._client.read(*arguments, **named)


@pytest.fixture(scope="module")
def node() -> Iterator[StoreProcess]:
    with StoreProcess("--capacity", "64MiB", "--attend-threads", "1") as node:
        yield node


@pytest.fixture
def store(node: StoreProcess) -> Iterator[Gated]:
    with attnstore.connect(node.url, transport="tcp", deadline_ms=60_000) as client:
        assert isinstance(client, attnstore.Client)
        gated = Gated(client)
        yield gated
        gated.open.set()


def engine_on(model: LoadedModel, store: Gated, salt: str, planner: Scripted, blocks: int = 24) -> Engine:
    wanted: EngineOptions = options(model, salt, blocks, AttendPolicy.MEASURED)
    return Engine(model, wanted, store=store, attend_store=store._client, planner=planner)  # type: ignore[arg-type]


def attending(engine: Engine, planner: Scripted) -> Prompted:
    """Returns a sequence that attends, and that has its blocks fetched after a dozen tokens."""
    for _ in range(3):  # answers are expected to be short
        engine.generate(prompt_of(20, seed=2), SamplingParams(max_tokens=2))
    warmed(engine, PROMPT)
    planner.says = forecast(load=100.0, rent=10.0)
    return engine.submit(PROMPT, SamplingParams(max_tokens=NEW_TOKENS))


def step_until(engine: Engine, sequence: Prompted, tokens: int) -> None:
    while sequence.finish_reason is None and len(sequence.generated) < tokens:
        engine.step()
        engine.check()


def pages_open(engine: Engine) -> int:
    statistics = engine.attending()
    assert statistics is not None
    return statistics.pages_open


def test_a_sequence_that_goes_on_and_on_attends_until_its_blocks_are_here(tiny: LoadedModel, store: Gated) -> None:
    planner = Scripted()
    with engine_on(tiny, store, "moves", planner) as engine:
        sequence = attending(engine, planner)
        store.asked.clear()
        store.open.clear()
        step_until(engine, sequence, 9)
        assert not store.asked.is_set()
        step_until(engine, sequence, 16)  # by then it has paid as much as fetching costs, plus a tenth
        assert store.asked.is_set()
        step_until(engine, sequence, 24)
        assert pages_open(engine) == 6, "it goes on attending while its blocks are on their way"
        store.open.set()
        read = engine.statistics().remote.bytes_read
        while pages_open(engine) and sequence.finish_reason is None:
            engine.step()
            engine.check()
        assert sequence.finish_reason is None
        assert engine.statistics().remote.bytes_read - read == 6 * engine.layout.page_bytes
        step_until(engine, sequence, NEW_TOKENS)
        assert sequence.preemptions == 0
        assert sequence.generated == resident(tiny, PROMPT, NEW_TOKENS)
        assert engine.statistics().pool.held == 0


def test_a_sequence_whose_blocks_do_not_come_attends_to_the_end(tiny: LoadedModel, store: Gated) -> None:
    planner = Scripted()
    with engine_on(tiny, store, "fails", planner) as engine:
        sequence = attending(engine, planner)
        store.error = errors.Unavailable("gone")
        step_until(engine, sequence, NEW_TOKENS - 1)
        assert store.asked.is_set()
        assert pages_open(engine) == 6
        step_until(engine, sequence, NEW_TOKENS)
        assert sequence.preemptions == 0
        assert sequence.generated == resident(tiny, PROMPT, NEW_TOKENS)
        assert engine.statistics().pool.held == 0


def test_without_room_beside_its_own_blocks_it_waits_for_them(tiny: LoadedModel, store: Gated) -> None:
    planner = Scripted()
    with engine_on(tiny, store, "no room", planner, blocks=10) as engine:
        sequence = attending(engine, planner)
        step_until(engine, sequence, NEW_TOKENS)
        assert sequence.generated == resident(tiny, PROMPT, NEW_TOKENS)
        assert engine.statistics().pool.held == 0


def test_a_sequence_that_is_cancelled_amid_the_fetch_holds_nothing(tiny: LoadedModel, store: Gated) -> None:
    planner = Scripted()
    with engine_on(tiny, store, "cancelled", planner) as engine:
        sequence = attending(engine, planner)
        store.asked.clear()
        store.open.clear()
        step_until(engine, sequence, 16)
        assert store.asked.is_set()
        engine.cancel(sequence)
        assert pages_open(engine) == 0
        store.open.set()
        while engine.statistics().pool.held:
            engine.step()
        engine.check()
