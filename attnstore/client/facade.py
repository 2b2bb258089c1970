"""Blocking clients over asynchronous ones: their shared thread, and the conversion of coroutine methods into blocking ones.

Owns: `LoopThread`, the event loop thread of a process, and `BlockingFacade`, the common part of every blocking client. Invariant:
when a blocking call returns or raises, its coroutine has ended; nothing touches the caller's buffers afterwards.
"""

from __future__ import annotations

import concurrent.futures
import functools
import os
import threading
import weakref
from collections.abc import AsyncGenerator, Callable, Coroutine, Generator, Hashable, Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from types import TracebackType
from typing import Any, ClassVar, Concatenate, Generic, ParamSpec, Protocol, Self, TypeVar

import uvloop

from attnstore import tasks
from attnstore.client.calls import run_on
from attnstore.errors import ClientClosed
from attnstore.types import PageEvent

P = ParamSpec("P")
R = TypeVar("R")

_TRANSFERS_MAX = 64


class LoopThread:
    """A uvloop event loop on a daemon thread, shared by reference count, because gRPC's asyncio stack wants one loop per process.

    Clients and running calls are its users, so that it never stops under a call that another thread waits for.
    """

    _lock: ClassVar[threading.Lock] = threading.Lock()
    _shared: ClassVar[LoopThread | None] = None
    _users: ClassVar[int] = 0

    def __init__(self) -> None:
        self._loop = uvloop.new_event_loop()
        # Each transfer of a cluster's client blocks one thread until its node answers, and slow nodes must not use up all threads.
        self._loop.set_default_executor(concurrent.futures.ThreadPoolExecutor(_TRANSFERS_MAX, "attnstore-transfer"))
        self._thread = threading.Thread(target=self._loop.run_forever, name="attnstore-client", daemon=True)
        self._thread.start()

    @classmethod
    def acquire(cls) -> LoopThread:
        """Returns the process's loop thread, started if needed. Pair with `release`."""
        with cls._lock:
            if cls._shared is None:
                cls._shared = cls()
            cls._users += 1
            return cls._shared

    @classmethod
    def release(cls) -> None:
        """Stops the thread when its last user has left."""
        with cls._lock:
            cls._users -= 1
            if cls._users == 0 and cls._shared is not None:
                thread, cls._shared = cls._shared, None
                thread._stop()

    @classmethod
    def forget(cls) -> None:
        """In a forked child: the parent's thread does not exist here."""
        cls._lock = threading.Lock()
        cls._shared = None
        cls._users = 0

    def run(self, coroutine: Coroutine[Any, Any, R]) -> R:
        """Runs a coroutine to its end. An interrupt cancels it and waits until it has ended.

        Raises `ClientClosed` if the thread has stopped, or belongs to the process from which this one was forked.
        """
        with closing(coroutine), self.used():
            return run_on(self._loop, coroutine)

    @contextmanager
    def used(self) -> Iterator[None]:
        """Keeps the thread running for the `with` block. Raises `ClientClosed` as `run` does."""
        with LoopThread._lock:
            if LoopThread._shared is not self:
                raise ClientClosed("the client is closed, or it was opened before this process was forked")
            LoopThread._users += 1
        try:
            yield
        finally:
            LoopThread.release()

    def submit(self, coroutine: Coroutine[Any, Any, object]) -> None:
        """Schedules a coroutine without a lock and without waiting, because a garbage collector may call this on any thread."""
        try:
            if LoopThread._shared is self:
                self._loop.call_soon_threadsafe(tasks.detached, "submitted", coroutine)
                return
        except RuntimeError:  # the loop was closed at this moment
            pass
        coroutine.close()

    def _stop(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


os.register_at_fork(after_in_child=LoopThread.forget)


class Closable(Protocol):
    """The interface of an asynchronous client that can be closed."""

    async def close(self) -> None:
        """Closes the connections."""
        ...


class SupportsClose(Hashable, Protocol):
    """An object that a blocking client has opened in addition to its calls."""

    def close(self) -> None:
        """Ends it."""
        ...


A = TypeVar("A", bound=Closable)
S = TypeVar("S", bound=SupportsClose)


def blocking(
    method: Callable[Concatenate[A, P], Coroutine[Any, Any, R]],
) -> Callable[Concatenate[BlockingFacade[A], P], R]:
    def call(self: BlockingFacade[A], /, *args: P.args, **kwargs: P.kwargs) -> R:
        return self._thread.run(method(self._client, *args, **kwargs))

    functools.update_wrapper(call, method)
    return call


class BlockingFacade(Generic[A]):
    """The common part of blocking clients: the asynchronous client, the thread that it runs on, and closing both."""

    def __init__(self, client: A) -> None:
        self._client = client
        self._thread = LoopThread.acquire()
        self._closing = threading.Lock()
        self._open: weakref.WeakSet[SupportsClose] = weakref.WeakSet()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Closes the connection; running calls raise `ClientClosed`. Closing twice is harmless."""
        if self._closing.acquire(blocking=False):
            # In a forked child there is nothing to close. The steps run from the last one up, each even if another fails.
            with suppress(ClientClosed), self._thread.used(), ExitStack() as ending:
                ending.callback(LoopThread.release)
                ending.callback(lambda: self._thread.run(self._client.close()))
                for each in list(self._open):
                    ending.callback(each.close)

    def _ending(self, opened: S) -> S:
        """Makes `close` close this too, if it is still in use then."""
        self._open.add(opened)
        return opened


def iterate(thread: LoopThread, events: AsyncGenerator[PageEvent, None]) -> Generator[PageEvent, None, None]:
    """Yields the events, waiting for each on the calling thread."""
    try:
        while True:
            yield thread.run(_next(events))
    except StopAsyncIteration:
        return
    finally:
        thread.submit(_end(events))


async def _next(events: AsyncGenerator[PageEvent, None]) -> PageEvent:
    return await anext(events)


async def _end(events: AsyncGenerator[PageEvent, None]) -> None:
    await events.aclose()
