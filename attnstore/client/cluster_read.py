"""Reading pages from the nodes that may hold them.

Owns: one read: which node is asked for which page, in which order, and which answer counts. Invariants: a buffer is written by one
transfer at a time; when `run` ends, however it ends, every transfer has ended.

A read that takes much longer than its node usually needs is asked of another holder as well, into memory of its own, and the first
whole answer counts (hedged requests: Dean and Barroso, The Tail at Scale, 2013).
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Sequence
from typing import Final

from attnstore.client.async_client import AsyncClient
from attnstore.client.bulk import OnLayer, Transfer, in_thread
from attnstore.client.cluster_leases import LeasePart
from attnstore.client.landing import Landing
from attnstore.client.layer_merge import LayerMerge
from attnstore.client.membership import ClusterMembership, no_node_to_ask
from attnstore.client.node_link import NodeLink
from attnstore.clock import Clock, Deadline
from attnstore.core.hashing import segment_key
from attnstore.core.layout import PageLayout
from attnstore.errors import Retryable
from attnstore.types import Lease, PageStatus, ReadResult
from attnstore.wire import messages

HEDGE_MS_MIN: Final = 30.0
HEDGE_FACTOR: Final = 4.0
"""A read is hedged when it has taken this many times what it was expected to take, and no less than HEDGE_MS_MIN."""

Group = tuple[str, str | None]
"""The node that is asked, and the one to turn to if it is late."""


class ClusterRead:
    """One read over a cluster. `parts` are those of the lease that covers the pages, if there is one."""

    def __init__(
        self,
        membership: ClusterMembership,
        namespace: bytes,
        layout: PageLayout,
        hashes: Sequence[bytes],
        buffers: Sequence[bytearray | memoryview],
        layers: tuple[int, int] | None,
        parts: Sequence[LeasePart],
        on_layer: OnLayer | None,
        deadline: Deadline,
        clock: Clock,
    ) -> None:
        messages.join_hashes(hashes)
        self._layers = layers if layers is not None else (0, layout.layers)
        begin, end = layout.layer_slice(*self._layers)
        self._slice_bytes = end - begin
        Landing(len(hashes), buffers, self._slice_bytes)  # raises what is wrong with the buffers before anything is sent
        self._membership = membership
        self._namespace = namespace
        self._layout = layout
        self._hashes = hashes
        self._buffers = buffers
        self._on_layer = on_layer
        self._deadline = deadline
        self._clock = clock
        self._lease_of = {page_hash: (part.link.member.node_id, part.lease) for part in parts for page_hash in part.hashes}
        self._statuses = [PageStatus.INCOMPLETE] * len(hashes)
        self._asked: dict[int, set[str]] = defaultdict(set)
        self._answered = not hashes
        self._transports: set[str] = set()
        self._failure: Retryable = no_node_to_ask()

    async def run(self) -> ReadResult:
        """The outcome. Raises only for a call that is wrong."""
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
        if self._on_layer is not None:
            merge = LayerMerge(self._on_layer, self._layers, list(groups.values()), len(self._hashes))
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
            # Not on the event loop: a callback may block, or call this client.
            await in_thread(lambda: merge.finish(leading), Transfer())

    def _groups(self, pending: Sequence[int]) -> dict[Group, list[int]]:
        """The pages by the nodes that are to be asked now; pages that everyone was asked for are left out."""
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
        """Asks a node for pages, and the alternative as well if that takes long."""
        node_id, alternative = group
        for index in indices:
            self._asked[index].add(node_id)
        links = self._membership.links
        link, other = links.get(node_id), links.get(alternative or "")
        if link is None:  # it left a moment ago
            return
        buffers = [self._buffers[index] for index in indices]
        hedge_ms = self._hedge_ms(link, len(indices)) if other is not None and merge is None else None
        if other is None or hedge_ms is None:
            self._take(indices, await self._ask(link, indices, buffers, merge, last=other is None))
            return
        running = {asyncio.create_task(self._ask(link, indices, buffers, None, last=False))}
        try:
            done, _ = await asyncio.wait(running, timeout=hedge_ms / 1000)
            if done:
                self._take(indices, done.pop().result())
                return
            await self._hedge(other, indices, running)
        finally:
            await _ended(running)

    async def _hedge(self, other: NodeLink, indices: list[int], running: set[asyncio.Task[ReadResult]]) -> None:
        """Waits for the first whole answer of the two, or for both; pages that the first one did not bring come from the second."""
        (first,) = running
        scratch = [bytearray(self._slice_bytes) for _ in indices]
        second = asyncio.create_task(self._ask(other, indices, scratch, None, last=True))
        running.add(second)
        for index in indices:
            self._asked[index].add(other.member.node_id)
        pending = set(running)
        while pending and not any(_is_whole(task) for task in running - pending):
            _, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
        await _ended(pending)
        if not first.cancelled():
            self._take(indices, first.result())
        if not second.cancelled():
            self._fill(indices, second.result(), scratch)

    def _fill(self, indices: Sequence[int], result: ReadResult, pages: Sequence[bytearray]) -> None:
        """Takes the pages that are not there yet. Nobody may be writing into the caller's buffers any more."""
        for index, status, page in zip(indices, result.statuses, pages, strict=True):
            if status.is_hit and not self._statuses[index].is_hit:
                memoryview(self._buffers[index]).cast("B")[:] = page
                self._statuses[index] = status
                self._transports.add(result.transport)

    async def _ask(
        self,
        link: NodeLink,
        indices: Sequence[int],
        buffers: Sequence[bytearray | memoryview],
        merge: LayerMerge | None,
        *,
        last: bool,
    ) -> ReadResult:
        """One node's answer; a node that fails has sent nothing. Unless it is the `last` to be asked it gets half the time."""
        began_ms = self._clock.now_ms()
        hashes = [self._hashes[index] for index in indices]
        results: list[ReadResult] = []

        async def read(client: AsyncClient) -> None:
            attempt = self._deadline.sooner(last=last)
            await link.register(self._namespace, self._layout, attempt)
            result = await client.read(
                self._namespace,
                hashes,
                buffers,
                layers=self._layers,
                lease=self._lease_for(link, hashes),
                on_layer=merge.of_group(indices[0]) if merge is not None else None,
                deadline_ms=attempt.left_ms(),
            )
            results.append(result)
            if result.error is not None:
                raise result.error  # counts against the node

        try:
            await link.call(read, self._slice_bytes * len(indices))
        except Retryable as error:
            self._failure = error
            return results[0] if results else ReadResult((PageStatus.INCOMPLETE,) * len(indices), 0, error)
        self._answered = True
        link.took(len(indices), self._clock.now_ms() - began_ms)
        return results[0]

    def _take(self, indices: Sequence[int], result: ReadResult) -> None:
        for index, status in zip(indices, result.statuses, strict=True):
            self._statuses[index] = status
        if result.bytes_read:
            self._transports.add(result.transport)

    def _lease_for(self, link: NodeLink, hashes: Sequence[bytes]) -> Lease | None:
        """The lease to name to a node: only one that covers all the pages there."""
        leases = {self._lease_of.get(page_hash) for page_hash in hashes}
        held = leases.pop() if len(leases) == 1 else None
        return held[1] if held is not None and held[0] == link.member.node_id else None

    def _hedge_ms(self, link: NodeLink, pages: int) -> float | None:
        expected_ms = link.expected_ms(pages)
        return None if expected_ms is None else max(HEDGE_MS_MIN, HEDGE_FACTOR * expected_ms)


def _is_whole(task: asyncio.Task[ReadResult]) -> bool:
    return not task.cancelled() and task.exception() is None and all(status.is_hit for status in task.result().statuses)


async def _ended(tasks: set[asyncio.Task[ReadResult]]) -> None:
    """Cancels tasks and waits for their end: until then they may write into buffers. A cancellation meanwhile comes afterwards."""
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
