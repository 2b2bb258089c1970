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
import weakref
from collections.abc import AsyncGenerator, Callable, Coroutine, Generator, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from types import TracebackType
from typing import Any, ClassVar, Concatenate, Generic, ParamSpec, Protocol, Self, TypeVar

import uvloop

from attnstore import tasks
from attnstore.client.async_client import AsyncClient
from attnstore.client.base import AttendPlan, OnLayer, ReadPlan, wait_out, written
from attnstore.client.cluster.attend import AttendNode, Holders, OnlyNode, StoreAttention, attend_stream
from attnstore.client.cluster.client import AsyncClusterClient
from attnstore.client.options import ClusterOptions, ConnectOptions
from attnstore.client.transports.attend import AttendStream
from attnstore.client.transports.mapped import PageViews
from attnstore.client.transports.shm import ViewPlan
from attnstore.clock import Clock, Deadline
from attnstore.errors import ClientClosed, NamespaceUnknown, Retryable
from attnstore.types import Lease, MatchResult, PageEvent, PageStatus, ReadResult, WriteResult
from attnstore.wire.chunks import Buffer

P = ParamSpec("P")
R = TypeVar("R")

_TRANSFERS_MAX = 64


class LoopThread:
    """A uvloop event loop on a daemon thread, shared by reference count: gRPC's asyncio stack wants one loop per process.

    Clients and running calls are its users, so that it never stops under a call that another thread waits for.
    """

    _lock: ClassVar[threading.Lock] = threading.Lock()
    _shared: ClassVar[LoopThread | None] = None
    _users: ClassVar[int] = 0

    def __init__(self) -> None:
        self._loop = uvloop.new_event_loop()
        # Each transfer of a cluster's client blocks one thread until its node answers: slow nodes must not use them up.
        self._loop.set_default_executor(concurrent.futures.ThreadPoolExecutor(_TRANSFERS_MAX, "attnstore-transfer"))
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
        """Runs a coroutine to its end. An interrupt cancels it and waits until it has ended.

        Raises `ClientClosed` if the thread has stopped, or stayed behind in the process that this one was forked from.
        """
        outcome: concurrent.futures.Future[R] = concurrent.futures.Future()
        tasks: list[asyncio.Task[R]] = []

        def start() -> None:
            try:
                task = self._loop.create_task(coroutine)
            except BaseException as error:  # somebody waits for an outcome
                outcome.set_exception(error)
                return
            tasks.append(task)
            task.add_done_callback(functools.partial(_settle, outcome))

        def cancel() -> None:
            for task in tasks:
                task.cancel()
            if not tasks:  # interrupted before `start` was on its way, so it never will be
                outcome.cancel()

        with closing(coroutine), self.used():
            try:
                self._loop.call_soon_threadsafe(start)
                return outcome.result()
            except BaseException:
                if not outcome.done():
                    self._loop.call_soon_threadsafe(cancel)
                    wait_out([outcome])
                raise

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
        """Has a coroutine run, without a lock and without waiting for it: a garbage collector may call this on any thread."""
        try:
            if LoopThread._shared is self:
                self._loop.call_soon_threadsafe(tasks.detached, "submitted", coroutine)
                return
        except RuntimeError:  # the loop was closed in this moment
            pass
        coroutine.close()

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


class Closable(Protocol):
    """What every asynchronous client can do."""

    async def close(self) -> None:
        """Ends the connections."""
        ...


A = TypeVar("A", bound=Closable)


def _blocking(
    method: Callable[Concatenate[A, P], Coroutine[Any, Any, R]],
) -> Callable[Concatenate[BlockingFacade[A], P], R]:
    def call(self: BlockingFacade[A], /, *args: P.args, **kwargs: P.kwargs) -> R:
        return self._thread.run(method(self._client, *args, **kwargs))

    functools.update_wrapper(call, method)
    return call


