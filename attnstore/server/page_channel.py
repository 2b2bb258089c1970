"""The node's side of the page channel: the requests of a connection, and the tokens that open it.

Owns: the answers, and the one-time tokens of all bulk transports. Each connection has a thread of its own (`ConnectionThreads`),
because its work is system calls that release the interpreter lock: pages move on as many cores as there are connections while the
event loop answers metadata calls.
Invariants: a connection is opened only by an unused, recent token issued over gRPC; a thread pins at most the pages of one READ,
and only while its peer reads at least `PEER_BYTES_PER_S_MIN`, averaged over `stall_ms`; a prepared slot is sealed or aborted
however a connection ends.
"""

from __future__ import annotations

import secrets
import socket
import threading
from collections.abc import Callable
from contextlib import ExitStack, suppress

from attnstore.address import Address
from attnstore.clock import Clock, Deadline
from attnstore.core.fair_share import FairShares
from attnstore.core.hashing import LAYER_CHECKSUM_BYTES
from attnstore.errors import AttnStoreError, DeadlineExceeded, InvalidArgument, Overloaded, Retryable, Unauthenticated, Unavailable
from attnstore.limits import (
    CHANNEL_BACKLOG_MAX,
    CHANNEL_CREDITS,
    CHANNEL_GATHER_PAGES,
    CHANNEL_HELLO_MS_MAX,
    CHANNEL_IDLE_MS_MAX,
    CHANNEL_LAYER_PINS_MS_MAX,
    CHANNEL_MATCH_HASHES_MAX,
    CHANNEL_READ_HASHES_MAX,
    CHANNEL_TOKEN_BYTES,
    CHANNEL_TOKEN_MS_MAX,
    CHANNEL_TOKENS_MAX,
    MIB,
    PAGE_BYTES_MAX,
)
from attnstore.logs import get_logger
from attnstore.server.attend import Attending
from attnstore.server.attend_channel import AttendChannel
from attnstore.server.connections import Connection, ConnectionThreads
from attnstore.server.pinned_views import PageView
from attnstore.server.store import Store
from attnstore.streams.frames import FrameStream
from attnstore.telemetry import NodeMetrics
from attnstore.types import PageStatus, Space
from attnstore.wire.frame_receiver import Role
from attnstore.wire.match import decode_prefixes, encode_hits
from attnstore.wire.messages import split_hashes
from attnstore.wire.page_channel import NO_LEASE, VERSION, Frame, Kind, Order, encode_frame, encode_refusal, encode_slice

_PINNED_TOGETHER = 8
"""Pages of a READ that are looked up at a time. Each is sent by itself: the reader copies one while the next is looked up."""
_VERDICTS_MAX = CHANNEL_CREDITS // 4
"""Verdicts that are sent together while pages arrive without a pause."""

_log = get_logger(__name__)


class TokenBook:
    """One-time tokens: each opens one connection for the tenant to which it was issued, within a few seconds.

    The `tenants` tenants of the node share the number of unused tokens.
    """

    def __init__(self, clock: Clock, tenants: int = 1) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._tokens: dict[bytes, tuple[str, float]] = {}  # token -> tenant, expiry; oldest first
        self._shares = FairShares(
            CHANNEL_TOKENS_MAX, "channel tokens that wait to be used", "try again in a few seconds", tenants=tenants
        )

    def issue(self, tenant: str) -> bytes:
        """Returns a new token. Raises `Overloaded` if the tenant has too many unused tokens."""
        with self._lock:
            now_ms = self._clock.now_ms()
            for token in [token for token, (_, expiry_ms) in self._tokens.items() if expiry_ms <= now_ms]:
                self._take_out(token)
            self._shares.take(tenant)
            token = secrets.token_bytes(CHANNEL_TOKEN_BYTES)
            self._tokens[token] = (tenant, now_ms + CHANNEL_TOKEN_MS_MAX)
            return token

    def redeem(self, token: bytes) -> str:
        """Returns the token's tenant and makes the token void. Raises `Unauthenticated`."""
        with self._lock:
            # A dictionary look-up by a secret of 256 bits leaks nothing through timing.
            tenant, expiry_ms = self._take_out(token) if token in self._tokens else ("", 0.0)
            if expiry_ms <= self._clock.now_ms():
                raise Unauthenticated("the channel token is unknown, used or too old: ask for another with OpenChannel")
            return tenant

    def _take_out(self, token: bytes) -> tuple[str, float]:
        tenant, expiry_ms = self._tokens.pop(token)
        self._shares.give_back(tenant)
        return tenant, expiry_ms


