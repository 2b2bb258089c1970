"""Blocks that stay where they are: the leading pages of sequences, attended to by the store nodes that hold them.

Owns: one attend stream for each node, the sets of pages that sequences have open there, and the leases that keep them.
Invariants: a context covers the first `blocks` blocks of its sequence, each held by exactly one set of one node; any failure of a
node loses every context that has a set there (`RemoteContext.lost`), and never anything else. Only the engine's thread comes here.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import Final

from attnstore.client.transports.attend import AttendStream
from attnstore.clock import Clock
from attnstore.core.hashing import BlockHash, Namespace
from attnstore.core.layout import PageLayout
from attnstore.errors import AttnStoreError, NamespaceUnknown
from attnstore.limits import ATTEND_BYTES_MAX, ATTEND_HASHES_MAX, ATTEND_ROWS_MAX
from attnstore.types import Lease
from attnstore_worker.cache.attending.step import NodeRows, RemoteStep
from attnstore_worker.cache.planning.observation import Observer, Transfer, TransferKind
from attnstore_worker.cache.pool.tier import Tier
from attnstore_worker.cache.store.base import AttendCluster, AttendStore
from attnstore_worker.cache.store.leases import KeptLease, LeaseKeeper
from attnstore_worker.errors import PagesLost

_LOG = logging.getLogger(__name__)

LEASE_MS: Final = 60_000
_RENEW_MS: Final = LEASE_MS / 4
_FLOAT_BYTES: Final = 4


NodesNow = Callable[[], Sequence[AttendStore]]
"""The nodes there are now. May raise any of the store's errors: the last ones stay."""


def nodes_of(store: object) -> NodesNow | None:
    """The store itself where it is a client of one node, the members where it is one of a cluster; None for any other store."""
    if isinstance(store, AttendStore):
        return lambda: (store,)
    return store.nodes if isinstance(store, AttendCluster) else None


@dataclass(frozen=True, slots=True)
class QueryShape:
    """The queries of a model: heads, and the factor on `q . k`."""

    q_heads: int
    scale: float

    def row_bytes(self, layout: PageLayout) -> int:
        """Of one row's questions and answers over all layers: `q`, and `(out, lse)`, in fp32."""
        return _FLOAT_BYTES * layout.layers * self.q_heads * (2 * layout.head_dim + 1)


@dataclass(frozen=True, slots=True)
class Traffic:
    """Since the start: `round_trips` as in `AttendStatistics`, and the payload of both directions."""

    round_trips: int = 0
    bytes: int = 0


@dataclass(frozen=True, slots=True)
class AttendStatistics:
    """Counts since the start. `round_trips`: exchanges that a step waited for, nodes asked at once counting as one; bytes are
    payload, `pages_open` those of the sets that are open now.
    """

    round_trips: int
    rows: int
    bytes_sent: int
    bytes_received: int
    losses: int
    pages_open: int


@dataclass(slots=True, eq=False)
class _Set:
    node: _Node
    stream: AttendStream
    set_id: int
    pages: int
    lease: KeptLease


@dataclass(slots=True, eq=False)
class RemoteContext:
    """The first `blocks` blocks of one sequence, as sets of pages at nodes. `lost`: some node can or will not answer any more."""

    blocks: int
    sets: list[_Set]
    lost: bool = False


