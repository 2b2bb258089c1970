"""The blocking client: the asynchronous one, run on an event loop thread that all blocking clients of a process share.

Owns: `LoopThread` and the wrapping of coroutine methods into blocking ones, so that no call is written twice.
Invariant: when a blocking call returns or raises, its coroutine has ended; nothing touches the caller's buffers afterwards.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import functools
import os
import threading
from collections.abc import Callable, Coroutine, Iterator, Sequence
from types import TracebackType
from typing import Any, ClassVar, Concatenate, ParamSpec, Self, TypeVar

import uvloop

from attnstore.client.async_client import AsyncClient, ConnectOptions, written
from attnstore.client.bulk import BulkUnavailable, OnLayer
from attnstore.errors import ClientClosed, NamespaceUnknown, Retryable
from attnstore.types import Lease, PageEvent, ReadResult, WriteResult
from attnstore.wire.chunks import Buffer

P = ParamSpec("P")
R = TypeVar("R")


class LoopThread:
    """A uvloop event loop on a daemon thread, shared by reference count: gRPC's asyncio stack wants one loop per process."""

    _lock: ClassVar[threading.Lock] = threading.Lock()
    _shared: ClassVar[LoopThread | None] = None
    _users: ClassVar[int] = 0

    def __init__(self) -> None:
        self._loop = uvloop.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="attnstore-client", daemon=True)
        self._thread.start()

    @classmethod
    def acquire(cls) -> LoopThread:
        """The process's loop thread, started if need be. Pair with `release`."""
        with cls._lock:
            if cls._shared is None:
                cls._shared = cls()
            cls._users += 1
            return cls._shared

    @classmethod
    def release(cls) -> None:
        """Stops the thread when its last user has gone."""
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
        """Runs a coroutine to its end. An interrupt cancels it and waits until it has ended."""
        outcome: concurrent.futures.Future[R] = concurrent.futures.Future()
        tasks: list[asyncio.Task[R]] = []

        def start() -> None:
            task = self._loop.create_task(coroutine)
            tasks.append(task)
            task.add_done_callback(functools.partial(_settle, outcome))

        def cancel() -> None:
            for task in tasks:
                task.cancel()

        self._loop.call_soon_threadsafe(start)
        try:
            return outcome.result()
        except BaseException:
            if not outcome.done():
                self._loop.call_soon_threadsafe(cancel)
                concurrent.futures.wait([outcome])
            raise

    def _stop(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


os.register_at_fork(after_in_child=LoopThread.forget)


def _settle(outcome: concurrent.futures.Future[R], task: asyncio.Task[R]) -> None:
    if task.cancelled():
        outcome.set_exception(concurrent.futures.CancelledError())
    elif (error := task.exception()) is not None:
        outcome.set_exception(error)
    else:
        outcome.set_result(task.result())


def _blocking(
    method: Callable[Concatenate[AsyncClient, P], Coroutine[Any, Any, R]],
) -> Callable[Concatenate[Client, P], R]:
    def call(self: Client, /, *args: P.args, **kwargs: P.kwargs) -> R:
        return self._running_thread().run(method(self._client, *args, **kwargs))

    functools.update_wrapper(call, method)
    return call


class Client:
    """A blocking client of one store node; safe to share between threads. Made by `attnstore.connect`.

    The methods are those of `AsyncClient`, where they are documented, without `await`.
    """

    def __init__(self, options: ConnectOptions) -> None:
        self._client = AsyncClient(options)
        self._thread = LoopThread.acquire()
        self._closed = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Ends the connection; calls that are running fail. Closing twice is harmless."""
        if not self._closed:
            self._closed = True
            self._thread.run(self._client.close())
            LoopThread.release()

    describe = _blocking(AsyncClient.describe)
    register_layout = _blocking(AsyncClient.register_layout)
    match = _blocking(AsyncClient.match)
    lease = _blocking(AsyncClient.lease)
    renew = _blocking(AsyncClient.renew)
    release = _blocking(AsyncClient.release)
    delete = _blocking(AsyncClient.delete)
    stats = _blocking(AsyncClient.stats)

    def read(
        self,
        namespace: bytes,
        hashes: Sequence[bytes],
        buffers: Sequence[bytearray | memoryview],
        *,
        layers: tuple[int, int] | None = None,
        lease: Lease | None = None,
        on_layer: OnLayer | None = None,
        deadline_ms: float | None = None,
    ) -> ReadResult:
        """See `AsyncClient.read`. A bulk transport runs on the calling thread, with no hop to the event loop."""
        thread = self._running_thread()
        plan = self._client.plan_read(namespace, hashes, buffers, layers, lease, on_layer, deadline_ms)
        reader = self._client.bulk.reader()
        if reader is None or not hashes:
            return thread.run(self._client.run_read(plan))
        try:
            reader.read(plan)
        except (BulkUnavailable, NamespaceUnknown):
            return thread.run(self._client.run_read(plan))
        except Retryable as error:
            return plan.landing.result(error)
        return plan.landing.result()

    def write(
        self, namespace: bytes, hashes: Sequence[bytes], pages: Sequence[Buffer], *, deadline_ms: float | None = None
    ) -> WriteResult:
        """See `AsyncClient.write`. A bulk transport runs on the calling thread, with no hop to the event loop."""
        thread = self._running_thread()
        plan = self._client.plan_write(namespace, hashes, pages, deadline_ms)
        writer = self._client.bulk.writer()
        if writer is None or not hashes:
            return thread.run(self._client.run_write(plan))
        try:
            return written(plan, writer.write(plan))
        except (BulkUnavailable, NamespaceUnknown):
            return thread.run(self._client.run_write(plan))

    def watch(self, namespace: bytes, *, deadline_ms: float | None = None) -> Iterator[PageEvent]:
        """Page events of `namespace` from the return of this call on; see `AsyncClient.watch`."""
        events = self._running_thread().run(self._client.watch(namespace, deadline_ms=deadline_ms))

        def iterate() -> Iterator[PageEvent]:
            while True:
                try:
                    yield self._running_thread().run(_next(events))
                except StopAsyncIteration:
                    return

        return iterate()

    def _running_thread(self) -> LoopThread:
        if self._closed:
            raise ClientClosed("the client is closed")
        return self._thread


async def _next(events: Any) -> PageEvent:
    return await anext(events)