class BlockingFacade(Generic[A]):
    """What blocking clients have in common: the asynchronous one, the thread that it runs on, and the end of both."""

    def __init__(self, client: A) -> None:
        self._client = client
        self._thread = LoopThread.acquire()
        self._closing = threading.Lock()
        self._attentions: weakref.WeakSet[StoreAttention] = weakref.WeakSet()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Ends the connection; calls that are running raise `ClientClosed`. Closing twice is harmless."""
        if self._closing.acquire(blocking=False):
            # In a forked child there is nothing to end. The steps run from the last one up, each even if another fails.
            with suppress(ClientClosed), self._thread.used(), ExitStack() as ending:
                ending.callback(LoopThread.release)
                ending.callback(lambda: self._thread.run(self._client.close()))
                for attention in list(self._attentions):
                    ending.callback(attention.close)

    def _attention(self, plan: AttendPlan, holders: Holders) -> StoreAttention:
        attention = StoreAttention(plan, holders, self._thread)
        self._attentions.add(attention)
        return attention


class Client(BlockingFacade[AsyncClient]):
    """A blocking client of one store node; safe to share between threads. Made by `attnstore.connect`.

    The methods are those of `AsyncClient`, where they are documented, without `await`. No client survives a fork, and gRPC lets
    none be opened in a child of a process that has one open: calls there raise `ClientClosed`; spawn such children instead.
    """

    def __init__(self, options: ConnectOptions, clock: Clock | None = None) -> None:
        super().__init__(AsyncClient(options, clock))

    describe = _blocking(AsyncClient.describe)
    register_layout = _blocking(AsyncClient.register_layout)
    renew = _blocking(AsyncClient.renew)
    release = _blocking(AsyncClient.release)
    delete = _blocking(AsyncClient.delete)
    verify = _blocking(AsyncClient.verify)
    stats = _blocking(AsyncClient.stats)

    def match(
        self, namespace: bytes, prefixes: Sequence[Sequence[bytes]], *, lease_ms: int = 0, deadline_ms: float | None = None
    ) -> MatchResult:
        """See `AsyncClient.match`. Over the page channel once there is one, on the calling thread: in under half of gRPC's time."""
        with self._thread.used():
            plan = self._client.plan_match(namespace, prefixes, lease_ms, deadline_ms)
            with suppress(NamespaceUnknown):  # registered again below
                found = self._client.bulk.match(plan)
                if found is not None:
                    return found
            return self._thread.run(self._client.run_match(plan))

    def lease(
        self, namespace: bytes, hashes: Sequence[bytes], lease_ms: int, *, deadline_ms: float | None = None
    ) -> tuple[int, Lease | None]:
        """See `AsyncClient.lease`; as fast as `match`."""
        found = self.match(namespace, [hashes], lease_ms=lease_ms, deadline_ms=deadline_ms)
        return found.hits[0], found.lease

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
        with self._thread.used():
            plan = self._client.plan_read(namespace, hashes, buffers, layers, lease, on_layer, deadline_ms)
            try:
                if hashes and self._client.bulk.read(plan):
                    result = plan.landing.result()
                    self._report(plan, result.statuses)
                    return result
            except NamespaceUnknown:
                pass  # registered again below
            except Retryable as error:
                return plan.landing.result(error)
            return self._thread.run(self._client.run_read(plan))

    def view(
        self,
        namespace: bytes,
        hashes: Sequence[bytes],
        *,
        lease: Lease,
        layers: tuple[int, int] | None = None,
        deadline_ms: float | None = None,
    ) -> PageViews:
        """See `AsyncClient.view`. Runs on the calling thread, with no hop to the event loop."""
        with self._thread.used():
            shm = self._client.shm
            if shm is not None:
                with suppress(NamespaceUnknown):  # registered again below
                    plan = self._client.plan_view(namespace, hashes, lease, layers, deadline_ms)
                    views = shm.view(plan)
                    self._report(plan, views.statuses)
                    return views
            return self._thread.run(self._client.view(namespace, hashes, lease=lease, layers=layers, deadline_ms=deadline_ms))

    def _report(self, plan: ReadPlan | ViewPlan, statuses: Sequence[PageStatus]) -> None:
        if PageStatus.CORRUPT in statuses:
            self._thread.run(self._client.report(plan.namespace, plan.hashes, statuses, plan.deadline))

    def write(
        self, namespace: bytes, hashes: Sequence[bytes], pages: Sequence[Buffer], *, deadline_ms: float | None = None
    ) -> WriteResult:
        """See `AsyncClient.write`. A bulk transport runs on the calling thread, with no hop to the event loop."""
        with self._thread.used():
            plan = self._client.plan_write(namespace, hashes, pages, deadline_ms)
            with suppress(NamespaceUnknown):  # registered again below
                verdicts = self._client.bulk.write(plan) if hashes else None
                if verdicts is not None:
                    return written(plan, verdicts)
            return self._thread.run(self._client.run_write(plan))

    def attend(self, namespace: bytes, *, q_heads: int, scale: float, deadline_ms: float | None = None) -> AttendStream:
        """An attend stream, over the page channel where the node offers it, else over gRPC; see `AttendStream` and
        `AsyncClient.attend`. The stream ends with the client.
        """
        plan = self._client.plan_attend(namespace, q_heads, scale, deadline_ms)
        return self._thread.run(attend_stream(self._client, plan, self._thread.run))

    def attention(self, namespace: bytes, *, q_heads: int, scale: float, deadline_ms: float | None = None) -> StoreAttention:
        """Attention over pages that stay at the node; see `StoreAttention`. Arguments as in `attend`."""
        plan = self._client.plan_attend(namespace, q_heads, scale, deadline_ms)
        node = OnlyNode(self._client)

        async def holders(hashes: Sequence[bytes], _: Deadline) -> dict[AttendNode, Sequence[int]]:
            return {node: range(len(hashes))}

        return self._attention(plan, holders)

    def watch(self, namespace: bytes, *, deadline_ms: float | None = None) -> Generator[PageEvent, None, None]:
        """Page events of `namespace` from the return of this call on; see `AsyncClient.watch`."""
        return _iterate(self._thread, self._thread.run(self._client.watch(namespace, deadline_ms=deadline_ms)))


