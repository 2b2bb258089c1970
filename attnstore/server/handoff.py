"""Handing over pages: after a change of the cluster each node sends its pages to their new owners.

Owns: the background task and its progress. Invariants: a page is kept until its new owner has it and beyond, because only eviction
removes it; a client's call never waits for a hand-over; a failed hand-over is repeated with the next heartbeat. Within one view a
page is offered to a node once: a page that the node refuses or evicts later is not offered again, so that the hand-over ends.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Final, Protocol

from attnstore import tasks
from attnstore.core.hashing import segment_key
from attnstore.core.layout import PageLayout
from attnstore.core.statistics import SpaceStatistics
from attnstore.directory import ClusterView, Member
from attnstore.directory.moves import Moves, is_same_cluster
from attnstore.errors import AttnStoreError
from attnstore.limits import MIB
from attnstore.logs import get_logger
from attnstore.peering import Peering
from attnstore.server.pinned_views import PageView
from attnstore.server.slices import finish_among_calls
from attnstore.server.store import Store
from attnstore.telemetry import NodeMetrics
from attnstore.types import MatchResult, PageStatus, Space, WriteResult

_log = get_logger(__name__)

BATCH_BYTES: Final = 16 * MIB
"""Bytes of pages that are pinned and sent at a time; at least one page is."""
ASK_HASHES: Final = 1_024
"""Hashes per match request to a peer."""
DRAIN_BEATS_MIN: Final = 3
"""A drain ends no sooner than this many heartbeats after its start: by then every client knows of it and writes elsewhere."""
SETTLE_BEATS_MIN: Final = 3
"""For this many heartbeats after a change of the members or of the hot segments, the node looks for pages that clients wrote by the
previous view.
"""
VIEWS_MAX: Final = 8
"""Old views that are kept while the cluster changes faster than it settles; older ones are forgotten."""


class Peer(Protocol):
    """The interface of another node for handing over pages."""

    async def register_layout(self, namespace: bytes, layout: PageLayout) -> int:
        """Registers a namespace."""
        ...

    async def match(self, namespace: bytes, prefixes: Sequence[Sequence[bytes]]) -> MatchResult:
        """Returns which pages it has."""
        ...

    async def hand_over(
        self,
        namespace: bytes,
        hashes: Sequence[bytes],
        pages: Sequence[memoryview],
        *,
        sealed: Sequence[int],
        ages_ms: Sequence[int],
    ) -> WriteResult:
        """Sends pages with the checksums that they must have and the time since clients wrote them."""
        ...

    async def close(self) -> None:
        """Closes the connection."""
        ...


OpenPeer = Callable[[Peering | None, Member, str], Peer]
"""`open_peer(peering, member, tenant)` connects to a node as a tenant.

