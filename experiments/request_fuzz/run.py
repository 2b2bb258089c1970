"""A worker in a process of its own, and its answers to invalid requests beside valid ones.

Owns: the rules for an answer, and the counts of answers.
"""

from __future__ import annotations

import http.client
import json
import socket
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Final

from attnstore_worker.testing import WorkerProcess
from experiments.endpoints import complete, model_name
from experiments.request_fuzz.generator import FuzzedRequest, requests

BATCH: Final = 50
_CALLERS: Final = 4
_ANSWER_S_MAX: Final = 60.0
_SHOWN_BYTES: Final = 300


@dataclass(slots=True)
class Outcome:
    """The results: how often each status was returned (0: the connection ended without an answer), and the faults."""

    statuses: Counter[int] = field(default_factory=Counter)
    right_answers: int = 0
    faults: list[str] = field(default_factory=list)


def fuzz(model: Path, *, seed: int, count: int) -> Outcome:
    """Sends a worker on `model` `count` invalid requests, and a valid one beside each batch of them."""
    outcome = Outcome()
    with WorkerProcess.serving(model) as worker, ThreadPoolExecutor(_CALLERS + 1) as callers:
        url = worker.url
        name = model_name(url, None)
        expected = _right(url, name)
        wrong_ones = requests(seed, count, name)
        while batch := list(islice(wrong_ones, BATCH)):
            beside = callers.submit(_right, url, name)
            for request, (status, body) in zip(batch, callers.map(lambda each: ask(url, each), batch), strict=True):
                outcome.statuses[status] += 1
                if (wrong := judge(request, status, body)) is not None:
                    shown = request.wire()[:_SHOWN_BYTES]
                    outcome.faults.append(f"{wrong}: {status} {body[:_SHOWN_BYTES]!r} for {shown!r}")
            if beside.result() == expected:
                outcome.right_answers += 1
            else:
                outcome.faults.append(f"a right request was answered {beside.result()!r}, not {expected!r}")
    if "Traceback" in worker.log:
        outcome.faults.append(worker.log)
    return outcome


def ask(url: str, request: FuzzedRequest) -> tuple[int, bytes]:
    """Returns status and body of the answer; status 0 if the connection ended without one."""
    host, port = url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), _ANSWER_S_MAX) as connection:
        try:
            connection.sendall(request.wire())
            if not request.complete:
                connection.shutdown(socket.SHUT_WR)
            answer = http.client.HTTPResponse(connection, method=request.method)
            answer.begin()
            return answer.status, answer.read()
        except (http.client.HTTPException, ConnectionError):
            return 0, b""


def judge(request: FuzzedRequest, status: int, body: bytes) -> str | None:
    """Returns the faults of an answer."""
    if status == 0:
        return "no answer" if request.complete else None
    if status == 200:
        return "an error in a stream" if b'data: {"error"' in body else None
    if not 400 <= status < 500:
        return "a status that blames no request"
    try:
        message = json.loads(body)["error"]["message"]
    except ValueError:
        message = body.decode()
    return None if message and len(message) < 500 and len(message.splitlines()) == 1 else "not one line"


def _right(url: str, model: str) -> str:
    return complete(url, None, model, "Once upon a time", tokens=8, timeout_s=_ANSWER_S_MAX).text


def report(outcome: Outcome) -> Sequence[str]:
    """Returns the outcome in lines."""
    statuses = ", ".join(f"{count} x {status or 'no answer'}" for status, count in sorted(outcome.statuses.items()))
    total = sum(outcome.statuses.values())
    return [
        f"{total} requests: {statuses}",
        f"{outcome.right_answers} right requests beside them answered as before",
        *outcome.faults,
    ]
