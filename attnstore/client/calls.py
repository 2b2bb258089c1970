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
from collections.abc import Callable, Coroutine, Generator, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from typing import Any, Final, Generic, Protocol, TypeVar

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)

_INTERRUPT_DELAY_S: Final = 0.2
"""A wait for a lock does not see a signal that came just before it. It is noticed after this time instead of at the end."""


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
    outcome: Outcome[T] = Outcome()
    tasks: list[asyncio.Task[T]] = []

    def begin() -> None:
        if outcome.begin():
            try:
                tasks.append(loop.create_task(coroutine))
            except BaseException as error:  # the caller waits for an outcome
                outcome.fail(error)
            else:
                tasks[0].add_done_callback(functools.partial(_settle, outcome))

    def cancel() -> None:
        for task in tasks:
            if not task.cancelling():
                task.cancel()

    def stop() -> None:
        if not outcome.revoke():
            loop.call_soon_threadsafe(cancel)

    with closing(coroutine):
        outlast([outcome], lambda: loop.call_soon_threadsafe(begin), stop)
        return outcome.result()


class Outcome(Generic[T]):
    """Work of another thread and how it ended, for one thread that waits.

    A `concurrent.futures.Future` has a lock that an interrupt of the waiting thread can leave locked; the other thread then blocks
    for ever when it sets the result. Here the other thread takes no lock that the waiting one holds while it can be interrupted.
    """

    def __init__(self) -> None:
        self.ended = False
        self._begun = False
        self._lock = threading.Lock()
        self._running = threading.Lock()
        self._running.acquire()
        self._results: list[T] = []
        self.error: BaseException | None = None

    def begin(self) -> bool:
        """The other thread begins. Returns False if it must not, because the work was revoked."""
        with self._lock:
            self._begun |= not self.ended
            return not self.ended

    def revoke(self) -> bool:
        """Ends work that has not begun. Returns False if it has begun."""
        with self._lock:
            if not self._begun:
                self.ended = True
            return not self._begun

    def succeed(self, result: T) -> None:
        """The other thread has ended with a result."""
        self._results.append(result)
        self.ended = True
        self._running.release()

    def fail(self, error: BaseException) -> None:
        """The other thread has ended with an error."""
        self.error = error
        self.ended = True
        self._running.release()

    def run(self, function: Callable[[], T]) -> None:
        """Executes the work on the calling thread."""
        if self.begin():
            try:
                result = function()
            except BaseException as error:
                self.fail(error)
            else:
                self.succeed(result)

    def wait(self) -> None:
        """Waits for the end."""
        while not self.ended:
            self._running.acquire(timeout=_INTERRUPT_DELAY_S)

    def result(self) -> T:
        """Returns the result, or raises the error, of work that has ended and was not revoked. To be called once."""
        error, self.error = self.error, None
        try:
            if error is not None:
                raise error
            return self._results[0]
        finally:
            del error  # its traceback refers to this frame


def outlast(outcomes: Sequence[Outcome[Any]], start: Callable[[], object], stop: Callable[[], object]) -> None:
    """Calls `start`, and waits until all the work of `outcomes` has ended. If that is interrupted, calls `stop`, which revokes or
    cancels the work and may be called several times, and still waits. Then raises the last interrupt, or the error of `start`.
    """
    interrupt: BaseException | None = None
    ended = False
    while not ended:
        try:
            if interrupt is None:
                start()
            else:
                stop()
            for outcome in outcomes:
                outcome.wait()
            ended = True
        except BaseException as error:  # no call here: CPython interrupts at calls, and an interrupt would end the loop
            interrupt = error
    try:
        if interrupt is not None:
            raise interrupt
    finally:
        del interrupt  # its traceback refers to this frame


def _settle(outcome: Outcome[T], task: asyncio.Task[T]) -> None:
    if task.cancelled():
        outcome.fail(concurrent.futures.CancelledError())
    elif (error := task.exception()) is not None:
        outcome.fail(error)
    else:
        outcome.succeed(task.result())