class PageChannelServer:
    """Serves the page channel on an address (port 0: a free port, see `port`) from `start` to `stop`, to `tenants` tenants."""

    def __init__(
        self,
        store: Store,
        tokens: TokenBook,
        metrics: NodeMetrics,
        *,
        stall_ms: int,
        attending: Attending | None = None,
        tenants: int = 1,
    ) -> None:
        self._store = store
        self._tokens = tokens
        self._metrics = metrics
        self._stall_ms = stall_ms
        self._attending = attending
        self._draining = threading.Event()
        self._connections = ConnectionThreads("page-channel", self._connect, store, tenants)
        self.port = 0

    def start(self, address: Address) -> None:
        """Binds and serves. Raises `InvalidArgument` if the address cannot be bound."""
        try:
            listeners = address.listen(CHANNEL_BACKLOG_MAX)
        except OSError as error:
            raise InvalidArgument(
                f"--page-channel-port {address.port} on {address.host} cannot be bound: {error.strerror}"
            ) from None
        self.port = listeners[0].getsockname()[1]
        self._connections.start(*listeners)

    def stop(self, drain_ms: float) -> None:
        """See `ConnectionThreads.stop`; a connection accepts no new request from now on."""
        self._draining.set()
        self._connections.stop(drain_ms)

    def _connect(self, peer: socket.socket) -> _Connection:
        stream = FrameStream(peer, Role.NODE)
        attend = AttendChannel(stream, self._attending, self._metrics)
        return _Connection(stream, self._store, self._tokens, self._metrics, self._stall_ms, self._draining, attend)


