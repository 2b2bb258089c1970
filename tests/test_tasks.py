"""Background work continues after a failure, which is reported; it can be ended, and so can the caller that ends it."""

from __future__ import annotations

import ast
import asyncio
import gc
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from attnstore import tasks
from tests.samples import eventually

ROOT = Path(__file__).parent.parent
BEGINNERS = {"create_task", "ensure_future", "Thread"}
WAITED_FOR = {
    "attnstore/tasks.py": "the helpers themselves",
    "attnstore/client/calls.py": "a coroutine that a thread waits for, settled by a callback",
    "attnstore/client/facade.py": "the event loop's own thread, joined when its last user has gone",
    "attnstore/client/cluster/read.py": "a read and its hedge, both ended before the read is",
    "attnstore/client/cluster/flight.py": "callers that share an answer wait for it",
    "attnstore/copying/__init__.py": "compiles once, and says what went wrong",
    "attnstore/server/connections.py": "one connection, whose failure is logged",
    "worker/attnstore_worker/cache/moving/mover.py": "a load logs its failure; results of calls are waited for",
    "worker/attnstore_worker/engine/async_engine.py": "an engine that failed takes no more prompts, and says so",
    "worker/attnstore_worker/serve/app.py": "one request's work, waited for",
    "worker/attnstore_worker/serve/choices.py": "one request's streams, waited for",
    "worker/attnstore_worker/testing.py": "a started worker's output, joined when the worker is ended",
}
"""Where unsupervised tasks and threads are started, with the reason."""


def test_every_task_and_thread_is_supervised_or_waited_for() -> None:
    assert {path for path, _ in _begun()} == WAITED_FOR.keys()


def _begun() -> Iterator[tuple[str, int]]:
    for package in ("attnstore", "worker"):
        for path in (ROOT / package).rglob("*.py"):
            name = path.relative_to(ROOT).as_posix()
            if not name.startswith("attnstore/testing/"):
                for node in ast.walk(ast.parse(path.read_text())):
                    if isinstance(node, ast.Attribute) and node.attr in BEGINNERS and not _is_annotation(path, node):
                        yield name, node.lineno


def _is_annotation(path: Path, node: ast.Attribute) -> bool:
    """Returns whether the line is only a type annotation."""
    line = path.read_text().splitlines()[node.lineno - 1][node.end_col_offset :]
    return not line.startswith("(")


class Flaky:
    """Work that raises a number of times before it continues."""

    def __init__(self, failures: int) -> None:
        self.attempts = 0
        self.going_on = asyncio.Event()
        self._failures = failures

    def fail(self) -> None:
        self.attempts += 1
        if self.attempts <= self._failures:
            raise OverflowError("cannot convert float infinity to integer")

    async def run(self) -> None:
        self.fail()
        self.going_on.set()
        await asyncio.sleep(3600)


async def test_work_that_fails_is_counted_told_once_and_tried_again_until_it_is_ended(caplog: pytest.LogCaptureFixture) -> None:
    flaky, before = Flaky(failures=3), tasks.failures().get("flaky", 0)
    task = tasks.supervised("flaky", flaky.run)
    await flaky.going_on.wait()
    assert flaky.attempts == 4
    assert tasks.failures()["flaky"] == before + 3
    (record,) = caplog.records
    assert "infinity" in caplog.text
    assert record.exc_info is not None
    await tasks.end(task)
    assert task.cancelled()


async def test_work_is_ended_in_the_pause_before_its_next_attempt() -> None:
    flaky = Flaky(failures=1_000)
    task = tasks.supervised("flaky", flaky.run)
    await asyncio.sleep(0)
    await tasks.end(task)
    assert task.cancelled()


async def test_work_that_returns_has_ended() -> None:
    async def once() -> None:
        return None

    await tasks.supervised("once", once)


def test_a_thread_whose_work_fails_tries_it_again_and_ends_when_that_returns() -> None:
    attempts: list[int] = []

    def twice() -> None:
        attempts.append(1)
        if len(attempts) < 3:
            raise ValueError("no")

    thread = tasks.supervised_thread("twice", twice)
    assert thread.daemon
    assert eventually(lambda: not thread.is_alive())
    assert len(attempts) == 3
    assert tasks.failures()["twice"] >= 2
    assert threading.current_thread() is not thread


async def test_detached_work_survives_a_garbage_collection_and_its_failure_is_told(caplog: pytest.LogCaptureFixture) -> None:
    done = asyncio.Event()

    async def fails(gate: asyncio.Future[None]) -> None:
        await gate
        done.set()
        raise ValueError("no")

    gate = asyncio.get_running_loop().create_future()
    tasks.detached("fails", fails(gate))
    await asyncio.sleep(0)
    gc.collect()
    gate.set_result(None)
    await done.wait()
    await asyncio.sleep(0)
    assert tasks.failures()["fails"] >= 1
    assert "no" in caplog.text


async def stubborn(swallowed: list[int], times: int) -> None:
    """Swallows a number of cancellations, as a library may."""
    while True:
        try:
            await asyncio.sleep(3600)
        except asyncio.CancelledError:
            if len(swallowed) == times:
                raise
            swallowed.append(1)


async def test_a_task_that_swallows_a_cancellation_ends_nevertheless() -> None:
    swallowed: list[int] = []
    task = asyncio.create_task(stubborn(swallowed, 1))
    await asyncio.sleep(0)
    await tasks.end(task)
    assert task.cancelled()
    assert swallowed == [1]


async def test_who_waits_for_the_end_can_be_cancelled() -> None:
    task = asyncio.create_task(stubborn([], 2))
    await asyncio.sleep(0)
    ending = asyncio.create_task(tasks.end(task))
    await asyncio.sleep(0)
    ending.cancel()
    with pytest.raises(asyncio.CancelledError):
        await ending
    with suppress(asyncio.CancelledError):
        await tasks.end(task)
    assert task.done()


async def test_what_a_task_met_is_told() -> None:
    async def fails() -> None:
        raise ValueError("no")

    task = asyncio.create_task(fails())
    await asyncio.sleep(0)
    with pytest.raises(ValueError, match="no"):
        await tasks.end(task)


async def test_the_end_of_one_thing_keeps_no_other_from_its_own() -> None:
    ended = []

    async def fails() -> None:
        raise ValueError("half way")

    async def hangs() -> None:
        await asyncio.Event().wait()

    async def works() -> None:
        ended.append("works")

    async with asyncio.timeout(20):
        await tasks.attempt_all({"a": fails(), "b": hangs(), "c": works()}, 0.05)
    assert ended == ["works"]
    await tasks.attempt_all({}, 0.05)


async def test_a_thread_of_its_own_needs_none_of_the_event_loops() -> None:
    release = threading.Event()
    loop = asyncio.get_running_loop()
    taken = [loop.run_in_executor(None, release.wait) for _ in range(64)]
    try:
        async with asyncio.timeout(20):
            assert await tasks.on_thread("quick", lambda: "done") == "done"
            with pytest.raises(KeyError):
                await tasks.on_thread("wrong", lambda: {}["missing"])
    finally:
        release.set()
        await asyncio.gather(*taken)
