"""Matches prefixes whose pages are on several nodes.

Owns: which node is asked for which run of a prefix, and the callers that share one answer. Invariants: a page is a hit only if all
pages before it are; a lease that no caller receives is released.
"""

from __future__ import annotations

import asyncio
import itertools
import math
import secrets
from collections import defaultdict
from collections.abc import Sequence
from contextlib import suppress

from attnstore import tasks
from attnstore.client.async_client import AsyncClient
from attnstore.client.base import MatchPlan
from attnstore.client.cluster.flight import Flight, SingleFlight
from attnstore.client.cluster.leases import ClusterLeases, LeasePart
from attnstore.client.cluster.membership import ClusterMembership, no_node_to_ask, raise_wrong_calls
from attnstore.client.cluster.node_link import NodeLink
from attnstore.client.cluster.segments import Run, leading_hits, runs_of
from attnstore.core.layout import PageLayout
from attnstore.directory import ClusterView
from attnstore.errors import AttnStoreError, DeadlineExceeded, Retryable
from attnstore.limits import HOT_REPLICAS, NODE_ANSWER_MS_MAX
from attnstore.types import MatchResult


class ClusterMatcher:
    """Belongs to one event loop. `release_ms` bounds the release of a lease for which nobody waits."""

    def __init__(self, leases: ClusterLeases, release_ms: float) -> None:
        self._leases = leases
        self._release_ms = release_ms
        self._running: SingleFlight[MatchResult] = SingleFlight()
        self._turns = itertools.count(secrets.randbelow(HOT_REPLICAS))

    async def match(self, membership: ClusterMembership, plan: MatchPlan, layout: PageLayout) -> MatchResult:
        """See `AsyncClusterClient.match`. The plan's prefixes are tuples."""
        try:
            async with asyncio.timeout(plan.deadline.left_ms() / 1000):
                # Callers share an answer only if they have about the same time left, because another's answer may arrive too late.
                _, patience = math.frexp(plan.deadline.left_ms())
                return await self._running.run(
                    (plan.namespace, plan.prefixes, plan.lease_ms, patience),
                    lambda flight: self._match(flight, membership, plan, layout),
                )
        except TimeoutError:
            return MatchResult((0,) * len(plan.prefixes), None, DeadlineExceeded("no node answered within the deadline"))

    async def _match(
        self, flight: Flight[MatchResult], membership: ClusterMembership, plan: MatchPlan, layout: PageLayout
    ) -> MatchResult:
        view = await membership.ready(plan.deadline)
        runs = runs_of(plan.prefixes)
        turn = next(self._turns)
        parts: list[LeasePart] = []
        answered = not runs
        failure: Retryable = no_node_to_ask()
        try:
            while asked := _next_round(membership, view, runs, turn):
                rounds = (_ask(link, plan, layout, group, parts, last) for link, group, last in asked)
                outcomes = await asyncio.gather(*rounds, return_exceptions=True)
                raise_wrong_calls(outcomes)
                answered |= None in outcomes
                failure = next((outcome for outcome in outcomes if isinstance(outcome, Retryable)), failure)
        except BaseException:
            self._let_go(parts)
            raise
        hits = leading_hits(len(plan.prefixes), runs)
        if not any(hits):
            self._let_go(parts)
            return MatchResult(hits, None, None if answered else failure)
        return MatchResult(hits, self._leases.grant(parts, flight.callers) if parts else None)

    def _let_go(self, parts: Sequence[LeasePart]) -> None:
        """Releases leases that no caller receives, in the background; they would also expire by themselves."""
        for part in parts:
            tasks.detached("release", self._release_quietly(part))

    async def _release_quietly(self, part: LeasePart) -> None:
        with suppress(AttnStoreError):
            await part.release(self._release_ms)


def _next_round(
    membership: ClusterMembership, view: ClusterView, runs: Sequence[Run], turn: int
) -> list[tuple[NodeLink, list[Run], bool]]:
    """Returns each node to be asked next, its runs with missing pages, and whether no other node is left for them."""
    groups: dict[str, list[Run]] = defaultdict(list)
    others: set[str] = set()
    usable = membership.usable()
    for run in runs:
        if not run.is_complete:
            holders = [node_id for node_id in view.holders(run.key, usable, turn=turn) if node_id not in run.asked]
            if holders:
                groups[holders[0]].append(run)
            if len(holders) > 1:
                others.add(holders[0])
    return [(membership.links[node_id], group, node_id not in others) for node_id, group in groups.items()]


async def _ask(
    link: NodeLink, plan: MatchPlan, layout: PageLayout, runs: Sequence[Run], parts: list[LeasePart], last: bool
) -> None:
    """Asks one node for the missing part of the runs, in its share of the time. Raises if the node does not answer."""
    for run in runs:
        run.asked.add(link.member.node_id)
    rests = [run.rest for run in runs]
    attempt = plan.deadline.sooner(NODE_ANSWER_MS_MAX, last=last)

    async def match(client: AsyncClient) -> MatchResult:
        await link.register(plan.namespace, layout, attempt)
        return await client.match(plan.namespace, rests, lease_ms=plan.lease_ms, deadline_ms=attempt.left_ms())

    found = await link.call(match)
    if found.lease is not None:
        hit = [page_hash for rest, hits in zip(rests, found.hits, strict=True) for page_hash in rest[:hits]]
        parts.append(LeasePart(link, found.lease, frozenset(hit)))
    for run, hits in zip(runs, found.hits, strict=True):
        run.hits += hits
