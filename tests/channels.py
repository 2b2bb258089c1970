"""Both ends of a page channel without gRPC: the node's server in this process, and a scripted node."""

from __future__ import annotations

import secrets
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress

import grpc

from attnstore import DType, PageLayout, PageStatus, namespace
from attnstore.address import Address
from attnstore.arena import MemoryArena
from attnstore.client.base import OnLayer, ReadPlan, WritePlan
from attnstore.client.calls import Transfer
from attnstore.client.landing import Landing
from attnstore.client.transports.tcp import TcpTransport
from attnstore.clock import Clock, Deadline, MonotonicClock
from attnstore.core.hashing import layer_checksums, page_checksum
from attnstore.core.page_table import PageTable
from attnstore.errors import AttnStoreError, Retryable, Unavailable
from attnstore.limits import CHANNEL_CREDITS, CHANNEL_MATCH_HASHES_MAX, CHANNEL_READ_HASHES_MAX, HASH_BYTES, LEASE_ID_BYTES
from attnstore.server.attend import Attending
from attnstore.server.page_channel import PageChannelServer, TokenBook
from attnstore.server.store import Store
from attnstore.streams.frames import FrameStream
from attnstore.telemetry import NodeMetrics
from attnstore.types import ReadResult, Space
from attnstore.wire import messages
from attnstore.wire.frame_receiver import Role
from attnstore.wire.messages import METHODS
from attnstore.wire.page_channel import VERSION, Frame, Kind, decode_refusal, encode_frame, encode_slice
from tests.samples import Batch, eventually

WIDE = PageLayout(layers=8, kv_heads=8, head_dim=128, block_tokens=16, dtype=DType.BF16)
"""512 KiB per page: more than a small socket buffer holds."""

PATIENCE_MS = 20_000.0
"""How long a test waits for an event that must happen."""


class ChannelNode:
    """A page channel with a store behind it, all in this process. Tokens are those of the tenant `default`. It attends on so many
    threads.
    """

    def __init__(
        self,
        *,
        stall_ms: int = 20_000,
        clock: Clock | None = None,
        capacity_bytes: int = 32 << 20,
        tenants: int = 1,
        attend_threads: int = 0,
    ) -> None:
        clock = clock or MonotonicClock()
        self._arena = MemoryArena(capacity_bytes, capacity_bytes // 8)
        table = PageTable(
            capacity_bytes=capacity_bytes,
            extent_bytes=capacity_bytes // 8,
            new_lease_id=lambda: secrets.token_bytes(LEASE_ID_BYTES),
        )
        self.store = Store(table, self._arena, clock, lambda _events: None)
        self.metrics = NodeMetrics(self.store.statistics)
        self.tokens = TokenBook(clock, tenants)
        self.attending = Attending(self.store, clock, attend_threads) if attend_threads else None
        self.server = PageChannelServer(
            self.store, self.tokens, self.metrics, stall_ms=stall_ms, attending=self.attending, tenants=tenants
        )
        self.server.start(Address("127.0.0.1", 0))
        self._stopped = False
        self._dialled: list[FrameStream] = []

    def register(self, batch: Batch, tenant: str = "default") -> None:
        self.store.spaces.register(Space(tenant, batch.namespace), batch.layout)

    def keep(self, batch: Batch) -> None:
        """Registers the batch and stores its pages directly."""
        self.register(batch)
        for page_hash, data in zip(batch.hashes, batch.pages, strict=True):
            page = self.store.prepare(batch.space, page_hash, page_checksum(data))
            assert not isinstance(page, PageStatus)
            page.data[:] = data
            assert self.store.seal(page) is PageStatus.STORED

    def dial(self, receive_buffer_bytes: int = 0) -> FrameStream:
        """Returns a connection that has sent nothing; `close` ends it if the test fails first."""
        stream = dial(self.server.port, receive_buffer_bytes)
        self._dialled.append(stream)
        return stream

    def connect(self, tenant: str = "default", *, receive_buffer_bytes: int = 0) -> FrameStream:
        """Returns a connection that has received WELCOME."""
        stream = self.dial(receive_buffer_bytes)
        say_hello(stream, self.tokens.issue(tenant))
        assert stream.receive().kind is Kind.WELCOME
        return stream

    def transport(self, channels: int = 1, tenant: str = "default") -> TcpTransport:
        return TcpTransport("127.0.0.1", lambda _name, _deadline: (f":{self.server.port}", self.tokens.issue(tenant)), channels)

    def is_clean(self) -> bool:
        """True if no slot is arriving and no page is pinned."""
        now = self.store.statistics()
        return now.pages_arriving == now.pages_pinned == 0

    def sample(self, name: str, **labels: str) -> float:
        """A metric's value."""
        return self.metrics.registry.get_sample_value(name, labels) or 0.0

    def stop(self) -> None:
        """Ends the service; the stored pages can still be inspected."""
        if not self._stopped:
            self._stopped = True
            self.server.stop(0)

    def close(self) -> None:
        self.stop()
        for stream in self._dialled:
            stream.close()
        self._arena.close()


@contextmanager
def clean_node() -> Iterator[ChannelNode]:
    """A node that a test must leave without arriving slots and pinned pages."""
    node = ChannelNode()
    try:
        yield node
        assert eventually(node.is_clean)
    finally:
        node.close()


def dial(port: int, receive_buffer_bytes: int = 0) -> FrameStream:
    connection = socket.socket()
    try:
        if receive_buffer_bytes:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer_bytes)
        connection.connect(("127.0.0.1", port))
    except OSError:
        connection.close()
        raise
    stream = FrameStream(connection, Role.CLIENT)
    stream.bound(lambda: PATIENCE_MS)
    return stream


