"""The asynchronous client of one store node, created by `attnstore.aio.connect`.

Owns: the public names and their documentation. `planning` checks a call, and `connection` sends it to the node; the blocking client
(`blocking`) offers the same calls over the same two.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Sequence
from types import TracebackType
from typing import Any, Self

from attnstore.client.base import OnLayer
from attnstore.client.planning import Planning, checked_lease_ms
from attnstore.client.transports.attend import AttendCall
from attnstore.client.transports.connection import NodeConnection
from attnstore.client.transports.mapped import PageViews
from attnstore.core.layout import PageLayout
from attnstore.errors import DeadlineExceeded
from attnstore.statistics import NodeStatistics
from attnstore.types import (
    DeleteResult,
    Lease,
    MatchResult,
    NodeDescription,
    PageEvent,
    PageStatus,
    ReadResult,
    WriteResult,
)
from attnstore.wire import messages
from attnstore.wire.chunks import Buffer


class AsyncClient:
    """A client of one store node, for one event loop. Created by `attnstore.aio.connect`; the connection is opened at first use.

    Every call takes `deadline_ms` (default: the client's) and ends within it. Errors are those of `attnstore.errors`.
    """

    def __init__(self, connection: NodeConnection) -> None:
        self._connection = connection
        self._layouts = connection.layouts
        self._planning = Planning(connection.layouts)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Closes the connection; running calls fail. Closing twice is harmless."""
        await self._connection.close()

    async def describe(self, *, deadline_ms: float | None = None) -> NodeDescription:
        """Returns the node's limits, transports and load."""
        answer = await self._connection.call("Describe", messages.DescribeRequest(), deadline_ms)
        return messages.description_from_wire(answer)

    async def register_layout(self, namespace: bytes, layout: PageLayout, *, deadline_ms: float | None = None) -> int:
        """Registers `namespace` with the node, idempotently, and returns how many of its pages the node could hold.

        Raises `LayoutMismatch` if the node knows the namespace with another layout. A namespace belongs to the caller's tenant:
        another tenant may use an equal digest, and neither sees the other's pages.
        """
        return await self._connection.register(namespace, layout, deadline_ms)

    async def match(
        self, namespace: bytes, prefixes: Sequence[Sequence[bytes]], *, lease_ms: int = 0, deadline_ms: float | None = None
    ) -> MatchResult:
        """Returns for each prefix (hashes of consecutive blocks) how many leading pages the node has.

        With `lease_ms` the found pages are pinned for that long (at most `limits.LEASE_MS_MAX`): pass the lease to `read`, then
        `release` it.
        """
        return await self._connection.match(self._planning.match(namespace, prefixes, lease_ms, deadline_ms))

    async def lease(
        self, namespace: bytes, hashes: Sequence[bytes], lease_ms: int, *, deadline_ms: float | None = None
    ) -> tuple[int, Lease | None]:
        """Leases the leading pages of one prefix. Returns their number and the lease, which is None if the first page
        is missing.
        """
        found = await self.match(namespace, [hashes], lease_ms=lease_ms, deadline_ms=deadline_ms)
        return found.hits[0], found.lease

    async def renew(self, lease: Lease, lease_ms: int, *, deadline_ms: float | None = None) -> Lease:
        """Extends a lease to `lease_ms` from now. Raises `LeaseExpired` if it has expired: match again."""
        request = messages.RenewLeaseRequest(lease_id=lease.lease_id, lease_ms=checked_lease_ms(lease_ms))
        answer = await self._connection.call("RenewLease", request, deadline_ms)
        return messages.lease_from_wire(lease.lease_id, answer.lease_ms)

    async def release(self, lease: Lease, *, deadline_ms: float | None = None) -> bool:
        """Ends a lease. Returns False if it had already expired."""
        request = messages.ReleaseLeaseRequest(lease_id=lease.lease_id)
        answer = await self._connection.call("ReleaseLease", request, deadline_ms)
        return bool(answer.released)

    async def read(
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
        """Reads pages into `buffers`, one writable buffer per hash; whole pages, or `layers = (begin, end)` of each.

        A page that is missing, late or corrupt does not raise: its status says so. A lost connection or a passed deadline ends the
        read with `ReadResult.error` set; pages that were complete and verified by then are OK. Raises only for a wrong call, and
        `ProtocolError` for a node that breaks the protocol.

        With `on_layer` the pages arrive layer by layer if the transport supports it (tcp). `on_layer(layer, pages)` is called on
        the transferring thread as soon as a layer of the first `pages` pages has arrived and is verified; compute can start on it.
        """
        plan = self._planning.read(namespace, hashes, buffers, layers, lease, on_layer, deadline_ms)
        return await self._connection.read(plan)

    async def verify(
        self, namespace: bytes, hashes: Sequence[bytes], *, deadline_ms: float | None = None
    ) -> tuple[PageStatus, ...]:
        """Makes the node hash pages in place, at most `REPORTED_HASHES_MAX`. Returns OK for an intact page, MISSING for one that is
        not stored, or that was corrupt and is removed now.

        `read` and `view` do this automatically for CORRUPT pages. Raises `Overloaded` while another such call of the tenant runs.
        """
        return await self._connection.verify(namespace, hashes, deadline_ms)

    async def view(
        self,
        namespace: bytes,
        hashes: Sequence[bytes],
        *,
        lease: Lease,
        layers: tuple[int, int] | None = None,
        deadline_ms: float | None = None,
    ) -> PageViews:
        """Views pages, or `layers = (begin, end)` of each, in place in the node's memory: `PageViews` says what may be done with
        them.

        For a node on this host that offers shm; `lease` must cover the pages. Raises `InvalidArgument` if shm is not available, and
        a `Retryable` error if the connection is lost or the deadline passes.
        """
        return await self._connection.view(self._planning.view(namespace, hashes, lease, layers, deadline_ms))

    async def write(
        self,
        namespace: bytes,
        hashes: Sequence[bytes],
        pages: Sequence[Buffer],
        *,
        deadline_ms: float | None = None,
    ) -> WriteResult:
        """Writes pages, one bytes-like object of the layout's page size per hash. Returns the verdict on each.

        Writing a page that the node already has is a no-op (ALREADY_PRESENT). Raises a `Retryable` error if the connection is lost
        or the deadline passes; pages that were complete by then stay.
        """
        return await self._connection.write(self._planning.write(namespace, hashes, pages, deadline_ms))

    async def hand_over(
        self,
        namespace: bytes,
        hashes: Sequence[bytes],
        pages: Sequence[Buffer],
        *,
        sealed: Sequence[int],
        ages_ms: Sequence[int],
        deadline_ms: float | None = None,
    ) -> WriteResult:
        """Writes pages that clients wrote `ages_ms` ago (at least 1 ms) to another node: nodes use it for each other.

        As `write`, but the node evicts nothing for them (NO_SPACE), and refuses pages deleted since (DELETED). `sealed` are the
        pages' checksums from when they were sealed: a page that has changed since is refused (CHECKSUM_MISMATCH).
        """
        assert len(ages_ms) == len(sealed) == len(hashes)
        assert all(age_ms > 0 for age_ms in ages_ms)
        return await self._connection.write(self._planning.write(namespace, hashes, pages, deadline_ms, sealed, ages_ms))

    async def attend(
        self, namespace: bytes, *, q_heads: int, scale: float, value_dim: int = 0, deadline_ms: float | None = None
    ) -> AttendCall:
        """Opens an attend stream over gRPC: open sets of leased pages on it, then query rows against them; see `AttendStream`.

        `q_heads` is a multiple of the layout's kv_heads, `scale` the factor on `q . k`; each exchange ends within `deadline_ms`.
        `value_dim`: 0, or the pages hold latents (`PageLayout.of_latents`) whose first `value_dim` elements are values.
        (The blocking client attends over the page channel if the node offers it, with less delay.)
        """
        return await self._connection.grpc.attend_call(self._planning.attend(namespace, q_heads, scale, deadline_ms, value_dim))

    async def delete(
        self, namespace: bytes, hashes: Sequence[bytes], *, tell: bool = False, deadline_ms: float | None = None
    ) -> DeleteResult:
        """Removes pages. Returns for each OK, MISSING or PINNED (leased or being read).

        With `tell` the node also publishes the deletion in its cluster's directory, for members that cannot be reached now.
        """
        request = messages.DeleteRequest(namespace=namespace, hashes=messages.join_hashes(hashes), tell=tell)
        deadline = self._layouts.deadline(deadline_ms)
        answer = await self._connection.in_namespace(
            namespace, deadline, lambda: self._connection.call("Delete", request, deadline.left_ms())
        )
        return DeleteResult(messages.statuses_from_wire(answer.statuses, len(hashes)))

    async def stats(self, *, deadline_ms: float | None = None) -> NodeStatistics:
        """Returns the node's counters and occupancy; only the namespaces of the caller's tenant are listed."""
        answer = await self._connection.call("Stats", messages.StatsRequest(), deadline_ms)
        return messages.statistics_from_wire(answer)

    async def watch(self, namespace: bytes, *, deadline_ms: float | None = None) -> AsyncGenerator[PageEvent, None]:
        """Watches the page events of `namespace` from now on: `async for event in await client.watch(namespace)`.

        Returns once the node has begun to watch, so that no later event is missed. Ends with an error when the node drains, the
        connection is lost or `deadline_ms` passes (default: none, once it has begun); close the generator or the client to end it.
        """
        request = messages.WatchRequest(namespace=namespace)
        deadline = self._layouts.deadline(deadline_ms)

        async def begin() -> AsyncGenerator[Any, None]:
            stream = self._connection.grpc.channel.watch(request, None if deadline_ms is None else deadline.left_ms())
            try:
                async with asyncio.timeout(deadline.left_ms() / 1000):
                    await anext(stream)
            except TimeoutError:
                raise DeadlineExceeded("the node did not begin to watch within the deadline") from None
            return stream

        stream = await self._connection.in_namespace(namespace, deadline, begin)

        async def events() -> AsyncGenerator[PageEvent, None]:
            async with contextlib.aclosing(stream):
                async for message in stream:
                    yield messages.event_from_wire(message)

        return events()
