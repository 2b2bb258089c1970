"""The blocking clients, created by `attnstore.connect`.

Owns: which calls of a node's client stay on the calling thread. `match`, `read`, `write` and `view` start on it, over the best
transport, and need no hop to the event loop if that is a bulk transport. Everything else runs on the event loop thread, in the
coroutines that serve `AsyncClient`: all other calls, the first call to a node, and a call to a node that forgot its namespaces.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import suppress

from attnstore.client.async_client import AsyncClient
from attnstore.client.base import AttendStream, OnLayer, ReadPlan, ViewPlan
from attnstore.client.cluster.attend import AttendNode, OnlyNode, StoreAttention
from attnstore.client.cluster.client import AsyncClusterClient
from attnstore.client.facade import BlockingFacade, blocking, iterate
from attnstore.client.options import ClusterOptions
from attnstore.client.planning import Planning
from attnstore.client.transports.connection import NodeConnection
from attnstore.client.transports.mapped import PageViews
from attnstore.clock import Clock, Deadline
from attnstore.errors import NamespaceUnknown, Retryable
from attnstore.types import Lease, MatchResult, PageEvent, PageStatus, ReadResult, WriteResult
from attnstore.wire.chunks import Buffer


class Client(BlockingFacade[AsyncClient]):
    """A blocking client of one store node; safe to share between threads. Created by `attnstore.connect`.

    The methods are those of `AsyncClient`, where they are documented, without `await`. A client does not survive a fork, and gRPC
    cannot be used in a child of a process that has a client open: calls there raise `ClientClosed`; spawn such children instead.
    """

    def __init__(self, connection: NodeConnection) -> None:
        super().__init__(AsyncClient(connection))
        self._connection = connection
        self._planning = Planning(connection.layouts)
        self._choice = connection.choice

    describe = blocking(AsyncClient.describe)
    register_layout = blocking(AsyncClient.register_layout)
    renew = blocking(AsyncClient.renew)
    release = blocking(AsyncClient.release)
    delete = blocking(AsyncClient.delete)
    verify = blocking(AsyncClient.verify)
    stats = blocking(AsyncClient.stats)

    def match(
        self, namespace: bytes, prefixes: Sequence[Sequence[bytes]], *, lease_ms: int = 0, deadline_ms: float | None = None
    ) -> MatchResult:
        """See `AsyncClient.match`. Uses the page channel once it is open, in less than half of gRPC's time."""
        with self._thread.used():
            plan = self._planning.match(namespace, prefixes, lease_ms, deadline_ms)
            if self._choice.is_known:
                with suppress(NamespaceUnknown):  # registered again below
                    return self._choice.wait(lambda transport: transport.match(plan))
            return self._thread.run(self._connection.match(plan))

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
        """See `AsyncClient.read`."""
        with self._thread.used():
            plan = self._planning.read(namespace, hashes, buffers, layers, lease, on_layer, deadline_ms)
            if hashes and self._choice.is_known:
                try:
                    self._choice.wait(lambda transport: transport.read(plan))
                    result = plan.landing.result()
                    self._report(plan, result.statuses)
                    return result
                except NamespaceUnknown:
                    pass  # registered again below
                except Retryable as error:
                    return plan.landing.result(error)
            return self._thread.run(self._connection.read(plan))

    def view(
        self,
        namespace: bytes,
        hashes: Sequence[bytes],
        *,
        lease: Lease,
        layers: tuple[int, int] | None = None,
        deadline_ms: float | None = None,
    ) -> PageViews:
        """See `AsyncClient.view`."""
        with self._thread.used():
            plan = self._planning.view(namespace, hashes, lease, layers, deadline_ms)
            shm = self._connection.shm
            if shm is not None:
                with suppress(NamespaceUnknown):  # registered again below
                    views = shm.view(plan).wait()
                    self._report(plan, views.statuses)
                    return views
            return self._thread.run(self._connection.view(plan))

    def write(
        self, namespace: bytes, hashes: Sequence[bytes], pages: Sequence[Buffer], *, deadline_ms: float | None = None
    ) -> WriteResult:
        """See `AsyncClient.write`."""
        with self._thread.used():
            plan = self._planning.write(namespace, hashes, pages, deadline_ms)
            if hashes and self._choice.is_known:
                with suppress(NamespaceUnknown):  # registered again below
                    return self._choice.wait(lambda transport: transport.write(plan))
            return self._thread.run(self._connection.write(plan))

    def attend(
        self, namespace: bytes, *, q_heads: int, scale: float, value_dim: int = 0, deadline_ms: float | None = None
    ) -> AttendStream:
        """Returns an attend stream, over the page channel if the node offers it, else over gRPC; see `AttendStream` and
        `AsyncClient.attend`. The stream ends with the client.
        """
        plan = self._planning.attend(namespace, q_heads, scale, deadline_ms, value_dim)
        return self._thread.run(self._connection.attend(plan, self._thread.run))

    def attention(
        self, namespace: bytes, *, q_heads: int, scale: float, value_dim: int = 0, deadline_ms: float | None = None
    ) -> StoreAttention:
        """Returns attention over pages that stay at the node; see `StoreAttention`. Arguments as in `attend`."""
        plan = self._planning.attend(namespace, q_heads, scale, deadline_ms, value_dim)
        node = OnlyNode(self._client, self._connection)

        async def holders(hashes: Sequence[bytes], _: Deadline) -> dict[AttendNode, Sequence[int]]:
            return {node: range(len(hashes))}

        return self._ending(StoreAttention(plan, holders, self._thread))

    def watch(self, namespace: bytes, *, deadline_ms: float | None = None) -> Generator[PageEvent, None, None]:
        """Yields the page events of `namespace` from the return of this call on; see `AsyncClient.watch`."""
        return iterate(self._thread, self._thread.run(self._client.watch(namespace, deadline_ms=deadline_ms)))

    def _report(self, plan: ReadPlan | ViewPlan, statuses: Sequence[PageStatus]) -> None:
        if PageStatus.CORRUPT in statuses:
            self._thread.run(self._connection.report(plan, statuses))