class _Connection(Connection):
    """One peer: HELLO, then its requests one after the other."""

    def __init__(
        self,
        stream: FrameStream,
        store: Store,
        tokens: TokenBook,
        metrics: NodeMetrics,
        stall_ms: int,
        draining: threading.Event,
        attend: AttendChannel,
    ) -> None:
        super().__init__(stream)
        self._stream = stream
        self._store = store
        self._tokens = tokens
        self._metrics = metrics
        self._stall_ms = stall_ms
        self._draining = draining
        self._attend = attend
        self._answers: dict[Kind, Callable[[Frame, str], None]] = {
            Kind.READ: self._read,
            Kind.WRITE: self._write,
            Kind.MATCH: self._match,
            **attend.answers,
        }
        self._scratch = memoryview(bytearray(MIB))
        self._space = Space("", b"")
        self._verdicts: list[bytes] = []

    @property
    def keeps_state(self) -> bool:
        return self._attend.has_sets

    def serve(self, admit: Callable[[str], None]) -> None:
        try:
            self._stream.bound(Deadline(self._store, min(CHANNEL_HELLO_MS_MAX, self._stall_ms)).left_ms)
            tenant = self._welcome(admit)
            self._stream.demand(self._stall_ms)
            while not self._draining.is_set():
                self.used_ms = self._store.now_ms()
                frame = self._next_request()
                with self.busy:
                    if self.is_ending:
                        return
                    self._answer(frame, tenant)
            self._send_verdicts()
        except DeadlineExceeded:
            # Stalled. A reset discards what the kernel still buffers, and reaches the peer even if neither TCP window is open.
            self._stream.abort()
        except Overloaded as error:
            self._refuse(error)
        except Retryable:
            return  # the peer has left, or the node drains; its pins and slots are already released, as above
        except AttnStoreError as error:
            self._refuse(error)
        finally:
            self._attend.close()

    def _refuse(self, error: AttnStoreError) -> None:
        _log.warning("page channel closed", reason=str(error), code=error.code)
        with suppress(Retryable):
            self._stream.send(encode_refusal(0, error))

    def _welcome(self, admit: Callable[[str], None]) -> str:
        hello = self._stream.receive()
        token = self._stream.whole_payload(hello)
        if hello.page != VERSION:
            raise InvalidArgument(f"the page channel's version is {VERSION}; the client speaks {hello.page}")
        tenant = self._tokens.redeem(bytes(token))
        admit(tenant)
        welcome = Frame(Kind.WELCOME, page=CHANNEL_READ_HASHES_MAX, request=CHANNEL_CREDITS, offset_bytes=CHANNEL_MATCH_HASHES_MAX)
        self._stream.send(encode_frame(welcome))
        return tenant

    def _next_request(self) -> Frame:
        frame = self._stream.look() if self._verdicts else None
        if frame is None:
            self._send_verdicts()
            self._stream.bound(Deadline(self._store, CHANNEL_IDLE_MS_MAX).left_ms)
            frame = self._stream.receive()
            self._stream.bound(lambda: self._stall_ms)
        return frame

    def _send_verdicts(self) -> None:
        verdicts, self._verdicts = self._verdicts, []
        if verdicts:
            self._stream.send(b"".join(verdicts))

    def _answer(self, frame: Frame, tenant: str) -> None:
        try:
            if frame.kind is not Kind.WRITE:
                self._send_verdicts()
            if self._draining.is_set():
                raise Unavailable("the node is draining")
            self._answers[frame.kind](frame, tenant)
        except (Unavailable, DeadlineExceeded):
            raise
        except AttnStoreError as error:
            # The request is wrong, not the connection: its payload is read to the end, so the next request starts at a frame
            # boundary.
            if frame.size_bytes and not self._stream.at_boundary:
                self._stream.discard_payload(self._scratch)
            self._send_verdicts()
            self._stream.send(encode_refusal(frame.request, error))

    def _space_of(self, frame: Frame, tenant: str) -> Space:
        """Returns the previous space if it is the same: a writer names it with every page."""
        space = self._space
        if space.namespace != frame.namespace:
            space = self._space = Space(tenant, frame.namespace)
        return space

    def _match(self, frame: Frame, tenant: str) -> None:
        payload = self._stream.whole_payload(frame)
        with self._metrics.call("Match"):
            prefixes = decode_prefixes(frame.page, payload)
            found = self._store.leases.match(self._space_of(frame, tenant), prefixes, frame.offset_bytes)
            self._metrics.matched(found.hits, prefixes)
        hits = encode_hits(found.hits)
        lease = found.lease_id or NO_LEASE
        answer = Frame(Kind.MATCHED, request=frame.request, size_bytes=len(hits), lease=lease, offset_bytes=found.lease_ms)
        self._stream.send(encode_frame(answer), hits)

    def _read(self, frame: Frame, tenant: str) -> None:
        hashes = split_hashes(bytes(self._stream.whole_payload(frame)))
        space = self._space_of(frame, tenant)
        layout = self._store.layout_of(space)
        begin, end = layout.layer_slice(frame.layer_begin, frame.layer_end)
        if frame.order is Order.LAYERS:
            self._read_by_layer(frame, space, hashes, begin, end, layout.layer_bytes)
            return
        for first in range(0, len(hashes), _PINNED_TOGETHER):
            with self._store.reading_all(space, hashes[first : first + _PINNED_TOGETHER], frame.lease_id) as pages:
                self._send_pages(frame.request, first, pages, begin, end)

    def _send_pages(self, request: int, first: int, pages: list[PageView | PageStatus], begin: int, end: int) -> None:
        size_bytes, sent = end - begin, 0
        try:
            for index, page in enumerate(pages, first):
                if isinstance(page, PageStatus):
                    self._send_miss(request, index, page)
                else:
                    data, checksum = page.slice(begin, end)
                    self._stream.send(encode_slice(request, index, size_bytes, 0, checksum), data)
                    sent += 1
        finally:
            self._metrics.sent("tcp", sent, sent * size_bytes)

    def _read_by_layer(self, frame: Frame, space: Space, hashes: list[bytes], begin: int, end: int, layer_bytes: int) -> None:
        kept_until_ms = self._store.now_ms() + CHANNEL_LAYER_PINS_MS_MAX
        with ExitStack() as held:
            pages: list[tuple[int, PageView]] = []
            found = held.enter_context(self._store.reading_all(space, hashes, frame.lease_id))
            for index, page in enumerate(found):
                if isinstance(page, PageStatus):
                    self._send_miss(frame.request, index, page)
                else:
                    pages.append((index, page))
            together = max(1, min(CHANNEL_GATHER_PAGES, PAGE_BYTES_MAX // layer_bytes))
            for at in range(begin, end, layer_bytes):
                for first in range(0, len(pages), together):
                    gathered = pages[first : first + together]
                    if self._store.now_ms() < kept_until_ms:
                        self._send_layer(frame.request, gathered, at, layer_bytes, at - begin)
                    else:
                        held.close()
                        self._send_layer_anew(frame, space, hashes, [index for index, _ in gathered], at, layer_bytes, at - begin)
            self._metrics.sent("tcp", len(pages), 0)

    def _send_layer(self, request: int, pages: list[tuple[int, PageView]], at: int, layer_bytes: int, offset_bytes: int) -> None:
        sealed_at = LAYER_CHECKSUM_BYTES * (at // layer_bytes)
        sealed = b"".join([page.page.layers[sealed_at : sealed_at + LAYER_CHECKSUM_BYTES] for _, page in pages])
        parts = [page.data[at : at + layer_bytes] for _, page in pages]
        size_bytes = len(parts) * layer_bytes
        self._stream.send(encode_slice(request, pages[0][0], len(sealed) + size_bytes, offset_bytes, 0), sealed, *parts)
        self._metrics.sent("tcp", 0, size_bytes)

    def _send_layer_anew(
        self, frame: Frame, space: Space, hashes: list[bytes], indices: list[int], at: int, layer_bytes: int, offset_bytes: int
    ) -> None:
        """Pins only the pages of one frame while it is sent, because the reader was too slow for keeping all its pages pinned."""
        with self._store.reading_all(space, [hashes[index] for index in indices], frame.lease_id) as found:
            pages = [(index, page) for index, page in zip(indices, found, strict=True) if isinstance(page, PageView)]
            if len(pages) < len(indices):
                raise DeadlineExceeded("a page was evicted, or its lease expired, before its slow reader had read all layers")
            self._send_layer(frame.request, pages, at, layer_bytes, offset_bytes)

    def _send_miss(self, request: int, index: int, status: PageStatus) -> None:
        self._stream.send(encode_frame(Frame(Kind.SLICE, request=request, page=index, status=status)))
        self._metrics.pages("Read", status)

    def _write(self, frame: Frame, tenant: str) -> None:
        space = self._space_of(frame, tenant)
        verdict = PageStatus.WRONG_SIZE
        if frame.size_bytes == self._store.layout_of(space).page_bytes:
            verdict = self._receive_page(frame, space)
        elif frame.size_bytes:
            self._stream.discard_payload(self._scratch)
        self._metrics.pages("Write", verdict)
        self._verdicts.append(encode_frame(Frame(Kind.VERDICT, request=frame.request, page=frame.page, status=verdict)))
        if len(self._verdicts) == _VERDICTS_MAX:
            self._send_verdicts()

    def _receive_page(self, frame: Frame, space: Space) -> PageStatus:
        page = self._store.prepare(space, frame.hash, frame.checksum, frame.offset_bytes)
        if isinstance(page, PageStatus):
            self._stream.discard_payload(self._scratch)
            self._metrics.received("tcp", frame.size_bytes)
            return page
        try:
            self._stream.receive(page.data)
        except BaseException:
            self._store.abort(page)
            raise
        self._metrics.received("tcp", frame.size_bytes)
        return self._store.seal(page)
