"""The planner's decisions, as text and as JSON."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import httpx2
import pytest
import uvicorn
from rich.console import Console

from attnstore.clock import MonotonicClock
from attnstore.errors import InvalidArgument
from attnstore.worker_status import worker_statuses
from attnstore_worker.cache import CostPlanner
from attnstore_worker.engine import AsyncEngine, Engine, EngineOptions, SamplingParams
from attnstore_worker.explain import decisions_of, show, try_out
from attnstore_worker.model import LoadedModel
from attnstore_worker.serve import create_app
from attnstore_worker.testing import MemoryStore

WAIT_S = 30.0
PROMPT = list(range(5, 205))
HOW = SamplingParams(max_tokens=1)


@pytest.fixture
def planner() -> CostPlanner:
    return CostPlanner(MonotonicClock(), 64)


@pytest.fixture
def engine(tiny: LoadedModel, planner: CostPlanner) -> Iterator[Engine]:
    options = EngineOptions(pool_bytes=60 * tiny.layout(16).page_bytes, chunk_tokens=64)
    with Engine(tiny, options, store=MemoryStore(), planner=planner, observer=planner) as engine:
        engine.warm_up()
        yield engine


def test_a_prompt_tried_out_is_explained_with_what_each_choice_costs(engine: Engine, planner: CostPlanner) -> None:
    engine.generate(PROMPT, HOW)
    assert engine.flush(WAIT_S * 1e3)
    engine.drop_cached()
    happened, predicted = try_out(engine, planner, PROMPT)
    assert happened["happened_ttft_ms"] > 0
    assert happened["hit_end"] == 12
    assert predicted["forecasts"].keys() == {"recompute", "fetch", "planned"}
    assert predicted["forecasts"]["planned"] <= predicted["forecasts"]["recompute"]


def test_decisions_are_read_from_a_file_and_shown(tmp_path: Path, engine: Engine, planner: CostPlanner) -> None:
    engine.generate(PROMPT, HOW)
    path = tmp_path / "decisions.jsonl"
    path.write_text("".join(json.dumps(decision.as_json()) + "\n" for decision in planner.decisions(9)))
    found = decisions_of(str(path), 5)
    assert [each["tokens"] for each in found] == [200]
    console = Console(record=True, width=160)
    show(found, console)
    assert found[0]["choice"] in console.export_text()


@pytest.mark.parametrize("content", [None, "no JSON\n", "3\n", "[]\n", "{}\n", '{"number": 1}\n', "\x00"])
def test_a_file_without_decisions_is_refused_by_name(tmp_path: Path, content: str | None) -> None:
    path = tmp_path / "decisions.jsonl"
    if content is not None:
        path.write_text(content)
    with pytest.raises(InvalidArgument, match="decisions"):
        decisions_of(str(path), 5)


DECISION = {"number": 1, "at_ms": 0.5, "tokens": 9, "resident_blocks": 0, "usable_blocks": 0, "forecasts": {"fetch": 1.0}}
FOREIGN = {
    "number": "x",
    "tokens": None,
    "resident_blocks": [],
    "hit_end": "a",
    "rtt_ms": {},
    "spread": "wide",
    "forecasts": [1.0],
    "choice": 7,
    "arrived_blocks": 1.5,
    "happened_ttft_ms": "soon",
    "predicted_ttft_ms": [],
}


@pytest.mark.parametrize("field", FOREIGN)
def test_values_of_another_kind_are_refused(tmp_path: Path, field: str) -> None:
    path = tmp_path / "decisions.jsonl"
    path.write_text(json.dumps({**DECISION, field: FOREIGN[field]}) + "\n")
    with pytest.raises(InvalidArgument, match="it holds something else"):
        decisions_of(str(path), 5)


@pytest.mark.parametrize("content", [b"\xff\n", b"[" * 100_000, b'{"number": ' + b"9" * 5_000 + b"}"])
def test_what_no_json_of_ours_looks_like_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "decisions.jsonl"
    path.write_bytes(content)
    with pytest.raises(InvalidArgument, match="no decisions"):
        decisions_of(str(path), 5)


def test_fields_that_a_decision_does_not_have_are_ignored(tmp_path: Path) -> None:
    path = tmp_path / "decisions.jsonl"
    path.write_text(json.dumps({**DECISION, "choice": "meet", "error": "ours is computed", "added": 1}) + "\n")
    console = Console(record=True, width=160)
    show(decisions_of(str(path), 5), console)
    assert "meet" in console.export_text()


def test_a_choice_that_is_none_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "decisions.jsonl"
    path.write_text(json.dumps({**DECISION, "choice": "[/b]"}) + "\n")
    with pytest.raises(InvalidArgument, match="it holds something else"):
        decisions_of(str(path), 5)


@pytest.mark.parametrize("answer", [b"", b"SSH-2.0-OpenSSH_9.6\r\n", b"HTTP/1.1 200 OK\r\n\r\n[]", b"HTTP/1.1 404 No\r\n\r\n"])
def test_an_endpoint_that_is_no_worker_is_refused_by_name(answer: bytes) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def answer_once() -> None:
            connection, _ = listener.accept()
            with connection:
                connection.recv(65536)
                connection.sendall(answer)

        thread = threading.Thread(target=answer_once)
        thread.start()
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        with pytest.raises(InvalidArgument, match=f"no decisions can be read from {url}"):
            decisions_of(url, 5)
        thread.join(WAIT_S)


def test_a_running_worker_tells_its_decisions_costs_and_metrics(engine: Engine, tiny: LoadedModel) -> None:
    engine.generate(PROMPT, HOW)
    with AsyncEngine(engine) as front:
        server = uvicorn.Server(uvicorn.Config(create_app(front, tiny), port=0, log_level="error", lifespan="off"))
        thread = threading.Thread(target=server.run)
        thread.start()
        try:
            while not server.started:
                thread.join(0.005)
            url = f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
            assert [each["tokens"] for each in decisions_of(url, 5)] == [200]
            assert httpx2.get(f"{url}/planner?last=0").json()["costs"]["prefill"]["token_ms"] >= 0
            [status] = asyncio.run(worker_statuses([url], WAIT_S * 1e3))
            assert status.error is None
            assert status.prefill_tokens_per_s
            assert sum(count for _, count in status.choices) == 1
            metrics = httpx2.get(f"{url}/metrics").text
            assert "attnstore_worker_prefill_token_seconds" in metrics
            assert 'attnstore_worker_decisions_total{choice="' in metrics
            assert "attnstore_worker_prediction_error_bucket" in metrics
        finally:
            server.should_exit = True
            thread.join(WAIT_S)