def open_channel(node_address: str) -> tuple[int, bytes]:
    """Returns port and token of a real node's page channel."""
    method = METHODS["OpenChannel"]
    with grpc.insecure_channel(node_address) as channel:
        call = channel.unary_unary(
            method.path, request_serializer=method.encode_request, response_deserializer=method.decode_response
        )
        answer = call(messages.OpenChannelRequest(transport="tcp"), timeout=PATIENCE_MS / 1000)
    return int(answer.address.rpartition(":")[2]), answer.token


def say_hello(stream: FrameStream, token: bytes, version: int = VERSION) -> None:
    stream.send(encode_frame(Frame(Kind.HELLO, page=version, size_bytes=len(token))), token)


def ask(stream: FrameStream, batch: Batch, hashes: Sequence[bytes] | None = None, *, request: int = 1, **fields: object) -> None:
    """Sends a READ."""
    joined = b"".join(batch.hashes if hashes is None else hashes)
    frame = Frame(Kind.READ, request=request, size_bytes=len(joined), namespace=batch.namespace, **fields)  # type: ignore[arg-type]
    stream.send(encode_frame(frame), joined)


def page_header(batch: Batch, index: int, *, size_bytes: int | None = None, checksum: int | None = None) -> bytes:
    """Returns the header of a WRITE of one page of the batch."""
    page = batch.pages[index]
    return encode_frame(
        Frame(
            Kind.WRITE,
            request=1,
            page=index,
            size_bytes=len(page) if size_bytes is None else size_bytes,
            checksum=page_checksum(page) if checksum is None else checksum,
            namespace=batch.namespace,
            hash=batch.hashes[index],
        )
    )


class NodeEnd:
    """One connection of a scripted node, after HELLO and WELCOME."""

    def __init__(self, stream: FrameStream, number: int) -> None:
        self.stream = stream
        self.number = number

    def next_request(self) -> tuple[Frame, bytes]:
        """Returns the next frame with its payload."""
        frame = self.stream.receive()
        return frame, bytes(self.stream.whole_payload(frame))

    def slice(self, request: int, index: int, data: bytes, *, offset_bytes: int = 0, checksum: int | None = None) -> None:
        """Sends bytes of a page."""
        checksum = page_checksum(data) if checksum is None else checksum
        self.stream.send(encode_slice(request, index, len(data), offset_bytes, checksum), data)

    def layer(self, request: int, index: int, data: bytes, layer_bytes: int, layer: int, *, wrong: int = 0) -> None:
        """Sends one layer of as many pages as there are bytes for; `wrong` corrupts the checksums."""
        sealed = bytes(byte ^ wrong for byte in layer_checksums(data, layer_bytes))
        self.stream.send(encode_slice(request, index, len(sealed) + len(data), layer * layer_bytes, 0), sealed, data)

    def send(self, kind: Kind, **fields: object) -> None:
        """Sends a frame without payload."""
        self.stream.send(encode_frame(Frame(kind, **fields)))  # type: ignore[arg-type]

    def send_until_broken(self) -> None:
        """Sends bytes until the client's end is closed, which proves that none of them can be received any more."""
        with suppress(AttnStoreError):
            while True:
                self.stream.send(b"\xee" * 65536)


Script = Callable[[NodeEnd], None]