class ClusterClient(BlockingFacade[AsyncClusterClient]):
    """A blocking client of a cluster; safe to share between threads. Created by `attnstore.connect`.

    The methods are those of `AsyncClusterClient`, without `await`; forks as described for `Client`.
    """

    def __init__(self, options: ClusterOptions, clock: Clock | None = None) -> None:
        super().__init__(AsyncClusterClient(options, clock))

    members = blocking(AsyncClusterClient.members)
    describe = blocking(AsyncClusterClient.describe)
    register_layout = blocking(AsyncClusterClient.register_layout)
    match = blocking(AsyncClusterClient.match)
    lease = blocking(AsyncClusterClient.lease)
    renew = blocking(AsyncClusterClient.renew)
    release = blocking(AsyncClusterClient.release)
    read = blocking(AsyncClusterClient.read)
    view = blocking(AsyncClusterClient.view)
    write = blocking(AsyncClusterClient.write)
    delete = blocking(AsyncClusterClient.delete)
    stats = blocking(AsyncClusterClient.stats)

    def attention(
        self, namespace: bytes, *, q_heads: int, scale: float, value_dim: int = 0, deadline_ms: float | None = None
    ) -> StoreAttention:
        """Returns attention over pages that stay at the nodes of the cluster; see `StoreAttention`. Arguments as in
        `Client.attend`.
        """
        plan = self._client._plan_attend(namespace, q_heads, scale, deadline_ms, value_dim)
        return self._ending(StoreAttention(plan, self._client._attend_holders, self._thread))

    def watch(self, namespace: bytes, *, deadline_ms: float | None = None) -> Generator[PageEvent, None, None]:
        """Yields the page events of `namespace` from the return of this call on; see `AsyncClusterClient.watch`."""
        return iterate(self._thread, self._thread.run(self._client.watch(namespace, deadline_ms=deadline_ms)))
