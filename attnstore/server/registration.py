"""A node's registration in the directory: it sends heartbeats and receives views of the cluster.

Owns: the node's record in the directory and its view of the cluster. Invariants: no caller's request waits for the directory; if
the directory is slow or unreachable, the last view stays in force and heartbeats continue.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable
from contextlib import AsyncExitStack, suppress
from dataclasses import replace

from attnstore import tasks
from attnstore.clock import Clock
from attnstore.directory import ClusterView, Directory, Intent, LayoutRecord, Member, Membership, NodeState, ViewTracker
from attnstore.directory.deletions import Deletion, DeletionFeed
from attnstore.directory.events import EventFeed
from attnstore.errors import ProtocolError, Unavailable
from attnstore.limits import HEARTBEAT_MS, LAYOUT_MS_MAX, MEMBER_MS_MAX
from attnstore.logs import get_logger
from attnstore.telemetry import NodeMetrics

_log = get_logger(__name__)
_LAYOUTS_AGAIN_MS = LAYOUT_MS_MAX // 4


class Registration:
    """Keeps `member` registered in `directory`. `on_view` is called with every view, even an unchanged one, once per answer of the
    directory.

    `layouts` returns the layouts of stored pages, `hot` the most used segments, `feed` the page events, `deletions` the deletions
    made here that others should know; `on_deletion` is called with deletions made elsewhere. Belongs to the event loop on which it
    is started.
    """

    def __init__(
        self,
        directory: Directory,
        member: Member,
        clock: Clock,
        *,
        layouts: Callable[[], Awaitable[Iterable[LayoutRecord]]],
        hot: Callable[[], frozenset[bytes]],
        on_view: Callable[[ClusterView], None],
        feed: EventFeed,
        deletions: DeletionFeed,
        on_deletion: Callable[[Deletion], None],
        metrics: NodeMetrics,
    ) -> None:
        self._directory = directory
        self._member = member
        self._clock = clock
        self._layouts = layouts
        self._hot = hot
        self._on_view = on_view
        self._feed = feed
        self._deletions = deletions
        self._on_deletion = on_deletion
        self._learnt: str | None = None
        self._metrics = metrics
        self._tracker = ViewTracker()
        self._intent: Intent | None = None
        self._answers = True
        self._told: frozenset[LayoutRecord] = frozenset()
        self._told_ms = float("-inf")
        self._task: asyncio.Task[None] | None = None

    @property
    def member(self) -> Member:
        """The node's record as last announced, or to be announced next."""
        return self._member

    def start(self) -> None:
        """Begins to announce the node."""
        self._task = tasks.supervised("heartbeats", self._run)

    async def stop(self) -> None:
        """Leaves the cluster, if the directory answers, and stops."""
        async with AsyncExitStack() as closing:
            closing.push_async_callback(self._directory.close)
            if self._task is not None:
                closing.push_async_callback(self._withdraw)
                closing.push_async_callback(tasks.end, self._task)

    async def _withdraw(self) -> None:
        with suppress(Unavailable):
            await self._directory.withdraw(self._member.node_id)

    def drained(self, left: int) -> None:
        """Records that the node is drained, except for `left` pages that did not fit elsewhere; the next heartbeat announces it."""
        self._member = replace(self._member, state=NodeState.DRAINED, left=left)

    async def beat(self) -> None:
        """Sends one heartbeat. Never raises because of the directory."""
        known = self._tracker.known
        self._member = replace(self._member, hot=self._hot())
        self._metrics.hot_segments.set(len(self._member.hot))
        try:
            membership = await self._directory.announce(self._member, MEMBER_MS_MAX, known)
            forgotten = membership is not None and known is not None and membership.revision.incarnation != known.incarnation
            if forgotten and self._intent is not None:
                # The directory lost its data; the operator's requests to this node must survive that.
                await self._directory.set_intent(self._member.node_id, self._intent)
                self._told = frozenset()
            elif membership is not None:
                self._follow(membership)
            # Before pages are handed over by the new view.
            await self._tell_deletions()
            await self._learn_deletions()
            self._on_view(self._tracker.observe(membership, self._clock.now_ms()))
            await self._tell_layouts()
            await self._tell_events()
        except (Unavailable, ProtocolError) as error:
            if self._answers:
                _log.warning("the directory does not answer, the last view stays in force", reason=str(error))
            self._answers = False
        else:
            if not self._answers:
                _log.info("the directory answers again", directory=self._directory.name)
            self._answers = True
        self._metrics.directory_up.set(self._answers)
        for kind, records in self._directory.skipped.items():
            self._metrics.records_skipped.labels(kind.value).set(records)
        states = Counter(member.state for member in self._tracker.view.members.values())
        for state in NodeState:
            self._metrics.members.labels(state.value).set(states[state])

    def _follow(self, membership: Membership) -> None:
        """Applies what operators requested of this node."""
        self._intent = membership.intents.get(self._member.node_id)
        if self._intent is Intent.DRAIN and self._member.state is NodeState.ACTIVE:
            self._member = replace(self._member, state=NodeState.DRAINING)
        elif self._intent is None and self._member.state is not NodeState.ACTIVE:
            self._member = replace(self._member, state=NodeState.ACTIVE, left=0)

    async def _tell_layouts(self) -> None:
        held = frozenset(await self._layouts())
        now_ms = self._clock.now_ms()
        if held and (held != self._told or now_ms >= self._told_ms + _LAYOUTS_AGAIN_MS):
            await self._directory.put_layouts(sorted(held, key=lambda record: record.namespace))
            self._told, self._told_ms = held, now_ms

    async def _tell_deletions(self) -> None:
        deletions = self._deletions.take()
        if deletions:
            try:
                await self._directory.publish_deletions(self._member.node_id, deletions)
            except Unavailable:
                self._deletions.lost(deletions)
                raise

    async def _learn_deletions(self) -> None:
        deletions, self._learnt = await self._directory.deletions(self._learnt)
        for deletion in deletions:
            self._on_deletion(deletion)

    async def _tell_events(self) -> None:
        batch = self._feed.take()
        if batch is not None:
            try:
                await self._directory.publish(batch)
            except Unavailable:
                self._feed.lost(batch)
                raise

    async def _run(self) -> None:
        while True:
            began_ms = self._clock.now_ms()
            await self.beat()
            await asyncio.sleep(max(0.0, HEARTBEAT_MS - (self._clock.now_ms() - began_ms)) / 1000)
