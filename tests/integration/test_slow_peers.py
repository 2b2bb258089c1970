"""Peers that move a few bytes all the time hold a slot, a pin or a place no longer than those that move nothing."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import Iterator

import grpc
import pytest

import attnstore
from attnstore import PageStatus, errors
from attnstore.core.hashing import LAYER_CHECKSUM_BYTES, page_checksum
from attnstore.limits import CHANNEL_GATHER_PAGES, CHANNEL_LAYER_PINS_MS_MAX, KIB, MIB, PEER_BYTES_PER_S_MIN
from attnstore.server.stall import Stall
from attnstore.streams.frames import FrameStream
from attnstore.testing import StoreProcess
from attnstore.testing.clock import ManualClock
from attnstore.wire.frame_receiver import Role
from attnstore.wire.messages import ERROR_TRAILER
from attnstore.wire.page_channel import Order
from attnstore.wire.v1 import store_pb2 as pb
from attnstore.wire.v1 import store_pb2_grpc
from tests.channels import WIDE, ChannelNode, ask, page_header, payload, verdict
from tests.samples import LARGE, Batch, eventually, make_batch

STALL_MS = 300
TRICKLE_S = 0.05


@pytest.fixture
def hasty_node() -> Iterator[ChannelNode]:
    node = ChannelNode(stall_ms=STALL_MS)
    try:
        yield node
    finally:
        node.close()


def trickle(stream: FrameStream, data: bytes) -> bool:
    """Sends a byte every now and then. Returns whether the node ends that."""
    for byte in data:
        try:
            stream.send(bytes([byte]))
        except errors.Unavailable:
            return True
        time.sleep(TRICKLE_S)
    return False


def test_a_writer_that_trickles_a_page_over_tcp_loses_its_slot(hasty_node: ChannelNode) -> None:
    batch = make_batch(1, model="trickled page", layout=WIDE)
    hasty_node.register(batch)
    stream = hasty_node.connect()
    stream.send(page_header(batch, 0))
    assert trickle(stream, batch.pages[0][:200])
    assert eventually(hasty_node.is_clean)


def test_a_reader_that_trickles_over_tcp_is_given_up() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener, socket.socket() as reader:
        # Buffers so small that the kernel acknowledges every few kilobytes.
        reader.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)
        reader.connect(listener.getsockname())
        sender, _ = listener.accept()
        sender.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)
        stream = FrameStream(sender, Role.NODE)
        stream.bound(lambda: 2_000)
        stream.demand(2_000)
        done = threading.Event()

        def take() -> None:
            while not done.wait(TRICKLE_S):
                reader.recv(PEER_BYTES_PER_S_MIN // 40)

        taking = threading.Thread(target=take)
        taking.start()
        try:
            with pytest.raises(errors.DeadlineExceeded, match="moved only"):
                stream.send(bytes(MIB))
        finally:
            done.set()
            taking.join()
            stream.close()


def test_a_slow_but_honest_writer_over_tcp_is_served(hasty_node: ChannelNode) -> None:
    batch = make_batch(1, model="slow and honest")
    page = batch.pages[0]
    hasty_node.register(batch)
    stream = hasty_node.connect()
    stream.send(page_header(batch, 0))
    step = 4 * PEER_BYTES_PER_S_MIN * STALL_MS // 1000 // 4
    for at in range(0, len(page), step):
        stream.send(page[at : at + step])
        time.sleep(STALL_MS / 4 / 1000)
    assert verdict(stream) is PageStatus.STORED


@pytest.fixture
def hasty_process() -> Iterator[StoreProcess]:
    with StoreProcess("--capacity", "64MiB", "--stall-ms", str(STALL_MS)) as node:
        yield node


def test_a_writer_that_trickles_a_page_over_grpc_loses_its_call_and_its_slot(hasty_process: StoreProcess) -> None:
    batch = make_batch(1, model="trickled over grpc", layout=LARGE)
    page = batch.pages[0]
    end = threading.Event()

    def chunks() -> Iterator[pb.WriteChunk]:
        yield pb.WriteChunk(namespace=batch.namespace, hash=batch.hashes[0], checksum=page_checksum(page), payload=page[:1])
        for at in range(1, 200):
            if end.wait(TRICKLE_S):
                return
            yield pb.WriteChunk(offset_bytes=at, payload=page[at : at + 1])

    with attnstore.connect(hasty_process.url) as client, grpc.insecure_channel(hasty_process.address) as channel:
        client.register_layout(batch.namespace, LARGE)
        with pytest.raises(grpc.RpcError) as caught:
            store_pb2_grpc.AttentionStoreStub(channel).Write(chunks(), timeout=30)
        end.set()
        assert dict(caught.value.trailing_metadata())[ERROR_TRAILER] == "deadline_exceeded"
        stats = client.stats()
        assert (stats.pages_arriving, stats.used_bytes) == (0, 0)


@pytest.mark.parametrize(("message_bytes", "is_slow"), [(1, True), (8 * KIB, False)])
async def test_a_call_is_judged_by_what_it_moves_and_not_by_how_often(message_bytes: int, is_slow: bool) -> None:
    async def move() -> None:
        async with Stall(0.2) as stall:
            for _ in range(30):
                await asyncio.sleep(0.02)
                stall.moved(message_bytes)

    if is_slow:
        with pytest.raises(TimeoutError):
            await move()
    else:
        await move()


def slow_layer_reader(clock: ManualClock, node: ChannelNode) -> tuple[Batch, FrameStream]:
    """A reader by layers that has read nothing of the first frame when the time for keeping all pages pinned ends."""
    batch = make_batch(2, model="slow by layers", layout=WIDE)
    node.keep(batch)
    stream = node.connect(receive_buffer_bytes=16 * KIB)
    # The first frame has only the first page, the next one the second.
    hashes = [batch.hashes[0]] * CHANNEL_GATHER_PAGES + [batch.hashes[1]] * CHANNEL_GATHER_PAGES
    ask(stream, batch, hashes, order=Order.LAYERS)
    assert eventually(lambda: node.store.statistics().pages_pinned == 2)
    clock.advance_ms(CHANNEL_LAYER_PINS_MS_MAX)
    return batch, stream


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


@pytest.fixture
def clocked_node(clock: ManualClock) -> Iterator[ChannelNode]:
    node = ChannelNode(clock=clock)
    try:
        yield node
    finally:
        node.close()


def test_a_slow_reader_by_layers_holds_no_more_than_the_frame_it_is_sent(clock: ManualClock, clocked_node: ChannelNode) -> None:
    batch, stream = slow_layer_reader(clock, clocked_node)
    assert clocked_node.store.spaces.delete(batch.space, batch.hashes) == [PageStatus.PINNED, PageStatus.PINNED]
    payload(stream)
    assert eventually(lambda: clocked_node.store.spaces.delete(batch.space, batch.hashes[:1]) == [PageStatus.OK])
    assert clocked_node.store.spaces.delete(batch.space, batch.hashes) == [PageStatus.MISSING, PageStatus.PINNED]
    # The next layer of the evicted page cannot be sent: the read ends.
    with pytest.raises(errors.Unavailable):  # noqa: PT012 - whichever frame finds the connection reset
        while True:
            payload(stream)
    assert eventually(clocked_node.is_clean)


def test_a_slow_reader_by_layers_gets_every_layer_of_pages_that_stay(clock: ManualClock, clocked_node: ChannelNode) -> None:
    batch, stream = slow_layer_reader(clock, clocked_node)
    for layer in range(WIDE.layers):
        for page in batch.pages:
            frame, data = payload(stream)
            assert frame.status is PageStatus.OK
            data = data[LAYER_CHECKSUM_BYTES * CHANNEL_GATHER_PAGES :]
            assert data == page[layer * WIDE.layer_bytes : (layer + 1) * WIDE.layer_bytes] * CHANNEL_GATHER_PAGES
    assert eventually(clocked_node.is_clean)
