"""One store node, as its clients use it: its transports, and calls that survive its restart.

Owns: the gRPC channel, the bulk transports that the node offers (requested once), and the choice among all of them. Invariants:
`close` closes every opened transport, and none is opened before the node has offered it; if a restarted node forgot a namespace of
ours, it is registered again, once per call; a call ends within its one deadline, whatever it takes to serve it.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, TypeVar

from attnstore.client.base import AttendPlan, AttendStream, MatchPlan, OpenChannel, ReadPlan, Transport, ViewPlan, WritePlan
from attnstore.client.calls import Runner, run_on
from attnstore.client.layouts import Layouts
from attnstore.client.options import ConnectOptions
from attnstore.client.transports.choice import TransportChoice, Verb
from attnstore.client.transports.grpc import GrpcTransport
from attnstore.client.transports.mapped import PageViews
from attnstore.client.transports.rpc import RpcChannel
from attnstore.client.transports.shm import ShmTransport
from attnstore.client.transports.tcp import TcpTransport
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
)
from attnstore.limits import REPORT_MS_MAX, REPORTED_HASHES_MAX
from attnstore.logs import get_logger
from attnstore.types import MatchResult, PageStatus, ReadResult, WriteResult
from attnstore.wire import messages
from attnstore.wire.shm import SHM_FILE_OFFER

T = TypeVar("T")

_log = get_logger(__name__)


class NodeConnection:
    """Belongs to one event loop, except for `layouts`, `choice` and `shm`, which any thread may use. Connects at first use."""

    def __init__(self, options: ConnectOptions, clock: Clock | None = None) -> None:
        self._options = options
        self._negotiating = asyncio.Lock()
        self._grpc: GrpcTransport | None = None
        self._tcp: TcpTransport | None = None
        self._closed = False
        clock = clock or MonotonicClock()
        self.layouts = Layouts(options.deadline_ms, clock)
        self.choice = TransportChoice(options.transport, clock)
        self.shm: ShmTransport | None = None
        """The shared memory of a node on this host, once the node has offered it."""

    async def close(self) -> None:
        """Closes the connection; running calls fail. Closing twice is harmless."""
        self._closed = True
        grpc, tcp, shm = self._grpc, self._tcp, self.shm
        self._grpc = self._tcp = self.shm = None
        async with contextlib.AsyncExitStack() as closing:
            if grpc is not None:
                closing.push_async_callback(grpc.channel.close)
            if shm is not None:
                closing.callback(shm.close)
            if tcp is not None:
                closing.callback(tcp.close)

    @property
    def grpc(self) -> GrpcTransport:
        """The gRPC transport, whose channel is opened at first use. Raises `ClientClosed`."""
        if self._closed:
            raise ClientClosed("the client is closed")
        if self._grpc is None:
            self._grpc = GrpcTransport(RpcChannel(self._options))
        return self._grpc

    async def call(self, name: str, request: Any, deadline_ms: float | None) -> Any:
        """Makes one unary call of the gRPC service. Raises the typed error of its failure."""
        return await self.grpc.channel.call(name, request, self.layouts.deadline_ms(deadline_ms))

    async def register(self, namespace: bytes, layout: PageLayout, deadline_ms: float | None) -> int:
        """See `AsyncClient.register_layout`."""
        request = messages.RegisterLayoutRequest(
            namespace=messages.check_namespace(namespace), layout=messages.layout_to_wire(layout)
        )
        answer = await self.call("RegisterLayout", request, deadline_ms)
        if answer.page_bytes != layout.page_bytes:
            raise ProtocolError(f"the node counts {answer.page_bytes} bytes a page where the layout has {layout.page_bytes}")
        self.layouts.registered(namespace, layout)
        return int(answer.pages_max)

    async def in_namespace(self, namespace: bytes, deadline: Deadline, call: Callable[[], Awaitable[T]]) -> T:
        """Runs a call, and repeats it once if the node was restarted and forgot a namespace of ours, all within one deadline."""
        try:
            return await call()
        except NamespaceUnknown:
            await self.register(namespace, self.layouts.layout(namespace), deadline.left_ms())
            return await call()

    async def match(self, plan: MatchPlan) -> MatchResult:
        """See `AsyncClient.match`. Over gRPC, because a thread for the page channel would cost the event loop more
        than it saves.
        """
        return await self.in_namespace(plan.namespace, plan.deadline, lambda: self.grpc.match(plan))

    async def read(self, plan: ReadPlan) -> ReadResult:
        """See `AsyncClient.read`."""
        if not plan.hashes:
            return plan.landing.result()
        try:
            await self._in_namespace(plan, lambda transport: transport.read(plan))
        except Retryable as error:
            return plan.landing.result(error)
        result = plan.landing.result()
        await self.report(plan, result.statuses)
        return result

    async def write(self, plan: WritePlan) -> WriteResult:
        """See `AsyncClient.write`."""
        if not plan.hashes:
            return plan.result(())
        return await self._in_namespace(plan, lambda transport: transport.write(plan))

    async def view(self, plan: ViewPlan) -> PageViews:
        """See `AsyncClient.view`."""

        async def view() -> PageViews:
            await self.negotiate(plan.deadline)
            if self.shm is None:
                raise InvalidArgument("pages can be viewed in place only on a node of this host that offers shm")
            return await self.shm.view(plan)

        views = await self.in_namespace(plan.namespace, plan.deadline, view)
        await self.report(plan, views.statuses)
        return views

    async def attend(self, plan: AttendPlan, run: Runner) -> AttendStream:
        """Returns an attend stream, for any thread but the event loop's; `run` as in `Transport.attend`."""
        await self.negotiate(Deadline(plan.clock, plan.deadline_ms))
        return await self.choice.run(lambda transport: transport.attend(plan, run))

    async def report(self, plan: ReadPlan | ViewPlan, statuses: Sequence[PageStatus]) -> None:
        """Reports CORRUPT pages, if there are any, to the node, which removes those that are corrupt there. Never raises."""
        corrupt = [page_hash for page_hash, status in zip(plan.hashes, statuses, strict=True) if status is PageStatus.CORRUPT]
        if not corrupt:
            return
        with contextlib.suppress(AttnStoreError):  # the next reader reports them again
            left_ms = plan.deadline.sooner(REPORT_MS_MAX, last=True).left_ms()
            verified = await self.verify(plan.namespace, corrupt[:REPORTED_HASHES_MAX], left_ms)
            gone = sum(status is not PageStatus.OK for status in verified)
            _log.warning("corrupt pages reported", node=self._options.target, pages=len(corrupt), gone=gone)

    async def verify(self, namespace: bytes, hashes: Sequence[bytes], deadline_ms: float | None) -> tuple[PageStatus, ...]:
        """See `AsyncClient.verify`."""
        request = messages.VerifyRequest(namespace=namespace, hashes=messages.join_hashes(hashes))
        answer = await self.call("Verify", request, deadline_ms)
        return messages.statuses_from_wire(answer.statuses, len(hashes))

    async def negotiate(self, deadline: Deadline) -> None:
        """Asks the node once which bulk transports it offers."""
        if self.choice.is_known:
            return
        try:
            # Another call may be asking, with a later deadline than this one's.
            async with asyncio.timeout(deadline.left_ms() / 1000):
                await self._negotiating.acquire()
        except TimeoutError:
            raise DeadlineExceeded("the node did not say in time which transports it offers") from None
        try:
            if not self.choice.is_known:
                bulk = [] if self._options.transport == "grpc" else await self._offered(deadline)
                self.choice.offer([*bulk, self.grpc])
        finally:
            self._negotiating.release()

    async def _in_namespace(self, plan: ReadPlan | WritePlan, verb: Verb[T]) -> T:
        async def over_best() -> T:
            await self.negotiate(plan.deadline)
            return await self.choice.run(verb)

        return await self.in_namespace(plan.namespace, plan.deadline, over_best)

    async def _offered(self, deadline: Deadline) -> list[Transport]:
        answer = await self.call("Describe", messages.DescribeRequest(), deadline.left_ms())
        offered = messages.description_from_wire(answer).transports
        options, opener = self._options, self._opener(asyncio.get_running_loop())
        if "tcp" in offered:
            self._tcp = TcpTransport(options.target.address.host, opener, options.channels)
        offer = SHM_FILE_OFFER if options.shared_path is not None and SHM_FILE_OFFER in offered else "shm"
        if offer in offered and (options.transport == "shm" or ShmTransport.is_reachable(offered[offer])):
            self.shm = ShmTransport(opener, options.channels, offer, options.shared_path)
        return [transport for transport in (self.shm, self._tcp) if transport is not None]

    def _opener(self, loop: asyncio.AbstractEventLoop) -> OpenChannel:
        def open_channel(transport: str, deadline: Deadline) -> tuple[str, bytes]:
            request = messages.OpenChannelRequest(transport=transport)
            try:
                opened = run_on(loop, self.call("OpenChannel", request, deadline.left_ms()))
            except concurrent.futures.CancelledError:
                raise ClientClosed("the client is closed, or its event loop is ending") from None
            return opened.address, opened.token

        return open_channel
