"""Background work: it cannot fail unnoticed, and it can be ended reliably.

Owns: `supervised` and `supervised_thread` for work that runs as long as its owner, `detached` for work that is done once without a
waiter, `on_thread` for blocking calls, `end` and `attempt_all` for shutdown, and the count of failures. Invariants: a failure is
logged and counted, and supervised work is restarted; a running task is not garbage-collected (the event loop holds tasks by weak
references only).

`end` is used instead of `cancel()` and an `await` that suppresses the cancellation, because that would also suppress a cancellation
of the caller, and because a library inside the task may swallow the cancellation.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections import Counter
from collections.abc import Callable, Coroutine, Mapping
from contextlib import suppress
from typing import Any, Final, TypeVar

from attnstore.limits import TASK_AGAIN_MS_MAX, TASK_AGAIN_MS_MIN
from attnstore.logs import get_logger

R = TypeVar("R")

_AGAIN_S: Final = 0.5

_log = get_logger(__name__)
_detached: set[asyncio.Task[Any]] = set()
_failures: Counter[str] = Counter()
_failures_lock = threading.Lock()


def failures() -> dict[str, int]:
    """Returns how often background work of this process has failed, by its name. Safe from any thread."""
    with _failures_lock:
        return dict(_failures)


def supervised(name: str, run: Callable[[], Coroutine[Any, Any, None]]) -> asyncio.Task[None]:
    """Runs `run()` until it returns or the task is cancelled. If it raises, runs it again after a growing pause."""

    async def keep_running() -> None:
        attempts = _Attempts(name)
        while True:
            attempts.begin()
            try:
                await run()
            except Exception as error:
                await asyncio.sleep(attempts.failed(error))
            else:
                return

    return asyncio.create_task(keep_running(), name=f"attnstore-{name}")


def supervised_thread(name: str, run: Callable[[], None]) -> threading.Thread:
    """`supervised`, on a daemon thread that it starts."""

    def keep_running() -> None:
        attempts = _Attempts(name)
        while True:
            attempts.begin()
            try:
                run()
            except Exception as error:
                time.sleep(attempts.failed(error))
            else:
                return

    thread = threading.Thread(target=keep_running, name=f"attnstore-{name}", daemon=True)
    thread.start()
    return thread


def detached(name: str, coroutine: Coroutine[Any, Any, Any]) -> None:
    """Runs a coroutine once on the running event loop, without a waiter: a failure is logged and counted."""
    task = asyncio.create_task(_watched(name, coroutine), name=f"attnstore-{name}")
    _detached.add(task)
    task.add_done_callback(_detached.discard)


async def on_thread(name: str, call: Callable[[], R]) -> R:
    """Runs `call()` on a daemon thread of its own. `asyncio.to_thread` would not do: calls that never end could take all its
    threads, and the process waits for them.
    """
    loop = asyncio.get_running_loop()
    outcome: asyncio.Future[R] = loop.create_future()

    def settle(set_outcome: Callable[[Any], None], value: Any) -> None:
        def tell() -> None:
            if not outcome.done():
                set_outcome(value)

        with suppress(RuntimeError):  # the loop has ended, so nobody waits any more
            loop.call_soon_threadsafe(tell)

    def run() -> None:
        try:
            result = call()
        except BaseException as error:
            settle(outcome.set_exception, error)
        else:
            settle(outcome.set_result, result)

    threading.Thread(target=run, name=f"attnstore-{name}", daemon=True).start()
    return await outcome


async def attempt_all(steps: Mapping[str, Coroutine[Any, Any, Any]], within_s: float) -> None:
    """Runs all steps at the same time for at most `within_s`. A step that fails or does not end is logged and does not affect the
    others.
    """
    running = {asyncio.create_task(step, name=f"attnstore-{name}"): name for name, step in steps.items()}
    if not running:
        return
    done, late = await asyncio.wait(running, timeout=within_s)
    for task in done:
        if not task.cancelled() and (error := task.exception()) is not None:
            _log.error("could not be ended in order", work=running[task], exc_info=error)
    for task in late:
        task.cancel()
        _log.warning("does not end and is left", work=running[task])


async def end(task: asyncio.Task[Any]) -> None:
    """Cancels a task, repeatedly if needed, and waits for its end. Raises any other error that the task ended with."""
    while not task.done():
        task.cancel()
        await asyncio.wait([task], timeout=_AGAIN_S)
    if not task.cancelled():
        task.result()


async def _watched(name: str, coroutine: Coroutine[Any, Any, Any]) -> None:
    try:
        await coroutine
    except Exception as error:
        _Attempts(name).failed(error)


class _Attempts:
    """The attempts of one piece of work, and the pause before the next."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._pause_ms = TASK_AGAIN_MS_MIN
        self._last: tuple[type[Exception], str] | None = None
        self._began_s = time.monotonic()

    def begin(self) -> None:
        """Records the start of an attempt."""
        self._began_s = time.monotonic()

    def failed(self, error: Exception) -> float:
        """Counts a failure, and logs it unless it equals the last one. Returns the seconds until the next attempt."""
        with _failures_lock:
            _failures[self._name] += 1
        if time.monotonic() - self._began_s > TASK_AGAIN_MS_MAX / 1e3:
            self._pause_ms = TASK_AGAIN_MS_MIN
        if self._last != (kind := (type(error), str(error))):
            _log.error("background work failed", work=self._name, exc_info=error)
        self._last = kind
        pause_s = self._pause_ms / 1e3
        self._pause_ms = min(2 * self._pause_ms, TASK_AGAIN_MS_MAX)
        return pause_s
