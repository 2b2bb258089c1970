"""The node's side of shared memory: a Unix socket that locates pages, hands out extents and takes pages from lent memory.

Owns: the socket, in a directory that only the node's user can enter, and which connection may have which extent.
Invariants: a peer runs as the node's own user (as reported by the kernel) and presents a one-time token, which determines the
tenant. A connection receives the descriptor of an extent only after it located a page of its tenant there, and only while that
tenant owns the extent.
"""

from __future__ import annotations

import os
import socket
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from attnstore import memory_files
from attnstore.arena import StampedArena
from attnstore.clock import Clock, Deadline
from attnstore.copying import address_of
from attnstore.core.fair_share import FairShares
from attnstore.core.page_table import PinnedPage
from attnstore.errors import AttnStoreError, InvalidArgument, Overloaded, PermissionDenied, Retryable, Unavailable
from attnstore.limits import CHANNEL_BACKLOG_MAX, CHANNEL_HELLO_MS_MAX, CHANNEL_IDLE_MS_MAX, SHM_LENT_NODE_BYTES_MAX
from attnstore.logs import get_logger
from attnstore.server.connections import Connection, ConnectionThreads
from attnstore.server.page_channel import TokenBook
from attnstore.server.store import Store
from attnstore.streams.shm import Message, ShmStream
from attnstore.telemetry import NodeMetrics
from attnstore.types import PageStatus, Space
from attnstore.wire import shm
from attnstore.wire.shm import Kind, Place, State

_PREFIX = "attnstore-shm-"
_SOCKET = "shm"
_LEFT_BEHIND_S = 60.0
"""Younger directories may belong to nodes that are about to listen."""
_HASHES_FIRST = 2
_HASHES_PER_LOCK = 64
"""Look-ups per hold of the store's lock, which bounds how long metadata calls wait."""

_COPIED = (PageStatus.STORED, PageStatus.CHECKSUM_MISMATCH)

_log = get_logger(__name__)


class ShmServer:
    """Serves the shared memory of `arena` from `start` to `stop`, to `tenants` tenants. `epoch` is 16 bytes, new with each start of
    the node.
    """

    def __init__(
        self,
        store: Store,
        arena: StampedArena,
        tokens: TokenBook,
        metrics: NodeMetrics,
        clock: Clock,
        *,
        epoch: bytes,
        stall_ms: int,
        tenants: int = 1,
    ) -> None:
        self._store = store
        self._arena = arena
        self.tokens = tokens
        self._metrics = metrics
        self._clock = clock
        self._stall_ms = stall_ms
        self._welcome = shm.Welcome(epoch, arena.extent_bytes)
        self._draining = threading.Event()
        self._lent = _LentBytes(tenants)
        self._connections = ConnectionThreads("shared-memory", self._connect, clock, tenants)
        self.address = ""

    def start(self) -> None:
        """Binds a socket in a new private directory under `$XDG_RUNTIME_DIR` or the system's temporary directory, and serves.

        A path works across network namespaces of one host if both sides see the directory. Raises `InvalidArgument`.
        """
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            directory = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=os.environ.get("XDG_RUNTIME_DIR") or None))
            _remove_left_behind(directory.parent)
            self.address = str(directory / _SOCKET)
            listener.bind(self.address)
            listener.listen(CHANNEL_BACKLOG_MAX)
        except OSError as error:
            listener.close()
            self._remove()
            raise InvalidArgument(f"no socket for shm can be bound: {error}; set XDG_RUNTIME_DIR, or do not offer shm") from None
        self._connections.start(listener)

    def stop(self, drain_ms: float) -> None:
        """See `ConnectionThreads.stop`. The socket is removed from the file system at once; mapped extents stay readable."""
        self._draining.set()
        self._remove()
        self._connections.stop(drain_ms)

    def _connect(self, peer: socket.socket) -> _Connection:
        return _Connection(
            ShmStream(peer),
            self._store,
            self._arena,
            self.tokens,
            self._metrics,
            self._clock,
            welcome=self._welcome,
            stall_ms=self._stall_ms,
            draining=self._draining,
            lent=self._lent,
        )

    def _remove(self) -> None:
        if self.address:
            path = Path(self.address)
            with suppress(OSError):  # someone else removed it, or put files there
                path.unlink(missing_ok=True)
                path.parent.rmdir()