class RemoteAttention:
    """`nodes` may hold pages of `namespace`; a query has to be answered within `deadline_ms`. `observer` is told of sets opened."""

    def __init__(
        self,
        nodes: NodesNow,
        namespace: Namespace,
        layout: PageLayout,
        shape: QueryShape,
        *,
        deadline_ms: float,
        clock: Clock,
        observer: Observer,
    ) -> None:
        self._namespace = namespace
        self._layout = layout
        self._nodes_now = nodes
        self._shape = shape
        self._deadline_ms = deadline_ms
        self._clock = clock
        self._observer = observer
        self._nodes: list[_Node] = []
        row_bytes = shape.q_heads * layout.head_dim * _FLOAT_BYTES
        self._rows_max = min(ATTEND_ROWS_MAX, ATTEND_BYTES_MAX // row_bytes)
        self._contexts: set[RemoteContext] = set()
        self.round_trips = 0
        self.rows = 0
        self.bytes_sent = 0
        self.bytes_received = 0
        self._losses = 0

    def open(self, hashes: Sequence[BlockHash]) -> RemoteContext | None:
        """The longest prefix that the nodes hold together, ready to be asked about; None where that is nothing."""
        self._refresh()
        found = [node.match(hashes) for node in self._nodes]
        held = _distribute([present for present, _ in found], len(hashes))
        blocks = sum(map(len, held))
        context = RemoteContext(blocks, [])
        parts = iter(zip(self._nodes, held, found, strict=True))
        try:
            for node, indices, (_, lease) in parts:
                if lease is not None and indices:
                    context.sets += node.open([hashes[index] for index in indices], lease)
                elif lease is not None:
                    node.release(lease)
        except BaseException as error:
            for node, _, (_, lease) in parts:
                if lease is not None:
                    node.release(lease)
            self._lose(context, error)
            if isinstance(error, AttnStoreError):
                return None
            raise
        if not blocks:
            return None
        self._contexts.add(context)
        return context

    def close(self, context: RemoteContext) -> None:
        """The sequence needs these blocks no more."""
        self._contexts.discard(context)
        parts, context.sets = context.sets, []
        with ExitStack() as closing:
            for part in parts:
                closing.callback(part.node.close, part)

    def step(self, parts: Sequence[tuple[RemoteContext | None, int]]) -> RemoteStep | None:
        """What is asked at each layer of a step whose sequences have so many rows each; None where nothing is remote.

        Raises `PagesLost` where a context is lost already.
        """
        if any(context is not None and context.lost for context, _ in parts):
            raise PagesLost("blocks in the store were lost before this step")
        by_node: dict[_Node, list[tuple[int, int, int]]] = {}
        begin = 0
        for context, rows in parts:
            for part in context.sets if context is not None else ():
                by_node.setdefault(part.node, []).append((part.set_id, begin, rows))
            begin += rows
        if not by_node:
            return None
        asked = [NodeRows(node.stream(), sets, self._rows_max) for node, sets in by_node.items()]
        return RemoteStep(asked, self)

    def lose(self, stream: AttendStream, error: AttnStoreError) -> None:
        """A stream failed in a step: every context that has a set on it is lost, and the next `open` begins another stream."""
        _LOG.warning("attention at a store node failed: %s: %s", type(error).__name__, error)
        self._losses += 1
        for node in self._nodes:
            if node.uses(stream):
                node.reset()

    def traffic(self) -> Traffic:
        """What was asked and answered so far."""
        return Traffic(self.round_trips, self.bytes_sent + self.bytes_received)

    def statistics(self) -> AttendStatistics:
        """A snapshot."""
        pages = sum(part.pages for context in self._contexts for part in context.sets)
        return AttendStatistics(self.round_trips, self.rows, self.bytes_sent, self.bytes_received, self._losses, pages)

    def end(self) -> None:
        """Closes every context and stream."""
        with ExitStack() as closing:
            for node in self._nodes:
                closing.callback(node.end)
            for context in list(self._contexts):
                closing.callback(self.close, context)

    def _refresh(self) -> None:
        """Takes up nodes that have come and ends those that have left, whose contexts are lost."""
        try:
            stores = self._nodes_now()
        except AttnStoreError as error:
            _LOG.warning("the nodes of the cluster could not be listed: %s", error)
            return
        known = {id(node.store): node for node in self._nodes}
        self._nodes = [known.pop(id(store)) if id(store) in known else self._new(store) for store in stores]
        with ExitStack() as closing:
            for node in known.values():
                closing.callback(node.end)

    def _new(self, store: AttendStore) -> _Node:
        return _Node(store, self._namespace, self._layout, self._shape, self._deadline_ms, self._forget, self._opening)

    @contextmanager
    def _opening(self, pages: int) -> Iterator[None]:
        started_ms = self._clock.now_ms()
        yield
        ended_ms = self._clock.now_ms()
        self._observer.transferred(Transfer(Tier.REMOTE, TransferKind.ATTEND, started_ms, ended_ms, pages, pages, 0, failed=False))

    def _forget(self, node: _Node) -> None:
        for context in self._contexts:
            context.lost |= any(part.node is node for part in context.sets)

    def _lose(self, context: RemoteContext, error: BaseException) -> None:
        _LOG.warning("a store node does not attend: %s: %s", type(error).__name__, error)
        self._losses += 1
        self.close(context)


class _Node:
    """One store node as a source of attention: `store` is its client."""

    def __init__(
        self,
        store: AttendStore,
        namespace: Namespace,
        layout: PageLayout,
        shape: QueryShape,
        deadline_ms: float,
        on_reset: Callable[[_Node], None],
        opening: Callable[[int], AbstractContextManager[None]],
    ) -> None:
        self.store = store
        self._namespace = namespace
        self._layout = layout
        self._shape = shape
        self._deadline_ms = deadline_ms
        self._on_reset = on_reset
        self._opening = opening
        self._leases = LeaseKeeper(store, period_ms=_RENEW_MS)
        self._stream: AttendStream | None = None
        self._sets_open = 0
        self._registered = False

    def match(self, hashes: Sequence[BlockHash]) -> tuple[set[int], Lease | None]:
        """Which of the pages are there, and a lease on them; nothing where the node fails."""
        try:
            try:
                return self._match(hashes)
            except NamespaceUnknown:  # restarted
                self._registered = False
                return self._match(hashes)
        except AttnStoreError as error:
            _LOG.warning("a store node was not asked for its pages: %s", error)
            return set(), None

    def open(self, hashes: Sequence[BlockHash], lease: Lease) -> list[_Set]:
        """Sets of these pages; the lease is kept from now on, or released."""
        kept = self._leases.keep(lease)
        opened: list[_Set] = []
        try:
            stream = self.stream()  # begun before the first exchange is timed
            for begin in range(0, len(hashes), ATTEND_HASHES_MAX):
                pages = hashes[begin : begin + ATTEND_HASHES_MAX]
                with self._opening(len(pages)):
                    opened.append(_Set(self, stream, stream.open(pages, lease), len(pages), kept))
                    self._sets_open += 1
        except BaseException:
            self._leases.let_go(kept)
            self.reset()
            raise
        return opened

    def close(self, part: _Set) -> None:
        """Lets a set and its lease go, and with the last set the stream: one that is not used takes a place from others."""
        self._leases.let_go(part.lease)
        if part.stream is self._stream:  # not of one that has failed, whose numbers may name others' sets on this one
            self._sets_open -= 1
            try:
                part.stream.close_set(part.set_id)
            except AttnStoreError:
                self._sets_open = 0
            if not self._sets_open:
                self.reset()

    def release(self, lease: Lease) -> None:
        """The lease is of no use."""
        self._leases.let_go(self._leases.keep(lease))

    def stream(self) -> AttendStream:
        """The node's stream, begun if need be."""
        if self._stream is None:
            shape = self._shape
            self._stream = self.store.attend(
                self._namespace, q_heads=shape.q_heads, scale=shape.scale, deadline_ms=self._deadline_ms
            )
        return self._stream

    def uses(self, stream: AttendStream) -> bool:
        """It is this node's."""
        return self._stream is stream

    def reset(self) -> None:
        """Ends the stream, and with it every set that is open on it."""
        stream, self._stream = self._stream, None
        self._sets_open = 0
        if stream is not None:
            try:
                stream.close()
            finally:
                self._on_reset(self)

    def end(self) -> None:
        """Ends everything."""
        try:
            self.reset()
        finally:
            self._leases.close()

    def _match(self, hashes: Sequence[BlockHash]) -> tuple[set[int], Lease | None]:
        if not self._registered:
            self.store.register_layout(self._namespace, self._layout)
            self._registered = True
        found = self.store.match(self._namespace, [[page_hash] for page_hash in hashes], lease_ms=LEASE_MS)
        if found.error is not None:
            raise found.error
        return {index for index, hits in enumerate(found.hits) if hits}, found.lease


def _distribute(present: Sequence[set[int]], pages: int) -> list[list[int]]:
    """Leading pages by node: each goes to the one that has it and was given the fewest; ends at the first that none has."""
    held: list[list[int]] = [[] for _ in present]
    for index in range(pages):
        holders = [indices for indices, there in zip(held, present, strict=True) if index in there]
        if not holders:
            break
        min(holders, key=len).append(index)
    return held
