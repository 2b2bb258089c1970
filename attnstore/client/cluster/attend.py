"""Attention by the nodes that hold the pages: which node is asked about which page, and the handling of a lost node.

Owns: `StoreAttention`: one attend stream per node that is asked, the open sets on it, and the leases that keep their pages.
Invariants: each page of an `AttendedPrefix` is in exactly one set of one node; only nodes that may hold a page are asked for it; a
stream that ends loses every prefix with a set on it, and no other. It is part of the client, because the client owns placement: a
cluster's client asks the holders of each segment, a node's client asks its node, and both offer the same verb.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Final, Protocol, Self, TypeVar

from attnstore import tasks
from attnstore.client.async_client import AsyncClient
from attnstore.client.base import AttendPlan, AttendStream
from attnstore.client.calls import Runner
from attnstore.client.cluster.division import distribute
from attnstore.client.cluster.membership import ClusterMembership
from attnstore.client.transports.connection import NodeConnection
from attnstore.clock import Deadline
from attnstore.core.hashing import segment_key
from attnstore.core.layout import PageLayout
from attnstore.errors import AttnStoreError, ClientClosed, LeaseExpired
from attnstore.limits import ATTEND_HASHES_MAX, LEASE_MS_MAX, NODE_ANSWER_MS_MAX
from attnstore.logs import get_logger
from attnstore.types import Lease, MatchResult

R = TypeVar("R")
T = TypeVar("T")

LEASE_MS: Final = 60_000
_RENEW_MS: Final = LEASE_MS / 4

assert LEASE_MS <= LEASE_MS_MAX, "a node grants the leases of attended pages"

_log = get_logger(__name__)


class AttendNode(Protocol):
    """A node that may hold pages. Belongs to the event loop. Used as a key of mappings: one object per node."""

    async def call(self, call: Callable[[AsyncClient], Awaitable[T]], /) -> T:
        """Makes a call to the node."""
        ...

    async def register(self, namespace: bytes, layout: PageLayout, deadline: Deadline, /) -> None:
        """Registers the namespace with the node, unless it is registered."""
        ...

    async def attend(self, plan: AttendPlan, run: Runner, /) -> AttendStream:
        """Returns a stream to the node, over the best transport that it offers. `run` as in `Transport.attend`."""
        ...


class OnlyNode:
    """The node of a client that has only one."""

    def __init__(self, client: AsyncClient, connection: NodeConnection) -> None:
        self._client = client
        self.attend = connection.attend

    async def call(self, call: Callable[[AsyncClient], Awaitable[T]], /) -> T:
        """See `AttendNode.call`."""
        return await call(self._client)

    async def register(self, namespace: bytes, layout: PageLayout, deadline: Deadline, /) -> None:
        """No-op: the client has registered the namespace, and registers it again after a restart of the node."""


Holders = Callable[[Sequence[bytes], Deadline], Awaitable[Mapping[AttendNode, Sequence[int]]]]
"""`holders(hashes, deadline)` returns the nodes that may hold any of the pages, and for each node the indices of those pages."""


class Loop(Protocol):
    """The event loop that a client's connections belong to, as seen from other threads."""

    def run(self, coroutine: Coroutine[Any, Any, R], /) -> R:
        """Runs a coroutine to its end."""
        ...

    def submit(self, coroutine: Coroutine[Any, Any, object], /) -> None:
        """Schedules a coroutine without waiting for it."""
        ...


@dataclass(frozen=True, slots=True, eq=False)
class _KeptLease:
    node: AttendNode
    lease: Lease


@dataclass(frozen=True, slots=True, eq=False)
class AttendedSet:
    """Pages of a prefix in one set at one node: send queries for `set_id` on `stream`. `indices` are the pages' places in the
    prefix, ascending, as `attnstore.core.windows.first_keys` takes them.
    """

    stream: AttendStream
    set_id: int
    indices: Sequence[int]
    kept: _KeptLease

    @property
    def pages(self) -> int:
        """The number of pages."""
        return len(self.indices)


@dataclass(frozen=True, slots=True, eq=False)
class AttendedPrefix:
    """The first `blocks` pages of a sequence, in one set per node with a share of them.

    `opened_ms` is the time to open the sets: one exchange, with all nodes at once.
    """

    blocks: int
    sets: tuple[AttendedSet, ...]
    opened_ms: float

    @property
    def lost(self) -> bool:
        """True if a node with a set cannot or will not answer any more."""
        return any(each.stream.closed for each in self.sets)


@dataclass(frozen=True, slots=True, eq=False)
class _Share:
    """The share of a prefix that one node holds."""

    stream: AttendStream
    indices: Sequence[int]
    hashes: Sequence[bytes]
    kept: _KeptLease