With a peering, the node must prove that it is a member before anything is sent to it; calls raise `Unavailable` if it does not.
"""


@dataclass(slots=True)
class _Pass:
    """The result of one pass over all pages."""

    sent: int = 0
    refused: int = 0
    failed: int = 0


Offered = dict[str, int]
"""Node id -> count: of the first `count` pages ever stored here, the node was offered those that it should have."""


class Handoff:
    """`peering` authenticates other nodes; it is None in a cluster without a key. `on_drained(left)` is called when the node has
    handed over all pages that it can; `left` pages were refused for lack of space at one of their new owners.

    Belongs to the event loop on which it is started.
    """

    def __init__(
        self,
        node_id: str,
        store: Store,
        open_peer: OpenPeer,
        peering: Peering | None,
        metrics: NodeMetrics,
        on_drained: Callable[[int], None],
    ) -> None:
        self._node_id = node_id
        self._store = store
        self._open_peer = open_peer
        self._peering = peering
        self._metrics = metrics
        self._on_drained = on_drained
        self._view: ClusterView | None = None
        self._unsettled: list[ClusterView] = []
        self._hot_beats: dict[bytes, int] = {}
        self._beats = 0
        self._offered: Offered = {}
        self._left = 0
        self._drained = False
        self._beat = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begins to follow views."""
        self._task = tasks.supervised("handoff", self._run)

    async def stop(self) -> None:
        """Stops, even during a hand-over."""
        if self._task is not None:
            await tasks.end(self._task)

    def follow(self, view: ClusterView) -> None:
        """Takes the view of one heartbeat."""
        self._view = view
        self._beat.set()

    async def _run(self) -> None:
        while True:
            await self._beat.wait()
            self._beat.clear()
            view = self._view
            if view is None or self._node_id not in view.members:
                continue
            if not self._unsettled:
                self._unsettled = [view]  # a node that has just joined has nothing to hand over
            if is_same_cluster(self._unsettled[-1], view):
                self._beats += 1
            else:
                self._unsettled = [*self._unsettled, view][-VIEWS_MAX:]
                self._beats, self._drained = 0, False
                self._offered, self._left = {}, 0
            moves = Moves(self._node_id, self._unsettled, view)
            if not self._drained and (moves.leaves or len(self._unsettled) > 1):
                await self._settle(view, moves)
            await self._copy_hot(view)

    async def _settle(self, view: ClusterView, moves: Moves) -> None:
        """Hands over the pages that are due, and records when no more are to be expected."""
        done = await self._hand_over(view, moves.targets, self._offered)
        self._left += done.refused
        if done.sent or done.failed or done.refused:
            _log.info("pages handed over", sent=done.sent, refused=done.refused, nodes_failed=done.failed, draining=moves.leaves)
        if done.failed:
            return
        if moves.leaves:
            if not done.sent and self._beats >= DRAIN_BEATS_MIN and view.placement.weights:
                self._unsettled, self._drained = [view], True
                self._on_drained(self._left)
        elif self._beats >= SETTLE_BEATS_MIN:
            self._unsettled = [view]

    async def _copy_hot(self, view: ClusterView) -> None:
        """Sends segments that became hot recently, if this node is their first owner, to their other owners."""
        self._hot_beats = {key: self._hot_beats.get(key, 0) for key in view.hot}
        mine = {
            key for key, beats in self._hot_beats.items() if beats < SETTLE_BEATS_MIN and view.owners(key)[:1] == [self._node_id]
        }
        if not mine:
            return
        done = await self._hand_over(view, lambda key: view.owners(key)[1:] if key in mine else [], {})
        if done.sent or done.failed:
            _log.info("hot segments copied", segments=len(mine), sent=done.sent, refused=done.refused, nodes_failed=done.failed)
        if not done.failed:
            self._hot_beats.update({key: self._hot_beats[key] + 1 for key in mine})

    async def _hand_over(self, view: ClusterView, targets_of: Callable[[bytes], list[str]], offered: Offered) -> _Pass:
        """Sends every page to the target nodes of its segment, to all nodes in parallel, one batch at a time to each.

        Skips pages that a node was offered before, and records what it is offered now.
        """
        done = _Pass()
        # Read before the pages are visited: a page sealed meanwhile is offered again.
        stored_pages = self._store.stored_pages
        sorted_out: dict[Space, dict[str, list[bytes]]] = defaultdict(lambda: defaultdict(list))
        targets: dict[bytes, list[str]] = {}
        # Yields often, so that many pages or segments do not block the node's callers.
        for after in {offered.get(node_id, 0) for node_id in view.members}:
            for pages in self._store.spaces.sealed(after):
                for space, page_hash in pages:
                    key = segment_key(page_hash)
                    if key not in targets:
                        targets[key] = targets_of(key)
                        await asyncio.sleep(0)
                    for node_id in targets[key]:
                        if offered.get(node_id, 0) == after:
                            sorted_out[space][node_id].append(page_hash)
                await asyncio.sleep(0)
        failed: set[str] = set()
        for held in await finish_among_calls(self._store.spaces.namespaces()):
            by_target = sorted_out.get(held.space, {})
            calls = [self._send(done, view.members[node_id], held, hashes) for node_id, hashes in by_target.items()]
            for node_id, is_done in zip(by_target, await asyncio.gather(*calls), strict=True):
                if not is_done:
                    failed.add(node_id)
        offered.update(dict.fromkeys(view.members.keys() - failed, stored_pages))
        return done

    async def _send(self, done: _Pass, member: Member, held: SpaceStatistics, hashes: Sequence[bytes]) -> bool:
        """Sends one node the pages that it lacks. Returns False, without raising, if that node failed."""
        try:
            peer = self._open_peer(self._peering, member, held.space.tenant)
            try:
                await self._send_missing(done, peer, held, hashes)
            finally:
                await peer.close()
        except AttnStoreError as error:
            done.failed += 1
            _log.warning("handing over pages failed, will retry", node=member.node_id, url=member.url, reason=str(error))
            return False
        except Exception:  # a failure must not end the transfers to other nodes
            done.failed += 1
            _log.exception("handing over pages failed, will retry", node=member.node_id, url=member.url)
            return False
        return True

    async def _send_missing(self, done: _Pass, peer: Peer, held: SpaceStatistics, hashes: Sequence[bytes]) -> None:
        space = held.space
        await peer.register_layout(space.namespace, held.layout)
        for begin in range(0, len(hashes), ASK_HASHES):
            asked = hashes[begin : begin + ASK_HASHES]
            found = await peer.match(space.namespace, [[page_hash] for page_hash in asked])
            missing = [page_hash for page_hash, hit in zip(asked, found.hits, strict=True) if not hit]
            for batch in _batches(missing, max(1, BATCH_BYTES // held.layout.page_bytes)):
                await self._send_batch(done, peer, space, batch)

    async def _send_batch(self, done: _Pass, peer: Peer, space: Space, hashes: Sequence[bytes]) -> None:
        with ExitStack() as pinned:
            pages: dict[bytes, PageView] = {}
            for page_hash in hashes:
                page = self._store.pin(space, page_hash, None)
                if not isinstance(page, PageStatus):  # it may have been evicted meanwhile
                    pinned.callback(self._store.unpin, page)
                    pages[page_hash] = page
            if not pages:
                return
            views = list(pages.values())
            now_ms = self._store.now_ms()
            written = await peer.hand_over(
                space.namespace,
                list(pages),
                [view.data for view in views],
                # Sent with their sealed checksums, so that the peer refuses a page that has changed since.
                sealed=[view.page.checksum for view in views],
                ages_ms=[1 + int(now_ms - view.page.written_ms) for view in views],
            )
            for view, verdict in zip(views, written.verdicts, strict=True):
                if verdict is PageStatus.CHECKSUM_MISMATCH:
                    await asyncio.to_thread(self._store.is_intact, view)
        for verdict in written.verdicts:
            self._metrics.handed_over.labels(verdict.name.lower()).inc()
        # ARRIVING pages come from another node; corrupt pages and pages deleted there are not wanted.
        done.sent += written.verdicts.count(PageStatus.STORED)
        done.refused += written.verdicts.count(PageStatus.NO_SPACE)


def _batches(hashes: Sequence[bytes], size: int) -> Iterator[Sequence[bytes]]:
    for begin in range(0, len(hashes), size):
        yield hashes[begin : begin + size]
