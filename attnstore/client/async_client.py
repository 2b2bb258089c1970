"""The client: everything that `attnstore.connect` and `attnstore.aio.connect` offer, written once, asynchronously.

Owns: arguments checked before anything is sent, the layouts that this client registered, and what happens when a node has
forgotten them (it was restarted: register again, once). The blocking client is a facade over this one (`blocking.py`).
Invariant: a call ends within its one deadline, whatever it takes to serve it.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from types import TracebackType
from typing import Any, Self, TypeVar

from attnstore.client.base import (
    AttendPlan,
    BulkUnavailable,
    MatchPlan,
    OnLayer,
    ReadPlan,
    Transfer,
    WritePlan,
    all_layers,
    in_thread,
    matched,
    written,
)
from attnstore.client.landing import Landing, readable_view
from attnstore.client.negotiation import BulkTransports
from attnstore.client.options import ConnectOptions, checked_deadline_ms
from attnstore.client.transports.attend import AttendCall, ChannelAttend
from attnstore.client.transports.grpc import GrpcTransport
from attnstore.client.transports.mapped import PageViews
from attnstore.client.transports.shm import ShmTransport, ViewPlan
from attnstore.clock import Clock, Deadline, MonotonicClock
from attnstore.core.layout import PageLayout
from attnstore.errors import (
    AttnStoreError,
    ClientClosed,
    DeadlineExceeded,
    InvalidArgument,
    NamespaceUnknown,
    ProtocolError,
    Retryable,
    Unavailable,
)
from attnstore.limits import CHANNEL_READ_HASHES_MAX, HASHES_MAX, LEASE_MS_MAX, REPORT_MS_MAX, REPORTED_HASHES_MAX
from attnstore.logs import get_logger
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
from attnstore.wire.attend import AttendShape
from attnstore.wire.chunks import Buffer

T = TypeVar("T")

_log = get_logger(__name__)


class AsyncClient:
    """A client of one store node, for one event loop. Made by `attnstore.aio.connect`; the connection is opened at first use.

    Every call takes `deadline_ms` (default: the client's) and ends within it. Errors are those of `attnstore.errors`.
    """

    def __init__(self, options: ConnectOptions, clock: Clock | None = None) -> None:
        self._options = options
        self._layouts: dict[bytes, PageLayout] = {}
        self._transport: GrpcTransport | None = None
        self._clock = clock or MonotonicClock()
        self._closed = False
        self._transports = BulkTransports(options, self._clock, self._offered, self._ask_channel)
        self.bulk = self._transports.choice

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Ends the connection; calls that are running fail. Closing twice is harmless."""
        self._closed = True
        transport, self._transport = self._transport, None
        try:
            self._transports.close()
        finally:
            if transport is not None:
                await transport.close()

    @property
    def shm(self) -> ShmTransport | None:
        """The shared memory of a node of this host, once it has been offered."""
        return self._transports.shm

    async def describe(self, *, deadline_ms: float | None = None) -> NodeDescription:
        """What the node says of itself."""
        answer = await self._connected().call("Describe", messages.DescribeRequest(), self._deadline_ms(deadline_ms))
        return messages.description_from_wire(answer)

    async def register_layout(self, namespace: bytes, layout: PageLayout, *, deadline_ms: float | None = None) -> int:
        """Makes `namespace` known to the node; how many of its pages the node could hold. Idempotent.

        Raises `LayoutMismatch` if the node knows the namespace with another layout. A namespace is the caller's own: another
        tenant may use an equal digest, and neither ever sees the other's pages.
        """
        request = messages.RegisterLayoutRequest(
            namespace=messages.check_namespace(namespace), layout=messages.layout_to_wire(layout)
        )
        answer = await self._connected().call("RegisterLayout", request, self._deadline_ms(deadline_ms))
        if answer.page_bytes != layout.page_bytes:
            raise ProtocolError(f"the node counts {answer.page_bytes} bytes a page where the layout has {layout.page_bytes}")
        self._layouts[namespace] = layout
        return int(answer.pages_max)

    async def match(
        self, namespace: bytes, prefixes: Sequence[Sequence[bytes]], *, lease_ms: int = 0, deadline_ms: float | None = None
    ) -> MatchResult:
        """For each prefix (hashes of consecutive blocks) how many leading pages the node has.

        With `lease_ms` the pages that hit are kept for that long (at most `limits.LEASE_MS_MAX`): pass the lease to `read`,
        then `release` it.
        """
        return await self.run_match(self.plan_match(namespace, prefixes, lease_ms, deadline_ms))

    def plan_match(
        self, namespace: bytes, prefixes: Sequence[Sequence[bytes]], lease_ms: int, deadline_ms: float | None
    ) -> MatchPlan:
        """Checks the arguments of `match`; nothing is sent."""
        messages.check_namespace(namespace)
        plan = MatchPlan(namespace, prefixes, _checked_lease_ms(lease_ms), self._deadline(deadline_ms))
        if plan.hashes > HASHES_MAX:
            raise InvalidArgument(f"the prefixes have {plan.hashes} hashes; at most {HASHES_MAX} fit one request")
        return plan

    async def run_match(self, plan: MatchPlan) -> MatchResult:
        """Carries a plan out over gRPC."""
        request = messages.MatchRequest(
            namespace=plan.namespace,
            prefixes=[messages.join_hashes(prefix) for prefix in plan.prefixes],
            lease_ms=plan.lease_ms,
        )
        answer = await self._in_namespace(
            plan.namespace, plan.deadline, lambda: self._connected().call("Match", request, plan.deadline.left_ms())
        )
        return matched(plan, answer.hits, answer.lease_id, answer.lease_ms)

    async def lease(
        self, namespace: bytes, hashes: Sequence[bytes], lease_ms: int, *, deadline_ms: float | None = None
    ) -> tuple[int, Lease | None]:
        """Leases the leading pages of one prefix: how many, and the lease (None when the first is missing already)."""
        found = await self.match(namespace, [hashes], lease_ms=lease_ms, deadline_ms=deadline_ms)
        return found.hits[0], found.lease

    async def renew(self, lease: Lease, lease_ms: int, *, deadline_ms: float | None = None) -> Lease:
        """Extends a lease to `lease_ms` from now. Raises `LeaseExpired` if it ran out: match again."""
        request = messages.RenewLeaseRequest(lease_id=lease.lease_id, lease_ms=_checked_lease_ms(lease_ms))
        answer = await self._connected().call("RenewLease", request, self._deadline_ms(deadline_ms))
        return messages.lease_from_wire(lease.lease_id, answer.lease_ms)

    async def release(self, lease: Lease, *, deadline_ms: float | None = None) -> bool:
        """Ends a lease. False if it had already run out."""
        request = messages.ReleaseLeaseRequest(lease_id=lease.lease_id)
        answer = await self._connected().call("ReleaseLease", request, self._deadline_ms(deadline_ms))
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
        """Reads pages into `buffers`, one writable buffer for each hash; whole pages, or `layers = (begin, end)` of each.

        Never raises for a page that is missing, late or corrupt: that is its status. A lost connection or a passed deadline
        ends the read with `ReadResult.error` set; what was complete and verified by then is OK. Raises only for a call that is
        wrong, and `ProtocolError` for a node that breaks the protocol.

        With `on_layer` the pages come layer by layer where the transport can (tcp), and `on_layer(layer, pages)` is called, on the
        thread that transfers, as soon as a layer of the first `pages` pages is there and verified; compute can start on it.
        """
        plan = self.plan_read(namespace, hashes, buffers, layers, lease, on_layer, deadline_ms)
        return await self.run_read(plan)

    def plan_read(
        self,
        namespace: bytes,
        hashes: Sequence[bytes],
        buffers: Sequence[bytearray | memoryview],
        layers: tuple[int, int] | None,
        lease: Lease | None,
        on_layer: OnLayer | None,
        deadline_ms: float | None,
    ) -> ReadPlan:
        """Checks the arguments of `read`; nothing is sent."""
        layout = self._layout(namespace)
        messages.join_hashes(hashes)
        layer_begin, layer_end = layers if layers is not None else (0, layout.layers)
        begin, end = layout.layer_slice(layer_begin, layer_end)
        if on_layer is not None and len(hashes) > CHANNEL_READ_HASHES_MAX:
            raise InvalidArgument(f"a read with on_layer takes at most {CHANNEL_READ_HASHES_MAX} pages, not {len(hashes)}")
        return ReadPlan(
            namespace=namespace,
            hashes=hashes,
            layer_begin=layer_begin,
            layer_end=layer_end or layout.layers,
            layer_bytes=layout.layer_bytes,
            is_whole=end - begin == layout.page_bytes,
            lease_id=lease.lease_id if lease is not None else None,
            landing=Landing(len(hashes), buffers, end - begin),
            deadline=self._deadline(deadline_ms),
            on_layer=on_layer,
        )

    async def run_read(self, plan: ReadPlan) -> ReadResult:
        """Carries a plan out over the best transport there is."""
        if not plan.hashes:
            return plan.landing.result()
        try:
            await self._in_namespace(plan.namespace, plan.deadline, lambda: self._read_over_best(plan))
        except Retryable as error:
            return plan.landing.result(error)
        result = plan.landing.result()
        await self.report(plan.namespace, plan.hashes, result.statuses, plan.deadline)
        return result

    async def report(self, namespace: bytes, hashes: Sequence[bytes], statuses: Sequence[PageStatus], deadline: Deadline) -> None:
        """Tells the node which pages came CORRUPT, if any did, so that it drops those that are wrong there. Never raises."""
        corrupt = [page_hash for page_hash, status in zip(hashes, statuses, strict=True) if status is PageStatus.CORRUPT]
        if not corrupt:
            return
        with contextlib.suppress(AttnStoreError):  # the next reader reports them again
            left_ms = deadline.sooner(REPORT_MS_MAX, last=True).left_ms()
            verified = await self.verify(namespace, corrupt[:REPORTED_HASHES_MAX], deadline_ms=left_ms)
            gone = sum(status is not PageStatus.OK for status in verified)
            _log.warning("corrupt pages reported", node=self._options.target, pages=len(corrupt), gone=gone)

    async def verify(
        self, namespace: bytes, hashes: Sequence[bytes], *, deadline_ms: float | None = None
    ) -> tuple[PageStatus, ...]:
        """Has the node hash pages where they lie, at most `REPORTED_HASHES_MAX`: OK for one that is what was written, MISSING
        for one that is not there, or that was not and is dropped now.

        `read` and `view` do that by themselves for pages that come CORRUPT. Raises `Overloaded` while another such call of the
        tenant runs.
        """
        request = messages.VerifyRequest(namespace=namespace, hashes=messages.join_hashes(hashes))
        answer = await self._connected().call("Verify", request, self._deadline_ms(deadline_ms))
        return messages.statuses_from_wire(answer.statuses, len(hashes))

    async def _read_over_best(self, plan: ReadPlan) -> None:
        plan.landing.restart()
        await self._transports.negotiate(plan.deadline)
        if self.bulk.has_readers and await in_thread(lambda: self.bulk.read(plan), plan.transfer):
            return
        request = messages.ReadRequest(
            namespace=plan.namespace,
            hashes=messages.join_hashes(plan.hashes),
            layer_begin=plan.layer_begin,
            layer_end=plan.layer_end,
            lease_id=plan.lease_id or b"",
        )
        await self._connected().read(request, plan.landing, plan.deadline.left_ms())
        if plan.on_layer is not None:
            # Not on the event loop: a callback may block, or call this client.
            await in_thread(functools.partial(all_layers, plan, plan.on_layer), plan.transfer)

    async def view(
        self,
        namespace: bytes,
        hashes: Sequence[bytes],
        *,
        lease: Lease,
        layers: tuple[int, int] | None = None,
        deadline_ms: float | None = None,
    ) -> PageViews:
        """Pages, or `layers = (begin, end)` of each, where they lie in the node's memory: see `PageViews` for what that promises.

        For a node on this host that offers shm; `lease` must cover the pages. Raises `InvalidArgument` where shm is not to be had,
        and a `Retryable` error when the connection is lost or the deadline passes.
        """
        plan = self.plan_view(namespace, hashes, lease, layers, deadline_ms)
        views = await self._in_namespace(namespace, plan.deadline, lambda: self._view_over_shm(plan))
        await self.report(namespace, plan.hashes, views.statuses, plan.deadline)
        return views

    def plan_view(
        self,
        namespace: bytes,
        hashes: Sequence[bytes],
        lease: Lease,
        layers: tuple[int, int] | None,
        deadline_ms: float | None,
    ) -> ViewPlan:
        """Checks the arguments of `view`; nothing is sent."""
        layout = self._layout(namespace)
        messages.join_hashes(hashes)
        begin, end = layout.layer_slice(*(layers if layers is not None else (0, layout.layers)))
        return ViewPlan(namespace, tuple(hashes), begin, end, lease.lease_id, self._deadline(deadline_ms))

    async def _view_over_shm(self, plan: ViewPlan) -> PageViews:
        await self._transports.negotiate(plan.deadline)
        shm = self.shm
        if shm is None:
            raise InvalidArgument("pages can be viewed in place only on a node of this host that offers shm")
        return await in_thread(lambda: shm.view(plan), plan.transfer)

    async def write(
        self,
        namespace: bytes,
        hashes: Sequence[bytes],
        pages: Sequence[Buffer],
        *,
        deadline_ms: float | None = None,
    ) -> WriteResult:
        """Writes pages, one bytes-like object of the layout's page size for each hash; the verdict on each.

        Writing a page that the node has already is a no-op (ALREADY_PRESENT). Raises a `Retryable` error when the connection is
        lost or the deadline passes; pages that were complete by then stay.
        """
        return await self.run_write(self.plan_write(namespace, hashes, pages, deadline_ms))

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
        """Writes pages on behalf of the clients that wrote them so long ago, at least 1 ms: what nodes do for each other.

        As `write`, but the node evicts nothing for them (NO_SPACE), and refuses what was deleted since (DELETED). `sealed` are the
        `page_checksum`s that the pages had when they were made: one that has changed since is refused (CHECKSUM_MISMATCH).
        """
        assert len(ages_ms) == len(sealed) == len(hashes)
        assert all(age_ms > 0 for age_ms in ages_ms)
        return await self.run_write(self.plan_write(namespace, hashes, pages, deadline_ms, sealed, ages_ms))

    def plan_write(
        self,
        namespace: bytes,
        hashes: Sequence[bytes],
        pages: Sequence[Buffer],
        deadline_ms: float | None,
        sealed: Sequence[int] | None = None,
        ages_ms: Sequence[int] = (),
    ) -> WritePlan:
        """Checks the arguments of `write`; nothing is sent."""
        layout = self._layout(namespace)
        if len(hashes) != len(pages):
            raise InvalidArgument(f"{len(hashes)} hashes and {len(pages)} pages are given; give one page for each hash")
        messages.join_hashes(hashes)
        views = [readable_view(index, page, layout.page_bytes) for index, page in enumerate(pages)]
        return WritePlan(namespace, hashes, views, self._deadline(deadline_ms), sealed, ages_ms)

    async def run_write(self, plan: WritePlan) -> WriteResult:
        """Carries a plan out over the best transport there is."""
        if not plan.hashes:
            return WriteResult((), 0)
        return written(plan, await self._in_namespace(plan.namespace, plan.deadline, lambda: self._write_over_best(plan)))

    async def _write_over_best(self, plan: WritePlan) -> tuple[PageStatus, ...]:
        await self._transports.negotiate(plan.deadline)
        if self.bulk.has_writers:
            verdicts = await in_thread(lambda: self.bulk.write(plan), plan.transfer)
            if verdicts is not None:
                return verdicts
        try:
            return await self._connected().write(plan, plan.deadline.left_ms())
        except Unavailable:
            # gRPC loses a refusal that crosses pages on their way; an empty question in the same namespace meets it again.
            await self._connected().call("Match", messages.MatchRequest(namespace=plan.namespace), plan.deadline.left_ms())
            raise

    async def attend(self, namespace: bytes, *, q_heads: int, scale: float, deadline_ms: float | None = None) -> AttendCall:
        """An attend stream over gRPC: open sets of leased pages on it, then ask what query rows get from them; see `AttendStream`.

        `q_heads` is a multiple of the layout's kv_heads, `scale` the factor on `q . k`; each exchange ends within `deadline_ms`.
        (The blocking client attends over the page channel where the node offers it, with less delay.)
        """
        plan = self.plan_attend(namespace, q_heads, scale, deadline_ms)
        return AttendCall(await self._connected().attend(plan.deadline_ms), plan.shape, plan.deadline_ms)

    def plan_attend(self, namespace: bytes, q_heads: int, scale: float, deadline_ms: float | None) -> AttendPlan:
        """Checks the arguments of `attend`; nothing is sent."""
        layout = self._layout(namespace)
        return AttendPlan(AttendShape(namespace, q_heads, scale), layout, self._deadline_ms(deadline_ms), self._clock)

    async def attend_over_channel(self, plan: AttendPlan) -> ChannelAttend | None:
        """An attend stream over the page channel; None where there is none to be had and gRPC is left."""
        await self._transports.negotiate(Deadline(self._clock, plan.deadline_ms))
        tcp = self._transports.tcp
        if tcp is None or self._options.transport == "grpc":
            return None
        try:
            return await in_thread(lambda: tcp.attend(plan.shape, self._clock, plan.deadline_ms), Transfer())
        except BulkUnavailable:
            return None

    async def delete(
        self, namespace: bytes, hashes: Sequence[bytes], *, tell: bool = False, deadline_ms: float | None = None
    ) -> DeleteResult:
        """Removes pages: OK, MISSING or PINNED (leased or being read) for each.

        With `tell` the node has its cluster's directory tell the members that cannot be reached now.
        """
        request = messages.DeleteRequest(namespace=namespace, hashes=messages.join_hashes(hashes), tell=tell)
        deadline = self._deadline(deadline_ms)
        answer = await self._in_namespace(
            namespace, deadline, lambda: self._connected().call("Delete", request, deadline.left_ms())
        )
        return DeleteResult(messages.statuses_from_wire(answer.statuses, len(hashes)))

    async def stats(self, *, deadline_ms: float | None = None) -> NodeStatistics:
        """The node's counters and occupancy; only the caller's own tenant's namespaces are listed."""
        answer = await self._connected().call("Stats", messages.StatsRequest(), self._deadline_ms(deadline_ms))
        return messages.statistics_from_wire(answer)

    async def watch(self, namespace: bytes, *, deadline_ms: float | None = None) -> AsyncGenerator[PageEvent, None]:
        """Page events of `namespace` from now on: `async for event in await client.watch(namespace)`.

        Returns once the node has begun to watch, so that no later event is missed. Ends with an error when the node drains, the
        connection is lost or `deadline_ms` passes (default: none, once it has begun); close the generator or the client to end
        it.
        """
        request = messages.WatchRequest(namespace=namespace)
        deadline = self._deadline(deadline_ms)

        async def begin() -> AsyncGenerator[Any, None]:
            stream = self._connected().watch(request, None if deadline_ms is None else deadline.left_ms())
            try:
                async with asyncio.timeout(deadline.left_ms() / 1000):
                    await anext(stream)
            except TimeoutError:
                raise DeadlineExceeded("the node did not begin to watch within the deadline") from None
            return stream

        stream = await self._in_namespace(namespace, deadline, begin)

        async def events() -> AsyncGenerator[PageEvent, None]:
            async with contextlib.aclosing(stream):
                async for message in stream:
                    yield messages.event_from_wire(message)

        return events()

    async def _offered(self, deadline_ms: float) -> dict[str, str]:
        return (await self.describe(deadline_ms=deadline_ms)).transports

    async def _ask_channel(self, transport: str, deadline: Deadline) -> tuple[str, bytes]:
        request = messages.OpenChannelRequest(transport=transport)
        answer = await self._connected().call("OpenChannel", request, deadline.left_ms())
        return answer.address, answer.token

    def _connected(self) -> GrpcTransport:
        if self._closed:
            raise ClientClosed("the client is closed")
        if self._transport is None:
            options = self._options
            self._transport = GrpcTransport(options.target, options.token, options.tls_ca, options.http_proxy, options.check)
        return self._transport

    def _layout(self, namespace: bytes) -> PageLayout:
        try:
            return self._layouts[namespace]
        except KeyError:
            raise NamespaceUnknown("this client did not register the namespace: call register_layout first") from None

    def _deadline_ms(self, deadline_ms: float | None) -> float:
        return self._options.deadline_ms if deadline_ms is None else checked_deadline_ms(deadline_ms)

    def _deadline(self, deadline_ms: float | None) -> Deadline:
        return Deadline(self._clock, self._deadline_ms(deadline_ms))

    async def _in_namespace(self, namespace: bytes, deadline: Deadline, call: Callable[[], Awaitable[T]]) -> T:
        """Runs a call, and again if the node was restarted and forgot a namespace of ours, all within one deadline."""
        try:
            return await call()
        except NamespaceUnknown:
            await self.register_layout(namespace, self._layout(namespace), deadline_ms=deadline.left_ms())
            return await call()


def _checked_lease_ms(lease_ms: int) -> int:
    if not 0 <= lease_ms <= LEASE_MS_MAX:
        raise InvalidArgument(f"lease_ms is {lease_ms}; it must be between 0 and {LEASE_MS_MAX}")
    return lease_ms