class StoreAttention:
    """Attention over pages that stay in the store. Created by a client's `attention`; ends with the client.

    `open` prefixes, send queries on the streams of their sets (`AttendStream.ask` to all of them, then `receive`), and merge the
    partials: `attnstore.attention.merge`. After an error of a stream, close that stream: the prefixes with a set on it are `lost`.
    Used by one thread at a time.
    """

    def __init__(self, plan: AttendPlan, holders: Holders, loop: Loop) -> None:
        self._plan = plan
        self._holders = holders
        self._loop = loop
        self._streams: dict[AttendNode, AttendStream] = {}
        self._prefixes: set[AttendedPrefix] = set()
        self._kept: set[_KeptLease] = set()  # used on the event loop
        self._renewal: asyncio.TimerHandle | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.close()

    def open(self, hashes: Sequence[bytes]) -> AttendedPrefix | None:
        """Opens the longest prefix whose pages the nodes hold together, at most `ATTEND_HASHES_MAX` pages. Returns None if there is
        none.

        A node that does not answer counts as holding nothing. Raises as `AttendStream.open` if a node does not open its set; the
        other prefixes on that node are lost then.
        """
        shares = self._loop.run(self._place(hashes[:ATTEND_HASHES_MAX]))
        if not shares:
            return None
        began_ms = self._plan.clock.now_ms()
        sets, error = self._open_sets(shares)
        prefix = AttendedPrefix(sum(each.pages for each in sets), tuple(sets), self._plan.clock.now_ms() - began_ms)
        self._prefixes.add(prefix)
        if error is not None:
            opened = {each.kept for each in sets}
            self._let_go(share.kept for share in shares if share.kept not in opened)
            self.close_prefix(prefix)
            raise error
        return prefix

    def close_prefix(self, prefix: AttendedPrefix) -> None:
        """Closes the sets of a prefix and releases their leases. Closes a stream without sets, because it takes a place at its
        node.
        """
        self._prefixes.discard(prefix)
        self._let_go(each.kept for each in prefix.sets)
        in_use = {each.stream for other in self._prefixes for each in other.sets}
        with ExitStack() as closing:
            for each in prefix.sets:
                if each.stream not in in_use:
                    closing.callback(each.stream.close)
                elif not each.stream.closed:
                    closing.callback(_close_set, each)

    def close(self) -> None:
        """Closes every prefix and stream."""
        with ExitStack() as closing:
            for stream in self._streams.values():
                closing.callback(stream.close)
            for prefix in list(self._prefixes):
                closing.callback(self.close_prefix, prefix)

    def _open_sets(self, shares: Sequence[_Share]) -> tuple[list[AttendedSet], AttnStoreError | None]:
        """Opens one set at each node, all at once. Returns the opened sets, and the first error."""
        sets: list[AttendedSet] = []
        error: AttnStoreError | None = None
        sent: list[tuple[_Share, int]] = []
        try:
            for share in shares:
                try:
                    sent.append((share, share.stream.send_open(share.hashes, share.kept.lease)))
                except AttnStoreError as refusal:
                    share.stream.close()
                    error = error or refusal
            for share, set_id in sent:
                try:
                    share.stream.receive_opened(set_id)
                    sets.append(AttendedSet(share.stream, set_id, share.indices, share.kept))
                except AttnStoreError as refusal:
                    share.stream.close()
                    error = error or refusal
        except BaseException:  # an interrupt: answers in flight will not be received
            self._let_go(share.kept for share in shares)
            for share in shares:
                share.stream.close()
            raise
        return sets, error

    async def _place(self, hashes: Sequence[bytes]) -> list[_Share]:
        """Leases the longest prefix that the holders of the pages have, each page at one of them."""
        deadline = Deadline(self._plan.clock, self._plan.deadline_ms)
        asked = await self._holders(hashes, deadline)
        leased: dict[AttendNode, _KeptLease] = {}
        try:
            matches = [self._match(node, hashes, indices, deadline, leased, len(asked) > 1) for node, indices in asked.items()]
            used = await self._divide(tuple(asked), await asyncio.gather(*matches), len(hashes))
        except BaseException:
            self._let_go(leased.values())
            raise
        self._let_go(kept for node, kept in leased.items() if node not in used)
        self._keep(leased[node] for node in used)
        return [
            _Share(stream, indices, [hashes[index] for index in indices], leased[node]) for node, (stream, indices) in used.items()
        ]

    async def _divide(
        self, nodes: Sequence[AttendNode], present: Sequence[set[int]], pages: int
    ) -> dict[AttendNode, tuple[AttendStream, list[int]]]:
        """Divides the pages among the nodes that have them and open a stream. `present` as in `distribute`. Raises the error of a
        node if no node with pages opens one.
        """
        failure: AttnStoreError | None = None
        while True:
            held = distribute(present, pages)
            used = {node: indices for node, indices in zip(nodes, held, strict=True) if indices}
            if not used and failure is not None:
                raise failure
            opened = await asyncio.gather(*map(self._stream, used), return_exceptions=True)
            streams: dict[AttendNode, AttendStream] = {}
            for node, stream in zip(used, opened, strict=True):
                if isinstance(stream, AttnStoreError):
                    failure = stream
                    _log.warning("a node does not attend", reason=str(stream))
                elif isinstance(stream, BaseException):
                    raise stream
                else:
                    streams[node] = stream
            if len(streams) == len(used):
                return {node: (streams[node], indices) for node, indices in used.items()}
            failed = used.keys() - streams.keys()
            present = [set() if node in failed else there for node, there in zip(nodes, present, strict=True)]

    async def _match(
        self,
        node: AttendNode,
        hashes: Sequence[bytes],
        indices: Sequence[int],
        deadline: Deadline,
        leased: dict[AttendNode, _KeptLease],
        one_of_many: bool,
    ) -> set[int]:
        """Returns which of these pages the node has, leased; none if it does not answer."""
        namespace = self._plan.shape.namespace
        attempt = deadline.sooner(NODE_ANSWER_MS_MAX, last=True) if one_of_many else deadline

        async def match(client: AsyncClient) -> MatchResult:
            await node.register(namespace, self._plan.layout, attempt)
            prefixes = [[hashes[index]] for index in indices]
            return await client.match(namespace, prefixes, lease_ms=LEASE_MS, deadline_ms=attempt.left_ms())

        try:
            found = await node.call(match)
        except AttnStoreError as error:
            _log.warning("a node does not say which pages it holds", reason=str(error))
            return set()
        if found.lease is None:
            return set()
        leased[node] = _KeptLease(node, found.lease)
        return {index for index, hits in zip(indices, found.hits, strict=True) if hits}

    async def _stream(self, node: AttendNode) -> AttendStream:
        stream = self._streams.get(node)
        if stream is None or stream.closed:
            stream = await node.attend(self._plan, self._loop.run)
            self._streams = {other: each for other, each in self._streams.items() if not each.closed}
            self._streams[node] = stream
        return stream

    def _let_go(self, leases: Iterable[_KeptLease]) -> None:
        """Releases leases, without waiting for the nodes."""
        for kept in leases:
            self._loop.submit(self._release(kept))

    async def _release(self, kept: _KeptLease) -> None:
        self._kept.discard(kept)
        with suppress(AttnStoreError):  # the lease expires by itself
            await kept.node.call(lambda client: client.release(kept.lease, deadline_ms=self._plan.deadline_ms))

    def _keep(self, leases: Iterable[_KeptLease]) -> None:
        """Renews leases until `_let_go`."""
        self._kept.update(leases)
        if self._renewal is None and self._kept:
            self._renewal = asyncio.get_running_loop().call_later(_RENEW_MS / 1e3, self._renew_all)

    def _renew_all(self) -> None:
        self._renewal = None
        for kept in self._kept:
            tasks.detached("renewal of an attended lease", self._renew(kept))
        self._keep(())

    async def _renew(self, kept: _KeptLease) -> None:
        try:
            await kept.node.call(lambda client: client.renew(kept.lease, LEASE_MS, deadline_ms=self._plan.deadline_ms))
        except (LeaseExpired, ClientClosed):
            self._kept.discard(kept)  # the next query to the node says so
        except AttnStoreError as error:
            _log.warning("the lease of attended pages could not be renewed", reason=str(error))


async def cluster_holders(
    membership: ClusterMembership, hashes: Sequence[bytes], deadline: Deadline
) -> dict[AttendNode, list[int]]:
    """See `Holders`: the owners of each page's segment, its replicas, and its owners before the last changes of membership."""
    view = await membership.ready(deadline)
    usable = membership.usable()
    links = membership.links
    nodes: dict[bytes, list[AttendNode]] = {}
    held: dict[AttendNode, list[int]] = defaultdict(list)
    for index, page_hash in enumerate(hashes):
        key = segment_key(page_hash)
        if key not in nodes:
            nodes[key] = [links[node_id] for node_id in view.holders(key, usable)]
        for link in nodes[key]:
            held[link].append(index)
    return held


def _close_set(part: AttendedSet) -> None:
    try:
        part.stream.close_set(part.set_id)
    except AttnStoreError:
        part.stream.close()
