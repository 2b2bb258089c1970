"""The command that serves the endpoint, as a process: how it ends, where it listens and what it refuses."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import httpx2
import openai
import pytest

from attnstore.address import Address
from attnstore_worker.testing import WorkerProcess

WAIT_S = 30.0


@pytest.mark.parametrize("ending", [signal.SIGTERM, signal.SIGINT])
def test_the_command_serves_until_it_is_asked_to_end(tiny_folder: Path, ending: signal.Signals) -> None:
    with WorkerProcess.serving(tiny_folder) as worker:
        with openai.OpenAI(base_url=f"{worker.url}/v1", api_key="none") as client:
            name = client.models.list().data[0].id
            assert client.completions.create(model=name, prompt="Hello", max_tokens=3).usage is not None
        worker.process.send_signal(ending)
        assert worker.wait(WAIT_S) == 0


_LOST = """
import sys, threading
from pathlib import Path
from attnstore.address import Address
from attnstore.core.layout import DType
from attnstore.errors import Unavailable
from attnstore_worker.engine import Engine, EngineOptions
from attnstore_worker.model import load_model
from attnstore_worker.serve.server import Endpoint, serve

engine = Engine(load_model(Path(sys.argv[1]), DType.FP32), EngineOptions(pool_bytes=1 << 20))

def lost(*_, **__):
    raise RuntimeError("the device is lost")

engine.model.decoder.logits = lost
with engine:
    try:
        serve(engine, Endpoint(Address.of("127.0.0.1", 0)))
    except Unavailable as error:
        sys.exit(f"ended: {error}")
"""


def test_a_process_whose_engine_has_failed_answers_that_and_ends(tiny_folder: Path) -> None:
    with WorkerProcess(sys.executable, "-c", _LOST, str(tiny_folder)) as worker:
        name = httpx2.get(f"{worker.url}/v1/models").json()["data"][0]["id"]
        answer = httpx2.post(f"{worker.url}/v1/completions", json={"model": name, "prompt": [5, 6, 7]}, timeout=WAIT_S)
        assert answer.status_code == 503
        assert answer.json()["error"]["code"] == "step_failed"
        assert worker.wait(WAIT_S) == 1
        assert "ended: the engine failed" in worker.log


@pytest.mark.ipv6
@pytest.mark.parametrize(("host", "hosts"), [("::1", ["::1"]), ("[::1]", ["::1"]), ("localhost", ["127.0.0.1", "::1"])])
def test_the_command_serves_on_either_family(tiny_folder: Path, host: str, hosts: list[str]) -> None:
    with WorkerProcess.serving(tiny_folder, "--host", host) as worker:
        port = Address.parse(worker.url.removeprefix("http://")).port
        for each in hosts:
            assert httpx2.get(f"http://{Address.of(each, port)}/health").status_code == 200


def test_a_host_that_is_no_address_is_refused(tiny_folder: Path) -> None:
    for host, words in (
        ("::1:x", "argument --host: must be host:port"),
        ("127.1", "four decimal numbers"),
        ("203.0.113.7", "cannot listen on 203.0.113.7"),
    ):
        command = [
            sys.executable,
            "-m",
            "attnstore_worker.cli",
            "serve",
            "--port",
            "0",
            "--model",
            str(tiny_folder),
            "--insecure",
            "--host",
            host,
        ]
        result = subprocess.run(command, capture_output=True, text=True, timeout=WAIT_S * 4)
        assert result.returncode == 2
        assert words in result.stderr
        assert "Traceback" not in result.stderr
