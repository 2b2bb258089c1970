"""Writes pages to the nodes that own them.

Owns: which pages this client is writing now. Invariant: a stored page is on every owner that could be reached when it was written;
this client never sends a page twice at the same time.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Sequence

from attnstore.client.async_client import AsyncClient
from attnstore.client.base import WritePlan
from attnstore.client.cluster.membership import ClusterMembership, no_node_to_ask
from attnstore.client.cluster.node_link import NodeLink
from attnstore.core.hashing import segment_key
from attnstore.core.layout import PageLayout
from attnstore.directory import ClusterView
from attnstore.errors import Retryable
from attnstore.types import PageStatus, WriteResult


class ClusterWriter:
    """Belongs to one event loop."""

    def __init__(self) -> None:
        self._arriving: set[tuple[bytes, bytes]] = set()

    async def write(self, membership: ClusterMembership, plan: WritePlan, layout: PageLayout) -> WriteResult:
        """See `AsyncClusterClient.write`."""
        view = await membership.ready(plan.deadline)
        mine = {index for index, page_hash in enumerate(plan.hashes) if (plan.namespace, page_hash) not in self._arriving}
        keys = [(plan.namespace, plan.hashes[index]) for index in mine]
        self._arriving.update(keys)
        try:
            write = _Write(membership, view, plan, layout)
            await write.run(mine)
        finally:
            self._arriving.difference_update(keys)
        return write.result(mine)


class _Write:
    def __init__(self, membership: ClusterMembership, view: ClusterView, plan: WritePlan, layout: PageLayout) -> None:
        self._membership = membership
        self._view = view
        self._namespace = plan.namespace
        self._layout = layout
        self._hashes = plan.hashes
        self._pages = plan.pages
        self._deadline = plan.deadline
        self._verdicts: list[dict[str, PageStatus]] = [{} for _ in plan.hashes]
        self._failed: set[str] = set()
        self._failure: Retryable = no_node_to_ask()

    async def run(self, indices: set[int]) -> None:
        """Writes to the owners, and if one fails to the node that is next in line, until there is none or no time."""
        while groups := self._missing(indices):
            calls = [self._write_to(node_id, group) for node_id, group in groups.items()]
            outcomes = await asyncio.gather(*calls, return_exceptions=True)
            for outcome in outcomes:
                if isinstance(outcome, BaseException):
                    raise outcome

    def result(self, mine: set[int]) -> WriteResult:
        """Returns one verdict per page. Raises the error of the last node if no node answered for any page, or none
        could be asked.
        """
        if mine and not any(self._verdicts):
            raise self._failure
        verdicts = tuple(self._verdict(index) if index in mine else PageStatus.ARRIVING for index in range(len(self._hashes)))
        stored = sum(
            len(page) * sum(verdict is PageStatus.STORED for verdict in given.values())
            for page, given in zip(self._pages, self._verdicts, strict=True)
        )
        return WriteResult(verdicts, stored)

    def _missing(self, indices: set[int]) -> dict[str, list[int]]:
        """Returns for each node the pages that it should have and was not given yet."""
        groups: dict[str, list[int]] = defaultdict(list)
        usable = self._membership.usable() - self._failed
        owners: dict[bytes, list[str]] = {}
        for index in sorted(indices):
            key = segment_key(self._hashes[index])
            if key not in owners:
                owners[key] = self._view.owners(key, usable)
            for node_id in owners[key]:
                if node_id not in self._verdicts[index]:
                    groups[node_id].append(index)
        return groups

    def _has_stand_in(self) -> bool:
        """Returns whether another node could be written to if one of the owners failed."""
        usable = self._membership.usable() - self._failed
        return len(usable & self._view.placement.weights.keys()) > self._view.replicas

    async def _write_to(self, node_id: str, indices: Sequence[int]) -> None:
        link: NodeLink | None = self._membership.links.get(node_id)
        if link is None:  # it left a moment ago
            self._failed.add(node_id)
            return

        async def write(client: AsyncClient) -> WriteResult:
            attempt = self._deadline.sooner(last=not self._has_stand_in())
            await link.register(self._namespace, self._layout, attempt)
            return await client.write(
                self._namespace,
                [self._hashes[index] for index in indices],
                [self._pages[index] for index in indices],
                deadline_ms=attempt.left_ms(),
            )

        try:
            written = await link.call(write, self._layout.page_bytes * len(indices))
        except Retryable as error:
            self._failed.add(node_id)
            self._failure = error
            return
        for index, verdict in zip(indices, written.verdicts, strict=True):
            self._verdicts[index][node_id] = verdict

    def _verdict(self, index: int) -> PageStatus:
        given = list(self._verdicts[index].values())
        refused = [verdict for verdict in given if not verdict.is_kept]
        if not given:
            return PageStatus.INCOMPLETE
        if refused:
            return refused[0]
        return PageStatus.STORED if PageStatus.STORED in given else PageStatus.ALREADY_PRESENT