class ScriptedNode:
    """A listening socket; a thread per connection runs `script` and then closes the connection."""

    def __init__(
        self,
        script: Script,
        *,
        credits: int = CHANNEL_CREDITS,
        hashes_max: int = CHANNEL_READ_HASHES_MAX,
        match_hashes_max: int = CHANNEL_MATCH_HASHES_MAX,
    ) -> None:
        self._script = script
        self._welcome = encode_frame(Frame(Kind.WELCOME, page=hashes_max, request=credits, offset_bytes=match_hashes_max))
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._threads: list[threading.Thread] = []
        self._streams: list[FrameStream] = []
        self.failures: list[BaseException] = []
        self.port: int = self._listener.getsockname()[1]
        self._acceptor = threading.Thread(target=self._accept, name="scripted-accept", daemon=True)
        self._acceptor.start()

    def transport(self, channels: int = 1) -> TcpTransport:
        return TcpTransport("127.0.0.1", lambda _name, _deadline: (f"127.0.0.1:{self.port}", bytes(32)), channels)

    def close(self) -> None:
        """Breaks every connection and waits for every script. Fails if a script failed."""
        self._listener.shutdown(socket.SHUT_RDWR)
        self._acceptor.join()
        self._listener.close()
        for stream in self._streams:
            stream.shutdown()
        self.join()
        for stream in self._streams:
            stream.close()
        if self.failures:
            raise self.failures[0]

    def join(self) -> None:
        """Waits for every running script."""
        for thread in self._threads:
            thread.join(PATIENCE_MS / 1000)
            assert not thread.is_alive(), "a script of the test does not end"

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            stream = FrameStream(connection, Role.NODE)
            stream.bound(lambda: PATIENCE_MS)
            self._streams.append(stream)
            end = NodeEnd(stream, len(self._threads))
            thread = threading.Thread(target=self._serve, args=(end,), name="scripted", daemon=True)
            self._threads.append(thread)
            thread.start()

    def _serve(self, end: NodeEnd) -> None:
        try:
            frame, _token = end.next_request()
            assert frame.kind is Kind.HELLO
            end.stream.send(self._welcome)
            self._script(end)
        except AttnStoreError:
            pass  # the client disconnected
        except BaseException as error:
            self.failures.append(error)
        finally:
            end.stream.shutdown()


@contextmanager
def scripted(script: Script, *, channels: int = 1, **welcome: int) -> Iterator[TcpTransport]:
    """Returns a transport to a node that follows `script`."""
    node = ScriptedNode(script, **welcome)
    transport = node.transport(channels)
    try:
        yield transport
    finally:
        transport.close()
        node.close()


def read_plan(
    batch: Batch,
    buffers: Sequence[bytearray],
    *,
    layers: tuple[int, int] | None = None,
    on_layer: OnLayer | None = None,
    lease_id: bytes | None = None,
    deadline_ms: float = PATIENCE_MS,
    transfer: Transfer | None = None,
) -> ReadPlan:
    begin, end = layers or (0, batch.layout.layers)
    return ReadPlan(
        namespace=batch.namespace,
        hashes=batch.hashes,
        layer_begin=begin,
        layer_end=end,
        layer_bytes=batch.layout.layer_bytes,
        is_whole=(begin, end) == (0, batch.layout.layers),
        lease_id=lease_id,
        landing=Landing(len(batch.hashes), buffers, (end - begin) * batch.layout.layer_bytes),
        deadline=Deadline(MonotonicClock(), deadline_ms),
        on_layer=on_layer,
        transfer=transfer or Transfer(),
    )


def write_plan(batch: Batch, *, deadline_ms: float = PATIENCE_MS) -> WritePlan:
    pages = [memoryview(page) for page in batch.pages]
    return WritePlan(batch.namespace, batch.hashes, pages, Deadline(MonotonicClock(), deadline_ms))


def other_namespace(batch: Batch) -> bytes:
    """A namespace that is not registered."""
    return namespace(batch.layout, model=b"nobody's")


def pages_of(batch: Batch) -> Script:
    """Returns a node that stores the batch and sends requested pages."""
    page_of = dict(zip(batch.hashes, batch.pages, strict=True))

    def serve(end: NodeEnd) -> None:
        while True:
            frame, joined = end.next_request()
            for index in range(len(joined) // HASH_BYTES):
                page = page_of[joined[index * HASH_BYTES : (index + 1) * HASH_BYTES]]  # type: ignore[index]
                end.slice(frame.request, index, page)

    return serve


def read(transport: TcpTransport, batch: Batch, **options: object) -> tuple[ReadResult, list[bytearray]]:
    """Reads a batch as a client does."""
    buffers = batch.buffers()
    plan = read_plan(batch, buffers, **options)  # type: ignore[arg-type]
    try:
        transport.read(plan).wait()
    except Retryable as error:
        return plan.landing.result(error), buffers
    return plan.landing.result(), buffers


def refusal(stream: FrameStream) -> AttnStoreError:
    """Returns the error with which the node refuses."""
    frame = stream.receive()
    assert frame.kind is Kind.REFUSED
    return decode_refusal(stream.whole_payload(frame))


def payload(stream: FrameStream) -> tuple[Frame, bytes]:
    """Returns the next frame and its bytes."""
    frame = stream.receive()
    return frame, bytes(stream.whole_payload(frame))


def is_closed(stream: FrameStream) -> bool:
    """True if the node has closed the connection."""
    try:
        stream.receive()
    except Unavailable:
        return True
    return False


def verdict(stream: FrameStream) -> PageStatus | None:
    frame = stream.receive()
    assert frame.kind is Kind.VERDICT
    return frame.status
