"""A client's view of its cluster, and the links to its nodes.

Owns: the task that queries the directory, and one `NodeLink` per incarnation of each member. Invariants: only the first call, which
has no view, waits for the directory; if the directory fails, the last view stays in force.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable
from contextlib import AsyncExitStack

from attnstore import tasks
from attnstore.client.cluster.node_link import NodeLink
from attnstore.clock import Clock, Deadline
from attnstore.directory import ClusterView, Directory, Member, ViewTracker
from attnstore.errors import AttnStoreError, DeadlineExceeded, ProtocolError, Retryable, Unavailable
from attnstore.limits import HEARTBEAT_MS
from attnstore.logs import get_logger

_log = get_logger(__name__)


def no_node_to_ask() -> Unavailable:
    """The error of a call for which no usable node is left."""
    return Unavailable("the nodes that this call is for have failed and are left alone until a probe of them succeeds")


def raise_wrong_calls(outcomes: Iterable[object]) -> None:
    """Raises the first error that every node would give, such as `InvalidArgument`. `Retryable` errors of a node are misses."""
    for outcome in outcomes:
        if isinstance(outcome, BaseException) and not isinstance(outcome, Retryable):
            raise outcome


class ClusterMembership:
    """Follows a directory. Belongs to one event loop; `open_link` creates the link to a member."""

    def __init__(self, directory: Directory, clock: Clock, open_link: Callable[[Member], NodeLink]) -> None:
        self._directory = directory
        self._clock = clock
        self._open_link = open_link
        self._tracker = ViewTracker()
        self._links: dict[str, NodeLink] = {}
        self._refused: dict[str, Member] = {}
        self._answers = True
        self._looked = asyncio.Event()
        self._watching: asyncio.Task[None] | None = None
        self._failure: Exception | None = None

    @property
    def links(self) -> dict[str, NodeLink]:
        """Node id -> link, of all members."""
        return self._links

    @property
    def directory(self) -> Directory:
        """The directory that is followed."""
        return self._directory

    @property
    def view(self) -> ClusterView:
        """The latest view."""
        return self._tracker.view

    def usable(self) -> set[str]:
        """The members to which calls are made."""
        return {node_id for node_id, link in self._links.items() if link.is_usable}

    async def ready(self, deadline: Deadline) -> ClusterView:
        """Returns the view, once there is one. Raises `Unavailable` if the directory has never answered, or knows no node."""
        if self._watching is None:
            self._watching = tasks.supervised("membership", self._watch)
        if not self._links:
            try:
                async with asyncio.timeout(deadline.left_ms() / 1000):
                    await self._looked.wait()
            except TimeoutError:
                raise DeadlineExceeded(f"the directory {self._directory.name} has not answered within the deadline") from None
            if not self._links:
                reason = self._failure or f"the directory {self._directory.name} knows no node of this cluster"
                raise Unavailable(str(reason))
        return self._tracker.view

    async def close(self) -> None:
        """Closes the task, the links and the directory's connections."""
        async with AsyncExitStack() as closing:
            closing.push_async_callback(self._directory.close)
            closing.push_async_callback(self._close_links)
            if self._watching is not None:
                closing.push_async_callback(tasks.end, self._watching)

    async def _close_links(self) -> None:
        links, self._links = self._links, {}
        async with AsyncExitStack() as closing:
            for link in links.values():
                closing.push_async_callback(link.close)

    async def _watch(self) -> None:
        while True:
            await self._look()
            self._looked.set()
            await asyncio.sleep(HEARTBEAT_MS / 1000)

    async def _look(self) -> None:
        try:
            membership = await self._directory.membership(self._tracker.known)
        except (Unavailable, ProtocolError) as error:
            if self._answers:
                _log.warning("the directory does not answer, the last view stays in force", reason=str(error))
            self._answers, self._failure = False, error
            return
        if not self._answers:
            _log.info("the directory answers again", directory=self._directory.name)
        self._answers, self._failure = True, None
        for task in self._adopt(self._tracker.observe(membership, self._clock.now_ms())):
            await task

    def _adopt(self, view: ClusterView) -> list[Awaitable[None]]:
        """Opens links to new members and new incarnations, and closes those of removed ones."""
        ended: list[Awaitable[None]] = []
        links: dict[str, NodeLink] = {}
        for node_id, member in view.members.items():
            link = self._links.get(node_id)
            if link is None or (link.member.url, link.member.epoch) != (member.url, member.epoch):
                try:
                    link = self._open_link(member)
                except AttnStoreError as error:  # of one node; the others are followed
                    if self._refused.get(node_id) != member:
                        _log.warning("node left alone: no link to it can be made", node=node_id, reason=str(error))
                    self._refused[node_id] = member
                    continue
            links[node_id] = link
        for node_id, link in self._links.items():
            if links.get(node_id) is not link:
                ended.append(link.close())
        self._links = links
        self._refused = {node_id: member for node_id, member in self._refused.items() if node_id in view.members}
        return ended
