"""Hedged reads: the second node gets the pages that are late, and only for a bounded share of reads."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from attnstore.client.base import ReadPlan
from attnstore.client.calls import Call, LoopCall
from attnstore.client.cluster.hedges import HedgeBudget
from attnstore.client.cluster.membership import ClusterMembership
from attnstore.client.cluster.node_link import NodeLink
from attnstore.client.cluster.read import ClusterRead
from attnstore.client.options import ClusterOptions
from attnstore.clock import Deadline, MonotonicClock
from attnstore.directory import Member
from attnstore.errors import DeadlineExceeded
from attnstore.limits import HEDGES_BURST_MAX, HEDGES_PERCENT_MAX, SEGMENT_BLOCKS
from attnstore.types import PageStatus
from tests.channels import read_plan
from tests.samples import Batch, make_batch

CLOCK = MonotonicClock()
PAGES = SEGMENT_BLOCKS
LANDED = 40


class Node:
    """A transport to a node that sends the first `lands` pages it is asked for, and hangs before the others."""

    name = "grpc"

    def __init__(self, link: NodeLink, batch: Batch) -> None:
        self.asked: list[list[bytes]] = []
        self.lands = PAGES
        self.runs = False
        self.beside: Node | None = None
        self.was_hedge = False
        self._pages = dict(zip(batch.hashes, batch.pages, strict=True))
        link.connection.layouts.registered(batch.namespace, batch.layout)
        link._registered.add(batch.namespace)
        link.connection.choice.offer([self])

    def read(self, plan: ReadPlan) -> Call[None]:
        return LoopCall(asyncio.get_running_loop(), functools.partial(self._read, plan))

    async def _read(self, plan: ReadPlan) -> None:
        self.asked.append(list(plan.hashes))
        self.was_hedge = self.beside is not None and self.beside.runs
        self.runs = True
        try:
            await self._send(plan)
        finally:
            self.runs = False

    async def _send(self, plan: ReadPlan) -> None:
        for position, page_hash in enumerate(plan.hashes[: self.lands]):
            plan.landing.whole(position)[:] = self._pages[page_hash]
            plan.landing.settle(position, True)
        if len(plan.hashes) > self.lands:
            await asyncio.sleep(plan.deadline.left_ms() / 1000)
            raise DeadlineExceeded("hung")


@asynccontextmanager
async def cluster(batch: Batch) -> AsyncIterator[tuple[ClusterMembership, list[Node]]]:
    """A client's membership of two nodes that both own all segments, the first owner of the batch first."""
    options = ClusterOptions.create(
        "grpc://127.0.0.1:1,127.0.0.1:2?replicas=2", deadline_ms=5_000, token=None, tls_ca=None, transport="grpc", channels=1
    )

    def open_link(member: Member) -> NodeLink:
        link = NodeLink(member, options.node.at(member), CLOCK)
        link._begin_probe = lambda: None  # type: ignore[method-assign]
        link.took(1, 0.001)
        return link

    membership = ClusterMembership(options.open_directory(), CLOCK, open_link)
    view = await membership.ready(Deadline(CLOCK, 5_000))
    yield membership, [Node(membership.links[name], batch) for name in view.owners(batch.hashes[0][1:8])]
    await membership.close()


async def read(membership: ClusterMembership, batch: Batch, hedges: HedgeBudget, deadline_ms: float) -> list[bytearray]:
    buffers = batch.buffers()
    plan = read_plan(batch, buffers, deadline_ms=deadline_ms)
    result = await ClusterRead(membership, plan, batch.layout, (), CLOCK, hedges).run()
    assert set(result.statuses) == {PageStatus.OK}
    assert result.error is None
    return buffers


async def test_only_what_has_not_landed_is_asked_of_the_second_node() -> None:
    batch = make_batch(PAGES, model="hedge")
    async with cluster(batch) as (membership, (first, second)):
        first.lands = LANDED
        assert await read(membership, batch, HedgeBudget(), 30_000) == batch.pages
        assert first.asked == [batch.hashes]
        assert second.asked == [batch.hashes[LANDED:]]


@pytest.mark.parametrize("spent", [0, HEDGES_BURST_MAX])
async def test_without_budget_the_second_node_is_asked_when_the_first_has_had_its_time(spent: int) -> None:
    batch = make_batch(PAGES, model="budget")
    hedges = HedgeBudget()
    assert all(hedges.take() for _ in range(spent))
    async with cluster(batch) as (membership, (first, second)):
        first.lands = LANDED
        second.beside = first
        assert await read(membership, batch, hedges, 1_000) == batch.pages
        assert second.asked == [batch.hashes[LANDED:]]
        assert second.was_hedge == (spent == 0)


@pytest.mark.parametrize("reads", [0, 19, 20, 1000])
def test_hedges_are_a_share_of_the_reads_and_a_bounded_burst(reads: int) -> None:
    budget = HedgeBudget()
    hedged = 0
    for _ in range(HEDGES_BURST_MAX):
        hedged += budget.take()
    assert hedged == HEDGES_BURST_MAX
    for _ in range(reads):
        budget.read()
        hedged += budget.take()
    assert hedged == HEDGES_BURST_MAX + reads * HEDGES_PERCENT_MAX // 100
    for _ in range(10 * 100 * HEDGES_BURST_MAX):
        budget.read()
    assert sum(budget.take() for _ in range(2 * HEDGES_BURST_MAX)) == HEDGES_BURST_MAX
