"""A real node that dies or stops answering while a worker uses it: right tokens within the deadline, and no block lost."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from attnstore.testing import StoreProcess
from attnstore_worker.cache import STORE_TRANSPORTS, open_store
from attnstore_worker.engine import Engine, EngineOptions, SamplingParams
from attnstore_worker.model import LoadedModel

DEADLINE_MS = 500
WAIT_MS = 30_000


@pytest.fixture
def node() -> Iterator[StoreProcess]:
    with StoreProcess("--capacity", "64MiB") as process:
        yield process


def token_ids(first: int) -> list[int]:
    return list(range(first, first + 100))


def generate(engine: Engine, first: int) -> list[int]:
    return engine.generate(token_ids(first), SamplingParams(max_tokens=8)).generated


@pytest.fixture(scope="module")
def expected(tiny: LoadedModel) -> dict[int, list[int]]:
    with Engine(tiny, EngineOptions(pool_bytes=1 << 20)) as engine:
        return {first: generate(engine, first) for first in (100, 300, 500)}


def _kill(node: StoreProcess) -> None:
    node.kill()


def _stop_answering(node: StoreProcess) -> None:
    node.suspend()


@pytest.mark.parametrize("fault", [_kill, _stop_answering])
@pytest.mark.parametrize("transport", STORE_TRANSPORTS)
def test_a_node_that_goes_away_costs_hits_only(
    tiny: LoadedModel,
    node: StoreProcess,
    expected: dict[int, list[int]],
    transport: str,
    fault: Callable[[StoreProcess], None],
) -> None:
    options = EngineOptions(pool_bytes=1 << 20, store_deadline_ms=DEADLINE_MS)
    with open_store(node.url, deadline_ms=DEADLINE_MS, transport=transport) as store:
        with Engine(tiny, options, store=store) as first_worker:
            generate(first_worker, 300)
            assert first_worker.flush(WAIT_MS)
        with Engine(tiny, options, store=store) as engine:
            assert generate(engine, 100) == expected[100]
            assert engine.flush(WAIT_MS)
            fault(node)
            assert generate(engine, 300) == expected[300]
            assert generate(engine, 500) == expected[500]
            assert engine.flush(WAIT_MS)
            engine.check()
            assert engine.statistics().remote.failures > 0
            assert engine.statistics().pool.held == 0
