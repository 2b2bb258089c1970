"""Calls: one exchange with a node, for a thread that waits or a task that awaits.

Owns: how a call runs on the calling thread, on a thread of the event loop's executor or on the event loop, and how it is stopped.
Invariant: when `wait` or `await` ends, however it ends, the exchange has ended: no byte lands in the caller's buffers afterwards.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextvars
import functools
import threading
from collections.abc import Callable, Coroutine, Generator, Iterable, Iterator
from contextlib import closing, contextmanager, suppress
from typing import Any, Generic, Protocol, TypeVar

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)


class Transfer:
    """A handle to stop a running transfer from another thread: each connection in use adds how to break it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._breakers: set[Callable[[], None]] = set()
        self._aborted = False

    @property
    def is_aborted(self) -> bool:
        """True after `abort`: nothing more may begin."""
        return self._aborted

    @contextmanager
    def breakable(self, breaker: Callable[[], None]) -> Iterator[None]:
        """Makes `abort` call `breaker` during the `with` block, at once if the transfer was aborted already.

        Never after the block, because the connection may then serve another transfer.
        """
        with self._lock:
            self._breakers.add(breaker)
            if self._aborted:
                breaker()
        try:
            yield
        finally:
            with self._lock:
                self._breakers.discard(breaker)

    def abort(self) -> None:
        """Breaks every connection in use; the transfer's thread ends soon, with an error."""
        with self._lock:
            self._aborted = True
            for breaker in self._breakers:
                breaker()


class Call(Protocol[T_co]):
    """One exchange with a node that has not begun. May be used once, in one of the two ways."""

    def wait(self) -> T_co:
        """Executes the exchange, blocking the calling thread, which must not be the event loop's."""
        ...

    def __await__(self) -> Generator[Any, None, T_co]:
        """Executes the exchange for a task of the client's event loop."""
        ...


class Runner(Protocol):
    """Runs a coroutine on the client's event loop, from another thread, and waits for its end."""

    def __call__(self, coroutine: Coroutine[Any, Any, T], /) -> T: ...


class ThreadCall(Generic[T]):
    """A call that blocks a thread: `wait` runs it on the calling thread, `await` on a thread of the event loop's executor."""

    def __init__(self, function: Callable[[], T], transfer: Transfer) -> None:
        self.wait = function
        self._transfer = transfer

    def __await__(self) -> Generator[Any, None, T]:
        return in_thread(self.wait, self._transfer).__await__()


class LoopCall(Generic[T]):
    """A call that is a coroutine of the event loop `loop`: `wait` runs it there, `await` runs it in the calling task."""

    def __init__(self, loop: asyncio.AbstractEventLoop, start: Callable[[], Coroutine[Any, Any, T]]) -> None:
        self._loop = loop
        self._start = start

    def wait(self) -> T:
        """See `Call.wait`."""
        return run_on(self._loop, self._start())

    def __await__(self) -> Generator[Any, None, T]:
        return self._start().__await__()


async def in_thread(function: Callable[[], T], transfer: Transfer) -> T:
    """Runs a blocking transfer on a thread. When cancelled, breaks the transfer and waits for its end."""
    # A future, not a task: a caller that cancels all tasks of a loop would be told that the task has ended while the thread goes
    # on.
    running = asyncio.get_running_loop().run_in_executor(None, contextvars.copy_context().run, function)
    try:
        return await asyncio.shield(running)
    except asyncio.CancelledError:
        transfer.abort()
        # Even if it is cancelled again: until the thread has ended it may write into the caller's buffers.
        while not running.done():
            with suppress(asyncio.CancelledError):
                await asyncio.wait([running])
        running.exception()
        raise


def run_on(loop: asyncio.AbstractEventLoop, coroutine: Coroutine[Any, Any, T]) -> T:
    """Runs a coroutine on another thread's event loop and waits for its end. An interrupt cancels it first.

    The caller ensures that the loop runs until then.
    """
    outcome: concurrent.futures.Future[T] = concurrent.futures.Future()
    tasks: list[asyncio.Task[T]] = []

    def start() -> None:
        try:
            task = loop.create_task(coroutine)
        except BaseException as error:  # the caller waits for an outcome
            outcome.set_exception(error)
            return
        tasks.append(task)
        task.add_done_callback(functools.partial(_settle, outcome))

    def cancel() -> None:
        for task in tasks:
            task.cancel()
        if not tasks:  # interrupted before `start` was handed over
            outcome.cancel()

    with closing(coroutine):
        try:
            loop.call_soon_threadsafe(start)
            return outcome.result()
        except BaseException:
            if not outcome.done():
                loop.call_soon_threadsafe(cancel)
                wait_out([outcome])
            raise


def wait_out(futures: Iterable[concurrent.futures.Future[Any]]) -> None:
    """Returns when all have ended. Drops interrupts meanwhile, because until then the caller's buffers may be written."""
    left = set(futures)
    while left:
        with suppress(KeyboardInterrupt):
            left = concurrent.futures.wait(left).not_done


def _settle(outcome: concurrent.futures.Future[T], task: asyncio.Task[T]) -> None:
    if task.cancelled():
        outcome.set_exception(concurrent.futures.CancelledError())
    elif (error := task.exception()) is not None:
        outcome.set_exception(error)
    else:
        outcome.set_result(task.result())
