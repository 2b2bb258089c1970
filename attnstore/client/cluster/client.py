"""The client of a cluster: the calls of `AsyncClient` over many nodes.

Owns: the choice of nodes for each call, and merging their answers. Invariants: a call ends within its one deadline; a node that
fails costs misses, never a wrong page and never the answers of other nodes; only the first call waits for the directory.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from types import TracebackType
from typing import Self, TypeVar

from attnstore.client.async_client import AsyncClient
from attnstore.client.base import AttendPlan, OnLayer
from attnstore.client.cluster.attend import AttendNode, cluster_holders
from attnstore.client.cluster.delete import delete_everywhere
from attnstore.client.cluster.hedges import HedgeBudget
from attnstore.client.cluster.leases import ClusterLeases, LeasePart
from attnstore.client.cluster.match import ClusterMatcher
from attnstore.client.cluster.membership import ClusterMembership, raise_wrong_calls
from attnstore.client.cluster.node_link import NodeLink
from attnstore.client.cluster.read import ClusterRead
from attnstore.client.cluster.totals import joint_description, joint_statistics
from attnstore.client.cluster.write import ClusterWriter
from attnstore.client.layouts import Layouts
from attnstore.client.options import ClusterOptions
from attnstore.client.planning import Planning
from attnstore.client.transports.mapped import PageViews
from attnstore.clock import Clock, Deadline, MonotonicClock
from attnstore.core.layout import PageLayout
from attnstore.directory import Member
from attnstore.directory.events import events_in
from attnstore.errors import (
    ClientClosed,
    InvalidArgument,
    LeaseExpired,
    Unavailable,
)
from attnstore.limits import HASHES_MAX, HEARTBEAT_MS, NODE_ANSWER_MS_MAX
from attnstore.statistics import NodeStatistics
from attnstore.types import (
    DeleteResult,
    Lease,
    MatchResult,
    NodeDescription,
    PageEvent,
    PageStatus,
    ReadResult,
    Space,
    WriteResult,
)
from attnstore.wire import messages
from attnstore.wire.chunks import Buffer

T = TypeVar("T")


class AsyncClusterClient:
    """A client of a cluster, for one event loop; created by `attnstore.aio.connect`.

    Methods, arguments and errors are those of `AsyncClient`, with two differences. `describe` and `stats` are sums over the nodes
    that answer. Pages of nodes that do not answer are misses: only if no node answered, or none could be asked, do `match` and
    `read` have an `error` and does `write` raise.
    """

    def __init__(self, options: ClusterOptions, clock: Clock | None = None) -> None:
        self._options = options
        self._clock = clock or MonotonicClock()
        self._layouts = Layouts(options.node.deadline_ms, self._clock)
        self._planning = Planning(self._layouts, layered_pages_max=HASHES_MAX)
        self._leases = ClusterLeases(self._clock)
        self._matcher = ClusterMatcher(self._leases, options.node.deadline_ms)
        self._writer = ClusterWriter()
        self._hedges = HedgeBudget()
        self._membership: ClusterMembership | None = None
        self._closed = False

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Closes all connections; running calls fail. Closing twice is harmless."""
        self._closed = True
        membership, self._membership = self._membership, None
        if membership is not None:
            await membership.close()

    async def members(self, *, deadline_ms: float | None = None) -> tuple[Member, ...]:
        """Returns the nodes of the cluster, as this client sees it."""
        view = await self._followed().ready(self._layouts.deadline(deadline_ms))
        return tuple(view.members.values())

    async def describe(self, *, deadline_ms: float | None = None) -> NodeDescription:
        """Returns the descriptions of the nodes that answer, merged; limits are the lowest of any node."""
        answers = await self._everywhere(lambda client, left_ms: client.describe(deadline_ms=left_ms), deadline_ms)
        return joint_description(answers)

    async def stats(self, *, deadline_ms: float | None = None) -> NodeStatistics:
        """Returns the sums of the counters of the nodes that answer; `uptime_ms` is that of the youngest."""
        answers = await self._everywhere(lambda client, left_ms: client.stats(deadline_ms=left_ms), deadline_ms)
        return joint_statistics(answers)

    async def register_layout(self, namespace: bytes, layout: PageLayout, *, deadline_ms: float | None = None) -> int:
        """Registers `namespace` with every node. Returns how many of its pages the nodes that answer could hold together."""
        messages.check_namespace(namespace)
        deadline = self._layouts.deadline(deadline_ms)
        answers = await self._everywhere(
            lambda client, left_ms: client.register_layout(namespace, layout, deadline_ms=left_ms), deadline.left_ms()
        )
        self._layouts.registered(namespace, layout)
        return sum(answers)

    async def match(
        self, namespace: bytes, prefixes: Sequence[Sequence[bytes]], *, lease_ms: int = 0, deadline_ms: float | None = None
    ) -> MatchResult:
        """See `AsyncClient.match`. Concurrent callers with equal requests share one answer, and one lease."""
        plan = self._planning.match(namespace, tuple(map(tuple, prefixes)), lease_ms, deadline_ms)
        messages.join_hashes(page_hash for prefix in plan.prefixes for page_hash in prefix)
        return await self._matcher.match(self._followed(), plan, self._layouts.layout(namespace))

    async def lease(
        self, namespace: bytes, hashes: Sequence[bytes], lease_ms: int, *, deadline_ms: float | None = None
    ) -> tuple[int, Lease | None]:
        """Leases the leading pages of one prefix. Returns their number and the lease, which is None if the first page is missing.

        Raises the error that `MatchResult.error` would describe.
        """
        found = await self.match(namespace, [hashes], lease_ms=lease_ms, deadline_ms=deadline_ms)
        if found.error is not None:
            raise found.error
        return found.hits[0], found.lease

    async def renew(self, lease: Lease, lease_ms: int, *, deadline_ms: float | None = None) -> Lease:
        """Extends a lease on all its nodes. Raises `LeaseExpired` if it has expired on any of them: match again."""
        parts = self._leases.parts(lease)
        soon = self._layouts.deadline(deadline_ms).sooner(NODE_ANSWER_MS_MAX, last=True)
        calls = (part.renew(lease_ms, soon.left_ms()) for part in parts)
        outcomes = await asyncio.gather(*calls, return_exceptions=True)
        raise_wrong_calls(outcomes)
        renewed = [outcome.lease_ms for outcome in outcomes if isinstance(outcome, Lease)]
        if len(renewed) < len(parts):
            raise LeaseExpired("a node that holds pages of the lease does not answer, or let it expire: match again")
        return self._leases.renewed(lease, min(renewed))

    async def release(self, lease: Lease, *, deadline_ms: float | None = None) -> bool:
        """Ends a lease. Returns False if it had already expired on any of its nodes, or if other callers that share it still hold
        it.
        """
        parts = self._leases.release(lease)
        soon = self._layouts.deadline(deadline_ms).sooner(NODE_ANSWER_MS_MAX, last=True)
        calls = (part.release(soon.left_ms()) for part in parts)
        outcomes = await asyncio.gather(*calls, return_exceptions=True)
        raise_wrong_calls(outcomes)
        return bool(parts) and all(outcome is True for outcome in outcomes)

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
        """See `AsyncClient.read`. Pages that a node does not have, or does not send, are requested from the next
        possible holder.
        """
        membership = self._followed()
        parts: tuple[LeasePart, ...] = ()
        if lease is not None:
            try:
                parts = self._leases.parts(lease)
            except LeaseExpired:
                return ReadResult((PageStatus.LEASE_EXPIRED,) * len(hashes), 0)
        plan = self._planning.read(namespace, hashes, buffers, layers, None, on_layer, deadline_ms)
        return await ClusterRead(membership, plan, self._layouts.layout(namespace), parts, self._clock, self._hedges).run()

    async def view(
        self,
        namespace: bytes,
        hashes: Sequence[bytes],
        *,
        lease: Lease,
        layers: tuple[int, int] | None = None,
        deadline_ms: float | None = None,
    ) -> PageViews:
        """See `AsyncClient.view`; for pages on one node. Raises `InvalidArgument` if they are on several."""
        for part in self._leases.parts(lease):
            if part.hashes.issuperset(hashes):
                left_ms = self._layouts.deadline(deadline_ms).left_ms()
                return await part.view(namespace, hashes, layers, left_ms)
        raise InvalidArgument("pages can be viewed in place only where one node holds them all under the lease")

    async def write(
        self, namespace: bytes, hashes: Sequence[bytes], pages: Sequence[Buffer], *, deadline_ms: float | None = None
    ) -> WriteResult:
        """See `AsyncClient.write`. STORED: all reachable owners have the page. ARRIVING: this client is already writing it, or
        another node is handing it over to an owner.
        """
        plan = self._planning.write(namespace, hashes, pages, deadline_ms)
        return await self._writer.write(self._followed(), plan, self._layouts.layout(namespace))

    def _plan_attend(self, namespace: bytes, q_heads: int, scale: float, deadline_ms: float | None, value_dim: int) -> AttendPlan:
        """Checks the arguments of `ClusterClient.attention`; nothing is sent."""
        return self._planning.attend(namespace, q_heads, scale, deadline_ms, value_dim)

    async def _attend_holders(self, hashes: Sequence[bytes], deadline: Deadline) -> dict[AttendNode, list[int]]:
        """Returns the nodes to ask for each attended page; see `attend.Holders`."""
        return await cluster_holders(self._followed(), hashes, deadline)

    async def delete(self, namespace: bytes, hashes: Sequence[bytes], *, deadline_ms: float | None = None) -> DeleteResult:
        """Removes pages from all nodes: PINNED if any node cannot, else OK if any had the page, else MISSING.

        `DeleteResult.unreached` names the nodes that did not answer. Raises only if no node answered.
        """
        messages.join_hashes(hashes)
        layout = self._layouts.layout(namespace)
        return await delete_everywhere(self._followed(), namespace, layout, hashes, self._layouts.deadline(deadline_ms))

    async def watch(self, namespace: bytes, *, deadline_ms: float | None = None) -> AsyncGenerator[PageEvent, None]:
        """Watches the page events of all nodes, through the directory: in order for each node, about a heartbeat late.

        Returns once no later event can be missed. The generator ends with `Unavailable` when the directory fails. Raises
        `InvalidArgument` for a fixed list of nodes, which has no directory: watch each node. Also raises what `describe` raises,
        because the nodes know the caller's tenant.
        """
        if self._options.nodes:
            raise InvalidArgument("a fixed list of nodes has no directory to watch: watch each node")
        self._layouts.layout(namespace)
        deadline = None if deadline_ms is None else self._layouts.deadline(deadline_ms)
        directory = self._followed().directory
        described = await self.describe(deadline_ms=None if deadline is None else deadline.left_ms())
        space = Space(described.tenant, namespace)
        _, position = await directory.events(None, 1)

        async def events() -> AsyncGenerator[PageEvent, None]:
            after = position
            while deadline is None or deadline.left_ms():
                batches, after = await directory.events(after, HEARTBEAT_MS)
                for batch in batches:
                    for event in events_in(batch, space):
                        yield event

        return events()

    async def _everywhere(self, call: Callable[[AsyncClient, float], Awaitable[T]], deadline_ms: float | None) -> list[T]:
        """Returns the answers of all nodes that answer. Raises the error of one node if none does."""
        deadline = self._layouts.deadline(deadline_ms)
        membership = self._followed()
        await membership.ready(deadline)
        calls = (link.call(lambda client: call(client, deadline.left_ms())) for link in membership.links.values() if link.is_usable)
        outcomes = await asyncio.gather(*calls, return_exceptions=True)
        raise_wrong_calls(outcomes)
        answers = [outcome for outcome in outcomes if not isinstance(outcome, BaseException)]
        if not answers:
            _raise_any(outcomes)
            raise Unavailable("no node of the cluster answers")
        return answers

    def _followed(self) -> ClusterMembership:
        if self._closed:
            raise ClientClosed("the client is closed")
        if self._membership is None:
            self._membership = ClusterMembership(self._options.open_directory(), self._clock, self._open_link)
        return self._membership

    def _open_link(self, member: Member) -> NodeLink:
        options = self._options.node.at(member, self._followed().directory.check_of(member))
        return NodeLink(member, options, self._clock)


def _raise_any(outcomes: Sequence[object]) -> None:
    for outcome in outcomes:
        if isinstance(outcome, BaseException):
            raise outcome
