"""Deletion of pages from all nodes of a cluster.

Owns: the nodes that are asked, and merging their answers. Invariant: every member is asked, holder or not: a page may be in transit
to any of them, and a node that has deleted a page refuses to be handed it again. Nodes that do not answer are named to the caller;
another node publishes the deletion in the directory for them.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from attnstore.client.async_client import AsyncClient
from attnstore.client.cluster.membership import ClusterMembership, no_node_to_ask, raise_wrong_calls
from attnstore.client.cluster.node_link import NodeLink
from attnstore.clock import Deadline
from attnstore.core.layout import PageLayout
from attnstore.errors import Retryable
from attnstore.types import DeleteResult, PageStatus


async def delete_everywhere(
    membership: ClusterMembership, namespace: bytes, layout: PageLayout, hashes: Sequence[bytes], deadline: Deadline
) -> DeleteResult:
    """See `AsyncClusterClient.delete`."""
    view = await membership.ready(deadline)

    async def delete_on(link: NodeLink, tell: bool) -> DeleteResult:
        async def call(client: AsyncClient) -> DeleteResult:
            await link.register(namespace, layout, deadline)
            return await client.delete(namespace, hashes, tell=tell, deadline_ms=deadline.left_ms())

        return await link.call(call)

    links = dict(membership.links)
    usable = sorted(links.keys() & membership.usable())
    teller = usable[0] if usable else None
    calls = [delete_on(link, node_id == teller) for node_id, link in links.items()]
    outcomes = dict(zip(links, await asyncio.gather(*calls, return_exceptions=True), strict=True))
    raise_wrong_calls(outcomes.values())
    answers = {node_id: outcome for node_id, outcome in outcomes.items() if isinstance(outcome, DeleteResult)}
    if not answers:
        failures = [outcome for outcome in outcomes.values() if isinstance(outcome, Retryable)]
        raise failures[0] if failures else no_node_to_ask()
    if teller not in answers:
        await delete_on(links[next(iter(answers))], True)
    unreached = (outcomes.keys() - answers.keys()) & view.members.keys()
    return DeleteResult(map(_joint, zip(*answers.values(), strict=True)), tuple(sorted(unreached)))


def _joint(statuses: Sequence[PageStatus]) -> PageStatus:
    """Returns PINNED if any node cannot, else OK if any had the page, else MISSING."""
    return next((status for status in (PageStatus.PINNED, PageStatus.OK) if status in statuses), PageStatus.MISSING)