class ClusterClient(BlockingFacade[AsyncClusterClient]):
    """A blocking client of a cluster; safe to share between threads. Made by `attnstore.connect`.

    The methods are those of `AsyncClusterClient`, without `await`; what `Client` says of forks holds here too.
    """

    def __init__(self, options: ClusterOptions, clock: Clock | None = None) -> None:
        super().__init__(AsyncClusterClient(options, clock))

    members = _blocking(AsyncClusterClient.members)
    describe = _blocking(AsyncClusterClient.describe)
    register_layout = _blocking(AsyncClusterClient.register_layout)
    match = _blocking(AsyncClusterClient.match)
    lease = _blocking(AsyncClusterClient.lease)
    renew = _blocking(AsyncClusterClient.renew)
    release = _blocking(AsyncClusterClient.release)
    read = _blocking(AsyncClusterClient.read)
    view = _blocking(AsyncClusterClient.view)
    write = _blocking(AsyncClusterClient.write)
    delete = _blocking(AsyncClusterClient.delete)
    stats = _blocking(AsyncClusterClient.stats)

    def attention(self, namespace: bytes, *, q_heads: int, scale: float, deadline_ms: float | None = None) -> StoreAttention:
        """Attention over pages that stay at the nodes of the cluster; see `StoreAttention`. Arguments as in `Client.attend`."""
        plan = self._client.plan_attend(namespace, q_heads, scale, deadline_ms)
        return self._attention(plan, self._client.attend_holders)

    def watch(self, namespace: bytes, *, deadline_ms: float | None = None) -> Generator[PageEvent, None, None]:
        """Page events of `namespace` from the return of this call on; see `AsyncClusterClient.watch`."""
        return _iterate(self._thread, self._thread.run(self._client.watch(namespace, deadline_ms=deadline_ms)))


def _iterate(thread: LoopThread, events: AsyncGenerator[PageEvent, None]) -> Generator[PageEvent, None, None]:
    """The events, each waited for on the calling thread."""
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
