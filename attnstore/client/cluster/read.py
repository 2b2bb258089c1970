"""Reads pages from the nodes that may hold them.

Owns: one read: which node is asked for which page, in which order, and which answer counts. Invariants: a buffer is written by one
transfer at a time; when `run` ends, however it ends, every transfer has ended.

If a node is late compared with its usual time, another holder is asked too, with memory of its own, and the first complete answer
counts (hedged requests: Dean and Barroso, The Tail at Scale, 2013), within a budget (`hedges`).
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from attnstore.client.async_client import AsyncClient
from attnstore.client.base import ReadPlan
from attnstore.client.calls import Transfer, in_thread
from attnstore.client.cluster.hedges import HedgeBudget
from attnstore.client.cluster.layer_merge import LayerMerge
from attnstore.client.cluster.leases import LeasePart
from attnstore.client.cluster.membership import ClusterMembership, no_node_to_ask
from attnstore.client.cluster.node_link import NodeLink
from attnstore.client.landing import Landing
from attnstore.clock import Clock
from attnstore.core.hashing import segment_key
from attnstore.core.layout import PageLayout
from attnstore.errors import Retryable
from attnstore.types import Lease, PageStatus, ReadResult

HEDGE_MS_MIN: Final = 30.0
HEDGE_FACTOR: Final = 4.0
"""A read is hedged after this many times its expected duration, but not before HEDGE_MS_MIN."""

Group = tuple[str, str | None]
"""The node that is asked, and the alternative if it is late."""


@dataclass(slots=True)
class _Attempt:
    """A request of pages `indices` of the read to one node. `landing` is their destination, once the node is asked.

    Unless the node is the `last` one to be asked, it gets half of the time.
    """

    link: NodeLink
    indices: Sequence[int]
    buffers: Sequence[bytearray | memoryview]
    last: bool
    landing: Landing | None = None

    @property
    def lacking(self) -> list[int]:
        """Returns the positions in `indices` of the pages that have not arrived."""
        return list(range(len(self.indices))) if self.landing is None else self.landing.lacking

    def result(self) -> ReadResult:
        """Returns what has arrived. The attempt must have ended, because until then bytes may land."""
        if self.landing is None:
            return ReadResult((PageStatus.INCOMPLETE,) * len(self.indices), 0)
        return self.landing.result()


class ClusterRead:
    """One read over a cluster. `parts` are those of the lease that covers the pages, if there is one."""

    def __init__(
        self,
        membership: ClusterMembership,
        plan: ReadPlan,
        layout: PageLayout,
        parts: Sequence[LeasePart],
        clock: Clock,
        hedges: HedgeBudget,
    ) -> None:
        hashes = plan.hashes
        self._membership = membership
        self._plan = plan
        self._layout = layout
        self._hashes = hashes
        self._layers = (plan.layer_begin, plan.layer_end)
        self._buffers = plan.landing.views
        self._slice_bytes = plan.landing.slice_bytes
        self._deadline = plan.deadline
        self._clock = clock
        self._hedges = hedges
        self._lease_of = {page_hash: (part.link.member.node_id, part.lease) for part in parts for page_hash in part.hashes}
        self._statuses = [PageStatus.INCOMPLETE] * len(hashes)
        self._asked: dict[int, set[str]] = defaultdict(set)
        self._answered = not hashes
        self._transports: set[str] = set()
        self._failure: Retryable = no_node_to_ask()

    async def run(self) -> ReadResult:
        """Returns the outcome. Raises only for a wrong call."""
        try:
            await self._membership.ready(self._deadline)
            await self._rounds()
        except Retryable as error:
            self._failure = error
        missing = any(status is PageStatus.INCOMPLETE for status in self._statuses)
        bytes_read = self._slice_bytes * sum(status.is_hit for status in self._statuses)
        failure = self._failure if not self._answered or (missing and self._deadline.is_over) else None
        return ReadResult(tuple(self._statuses), bytes_read, failure, ",".join(sorted(self._transports)))

    async def _rounds(self) -> None:
        pending = list(range(len(self._hashes)))
        groups = self._groups(pending)
        merge = None
        if self._plan.on_layer is not None:
            merge = LayerMerge(self._plan.on_layer, self._layers, list(groups.values()), len(self._hashes))
        first = True
        while groups:
            calls = [self._read_group(group, indices, merge if first else None) for group, indices in groups.items()]
            for outcome in await asyncio.gather(*calls, return_exceptions=True):
                if isinstance(outcome, BaseException):
                    raise outcome
            first = False
            pending = [index for index in pending if not self._statuses[index].is_hit]
            self._deadline.left_ms()
            groups = self._groups(pending)
        if merge is not None:
            leading = ReadResult(tuple(self._statuses), 0).leading_hits
            # Not on the event loop, because a callback may block, or call this client.
            await in_thread(lambda: merge.finish(leading), Transfer())

    def _groups(self, pending: Sequence[int]) -> dict[Group, list[int]]:
        """Groups the pages by the nodes to be asked now; pages for which every node was asked are left out."""
        usable = self._membership.usable()
        view = self._membership.view
        holders_of: dict[bytes, list[str]] = {}
        groups: dict[Group, list[int]] = defaultdict(list)
        for index in pending:
            page_hash = self._hashes[index]
            key = segment_key(page_hash)
            if key not in holders_of:
                holders_of[key] = view.holders(key, usable)
            holders = holders_of[key]
            leased = self._lease_of.get(page_hash)
            if leased is not None and leased[0] in usable:
                holders = [leased[0], *(node_id for node_id in holders if node_id != leased[0])]
            left = [node_id for node_id in holders if node_id not in self._asked[index]]
            if left:
                groups[left[0], left[1] if len(left) > 1 else None].append(index)
        return groups

    async def _read_group(self, group: Group, indices: list[int], merge: LayerMerge | None) -> None:
        """Requests pages from a node, and also from the alternative if the node takes long."""
        node_id, alternative = group
        for index in indices:
            self._asked[index].add(node_id)
        links = self._membership.links
        link, other = links.get(node_id), links.get(alternative or "")
        if link is None:  # it left a moment ago
            return
        self._hedges.read()
        first = _Attempt(link, indices, [self._buffers[index] for index in indices], last=other is None)
        hedge_ms = self._hedge_ms(link, len(indices)) if other is not None and merge is None else None
        if other is None or hedge_ms is None:
            await self._ask(first, merge)
            self._take(first)
        else:
            await self._ask_hedged(first, other, hedge_ms)

    async def _ask_hedged(self, first: _Attempt, other: NodeLink, hedge_ms: float) -> None:
        """Asks a node, and later another one for the pages that have not arrived. Ends when the first has returned all, or both
        have ended.
        """
        running = {asyncio.create_task(self._ask(first, None)): first}
        try:
            done, pending = await asyncio.wait(running, timeout=hedge_ms / 1000)
            late = first.lacking
            if pending and late and self._hedges.take():
                indices = [first.indices[position] for position in late]
                hedge = _Attempt(other, indices, [bytearray(self._slice_bytes) for _ in indices], last=True)
                for index in indices:
                    self._asked[index].add(other.member.node_id)
                running[asyncio.create_task(self._ask(hedge, None))] = hedge
                pending = set(running)
            while pending and all(running[task].lacking for task in done):
                done, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
        finally:
            await _ended(set(running))
        for task in running:
            if not task.cancelled():
                task.result()
        self._take(first)
        for hedge in list(running.values())[1:]:
            self._fill(hedge)

    async def _ask(self, attempt: _Attempt, merge: LayerMerge | None) -> None:
        """Asks one node. If it fails, pages stay lacking."""
        began_ms = self._clock.now_ms()
        hashes = [self._hashes[index] for index in attempt.indices]

        async def read(_client: AsyncClient) -> None:
            deadline, namespace = self._deadline.sooner(last=attempt.last), self._plan.namespace
            await attempt.link.register(namespace, self._layout, deadline)
            lease = self._lease_for(attempt.link, hashes)
            on_layer = merge.of_group(attempt.indices[0]) if merge is not None else None
            plan = attempt.link.planning.read(namespace, hashes, attempt.buffers, self._layers, lease, on_layer, deadline.left_ms())
            attempt.landing = plan.landing
            result = await attempt.link.connection.read(plan)
            if result.error is not None:
                raise result.error  # counts against the node

        try:
            await attempt.link.call(read, self._slice_bytes * len(hashes))
        except Retryable as error:
            self._failure = error
            return
        self._answered = True
        attempt.link.took(len(hashes), self._clock.now_ms() - began_ms)

    def _take(self, attempt: _Attempt) -> None:
        """Copies what has arrived into the caller's buffers."""
        result = attempt.result()
        for index, status in zip(attempt.indices, result.statuses, strict=True):
            self._statuses[index] = status
        if result.bytes_read:
            self._transports.add(result.transport)

    def _fill(self, hedge: _Attempt) -> None:
        """Copies the pages that are still lacking from a hedge's memory. No transfer may be writing into the caller's buffers."""
        result = hedge.result()
        for index, status, page in zip(hedge.indices, result.statuses, hedge.buffers, strict=True):
            if status.is_hit and not self._statuses[index].is_hit:
                self._buffers[index][:] = page
                self._statuses[index] = status
                self._transports.add(result.transport)

    def _lease_for(self, link: NodeLink, hashes: Sequence[bytes]) -> Lease | None:
        """Returns the lease to name to a node: only one that covers all the pages there."""
        leases = {self._lease_of.get(page_hash) for page_hash in hashes}
        held = leases.pop() if len(leases) == 1 else None
        return held[1] if held is not None and held[0] == link.member.node_id else None

    def _hedge_ms(self, link: NodeLink, pages: int) -> float | None:
        expected_ms = link.expected_ms(pages)
        return None if expected_ms is None else max(HEDGE_MS_MIN, HEDGE_FACTOR * expected_ms)


async def _ended(tasks: set[asyncio.Task[None]]) -> None:
    """Cancels tasks and waits for their end, because until then they may write into buffers. A cancellation meanwhile takes effect
    afterwards.
    """
    for task in tasks:
        task.cancel()
    interrupted: asyncio.CancelledError | None = None
    while any(not task.done() for task in tasks):
        try:
            await asyncio.wait(tasks)
        except asyncio.CancelledError as error:
            interrupted = error
    for task in tasks:
        if not task.cancelled():
            task.exception()
    if interrupted is not None:
        raise interrupted