class _LentBytes:
    """The memory that the peers of each tenant have lent. Safe from any thread."""

    def __init__(self, tenants: int) -> None:
        self._lock = threading.Lock()
        self._shares = FairShares(SHM_LENT_NODE_BYTES_MAX, "bytes of lent memory", "lend less, or write over tcp", tenants=tenants)

    def take(self, tenant: str, size_bytes: int) -> None:
        """Counts lent bytes. Raises `Overloaded` beyond the tenant's share."""
        with self._lock:
            self._shares.take(tenant, size_bytes)

    def give_back(self, tenant: str, size_bytes: int) -> None:
        """Undoes `take` after an unmapping."""
        with self._lock:
            self._shares.give_back(tenant, size_bytes)


class _Connection(Connection):
    """One peer: HELLO, then its requests one after the other."""

    def __init__(
        self,
        stream: ShmStream,
        store: Store,
        arena: StampedArena,
        tokens: TokenBook,
        metrics: NodeMetrics,
        clock: Clock,
        *,
        welcome: shm.Welcome,
        stall_ms: int,
        draining: threading.Event,
        lent: _LentBytes,
    ) -> None:
        super().__init__(stream)
        self._stream = stream
        self._store = store
        self._arena = arena
        self._tokens = tokens
        self._metrics = metrics
        self._clock = clock
        self._welcome = welcome
        self._stall_ms = stall_ms
        self._draining = draining
        self._lent_bytes = lent
        self._lent: memoryview | None = None
        self._told: dict[int, int] = {}  # extent -> its tenancy when a page of our tenant was last located there

    def serve(self, admit: Callable[[str], None]) -> None:
        try:
            self._stream.bound(Deadline(self._clock, min(CHANNEL_HELLO_MS_MAX, self._stall_ms)).left_ms)
            tenant = self._welcomed(admit)
            try:
                self._serve(tenant)
            finally:
                self._return_lent(tenant)
        except Overloaded as error:
            self._refuse(error)
        except Retryable:
            return  # the peer has left, is silent or has stalled
        except AttnStoreError as error:
            self._refuse(error)

    def _serve(self, tenant: str) -> None:
        while not self._draining.is_set():
            self.used_ms = self._clock.now_ms()
            self._stream.bound(Deadline(self._clock, CHANNEL_IDLE_MS_MAX).left_ms)
            request = self._stream.receive(shm.REQUESTS[State.OPEN])
            self._stream.bound(Deadline(self._clock, self._stall_ms).left_ms)
            with self.busy:
                if self.is_ending:
                    request.close()
                    return
                self._answer(request, tenant)

    def _refuse(self, error: AttnStoreError) -> None:
        _log.warning("shared memory connection closed", reason=str(error), code=error.code)
        with suppress(Retryable):
            self._stream.send(shm.encode_refusal(error))

    def _welcomed(self, admit: Callable[[str], None]) -> str:
        hello = self._stream.receive(shm.REQUESTS[State.NEW])
        uid = self._stream.peer_uid()
        if uid != os.geteuid():
            raise PermissionDenied(f"shared memory is for processes of the node's user {os.geteuid()}; this one runs as {uid}")
        if hello.count != shm.VERSION:
            raise InvalidArgument(f"the shared memory protocol's version is {shm.VERSION}; the client speaks {hello.count}")
        tenant = self._tokens.redeem(hello.payload)
        admit(tenant)
        self._stream.send(shm.encode_welcome(self._welcome))
        return tenant

    def _answer(self, request: Message, tenant: str) -> None:
        if request.kind is Kind.MAP:
            self._hand_out(*shm.decode_map(request.payload))
            return
        try:
            if request.kind is Kind.LOCATE:
                self._locate(shm.decode_locate(request.payload), tenant)
                return
            if request.kind is Kind.TAKE:
                answer = shm.encode_taken(self._take(shm.decode_take(request.payload), tenant))
            else:
                answer = self._borrow(request, tenant)
        except AttnStoreError as error:
            # The request is wrong, not the connection.
            answer = shm.encode_refusal(error)
        self._stream.send(answer)

    def _locate(self, asked: shm.LocateRequest, tenant: str) -> None:
        """Answers in parts of growing size: the reader copies the first pages while the next are looked up."""
        if self._draining.is_set():
            raise Unavailable("the node is draining")
        space = Space(tenant, asked.namespace)
        begin, end = self._store.layout_of(space).layer_slice(*asked.layers)
        told, stamp = self._told, self._arena.stamp

        def place(page: PinnedPage) -> Place:
            slot = page.slot
            told[slot.extent] = slot.tenancy
            return Place(slot.extent, slot.tenancy, slot.offset_bytes, slot.size_bytes, stamp(slot), page.guard(begin, end))

        size = _HASHES_FIRST
        answered: list[Place | PageStatus] = []
        while len(answered) < len(asked.hashes):
            hashes = asked.hashes[len(answered) : len(answered) + size]
            places = self._store.locate(space, hashes, asked.lease_id, place)
            self._stream.send(shm.encode_located(places))
            answered += places
            size = min(4 * size, _HASHES_PER_LOCK)
        self._count(answered)

    def _count(self, answered: list[Place | PageStatus]) -> None:
        placed = [place.size_bytes for place in answered if isinstance(place, Place)]
        statuses = Counter(place for place in answered if isinstance(place, PageStatus))
        for status, pages in statuses.items():
            self._metrics.pages("Read", status, pages)
        self._metrics.sent("shm", len(placed), sum(placed))

    def _borrow(self, request: Message, tenant: str) -> bytes:
        assert request.descriptor is not None
        try:
            size_bytes = shm.decode_lend(request.payload)
            self._lent_bytes.take(tenant, size_bytes)
            try:
                lent = memory_files.map_read_only(request.descriptor, 0, size_bytes)
            except BaseException:
                self._lent_bytes.give_back(tenant, size_bytes)
                raise
        finally:
            os.close(request.descriptor)
        self._return_lent(tenant)
        self._lent = lent
        return shm.encode_lent()

    def _return_lent(self, tenant: str) -> None:
        lent, self._lent = self._lent, None
        if lent is not None:
            self._lent_bytes.give_back(tenant, lent.nbytes)

    def _take(self, offered: shm.Taken, tenant: str) -> list[PageStatus]:
        if self._draining.is_set():
            raise Unavailable("the node is draining")
        space = Space(tenant, offered.namespace)
        page_bytes = self._store.layout_of(space).page_bytes
        lent = self._lent
        if lent is None or any(item.offset_bytes + page_bytes > len(lent) for item in offered.items):
            raise InvalidArgument("a page is offered but no memory is lent")
        first = address_of(lent)
        verdicts: list[PageStatus] = []
        for item in offered.items:
            page = self._store.prepare(space, item.hash, item.checksum)
            verdicts.append(page if isinstance(page, PageStatus) else self._store.fill(page, first + item.offset_bytes))
        for verdict, pages in Counter(verdicts).items():
            self._metrics.pages("Write", verdict, pages)
        self._metrics.received("shm", page_bytes * sum(verdict in _COPIED for verdict in verdicts))
        return verdicts

    def _hand_out(self, extent: int, tenancy: int) -> None:
        descriptor = self._arena.descriptor(extent, tenancy) if self._told.get(extent) == tenancy else None
        if descriptor is None:
            self._stream.send(shm.encode_gone())
            return
        try:
            self._stream.send_with_descriptor(shm.encode_mapped(*self._arena.span(extent)), descriptor)
        finally:
            os.close(descriptor)


def _remove_left_behind(parent: Path) -> None:
    """Removes the directories of killed nodes: those whose socket nobody listens on."""
    for directory in parent.glob(f"{_PREFIX}*"):
        path = directory / _SOCKET
        with suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
            if time.time() - directory.stat().st_mtime < _LEFT_BEHIND_S:
                continue
            probe.setblocking(False)
            try:
                probe.connect(str(path))
            except ConnectionRefusedError:
                path.unlink()
                directory.rmdir()
