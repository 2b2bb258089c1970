"""Workers in `attnstore status`: whatever answers at a URL is shown, and never prevents the nodes from being shown."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from attnstore.worker_status import WorkerStatus, worker_rows, worker_statuses

DEADLINE_MS = 500.0
MEASURED = {
    "costs": {
        "links": {"remote": {"rtt_ms": 0.5, "bytes_per_ms": 1.25e6, "spread": 1.5}},
        "prefill_tokens_per_s": 1024e3 / (4 * 10 + 1024 + 1024 * 0.512),
        "decode_ms": 30.0,
        "attend": {"round_trip_ms": 0.25},
    },
    "predictions": {"choices": {"meet": 2, "fetch": 3}, "median_error": 0.07},
    "decisions": [],
}


@contextmanager
def worker(body: bytes, after_s: float = 0.0) -> Iterator[str]:
    """Answers every request with `body`."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            time.sleep(after_s)
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}"
        finally:
            server.shutdown()
            thread.join()


def ask(*urls: str) -> tuple[WorkerStatus, ...]:
    return asyncio.run(worker_statuses(urls, DEADLINE_MS))


def test_a_workers_measurements_are_shown_in_units_that_people_compare() -> None:
    with worker(json.dumps(MEASURED).encode()) as url:
        [status] = ask(url + "/")
    assert status.error is None
    [link] = status.links
    assert (link.tier, link.rtt_ms, link.gbit_per_s, link.spread) == ("remote", 0.5, 10.0, 1.5)
    assert status.prefill_tokens_per_s == pytest.approx(1024e3 / (4 * 10 + 1024 + 1024 * 0.512))
    assert dict(status.choices) == {"fetch": 3, "meet": 2}
    head, row = worker_rows([status])
    assert dict(zip(head, row, strict=True)) == {
        "WORKER": url,
        "TIER": "remote",
        "RTT": "0.5 ms",
        "GB/S": "1.25",
        "+-": "1.50",
        "PREFILL": "645/s",
        "DECODE": "30.0 ms",
        "ATTEND": "0.25 ms",
        "ERROR": "7%",
        "CHOICES": "fetch:3 meet:2",
    }


def test_a_worker_that_measures_nothing_is_shown_without_figures() -> None:
    with worker(b'{"decisions": []}') as url:
        [status] = ask(url)
    assert status == WorkerStatus(url)
    assert worker_rows([status])[1][:3] == (url, "-", "-")


@pytest.mark.parametrize(
    "body", [b"", b"<html>", b"[]", b"3", b'{"costs": {}, "predictions": {}}', b'{"costs": 1, "predictions": 2}']
)
def test_anything_else_is_an_error_of_that_worker_alone(body: bytes) -> None:
    with worker(body) as bad, worker(json.dumps(MEASURED).encode()) as good:
        broken, whole = ask(bad, good)
    assert broken.error
    assert whole.error is None
    assert len({len(row) for row in worker_rows([broken, whole])}) == 1


@pytest.mark.parametrize("url", ["http://127.0.0.1:1", "ftp://worker", "worker:8000", "http://"])
def test_a_worker_that_is_not_there_is_an_error(url: str) -> None:
    [status] = ask(url)
    assert status.error


def test_a_slow_worker_costs_its_deadline() -> None:
    began = time.monotonic()
    with worker(b"{}", after_s=2 * DEADLINE_MS / 1e3) as url:
        [status] = ask(url)
        assert status.error
    assert time.monotonic() - began < 10


def test_the_command_shows_nodes_and_workers(store_url: str) -> None:
    with worker(json.dumps(MEASURED).encode()) as url:
        command = [
            sys.executable,
            "-m",
            "attnstore.cli",
            "status",
            "--directory",
            store_url,
            "--worker",
            url,
            "--worker",
            "http://127.0.0.1:1",
        ]
        shown = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        found = json.loads(subprocess.run([*command, "--json"], capture_output=True, text=True, timeout=60, check=False).stdout)
    text = shown.stdout
    assert shown.returncode == 1, "one of the workers did not answer"
    assert "http://127.0.0.1:1 did not answer" in shown.stderr
    assert "fetch:3 meet:2" in text
    assert "URLError" in text
    assert [node["error"] for node in found["nodes"]] == [None]
    assert [each["error"] is None for each in found["workers"]] == [True, False]
