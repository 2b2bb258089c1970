"""Peers of the page channel that stop, come in large numbers or are connected at shutdown: what they hold is released, others are
served.
"""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from attnstore import PageStatus, errors
from attnstore.limits import (
    CHANNEL_CONNECTIONS_MAX,
    CHANNEL_TOKEN_BYTES,
    CHANNEL_UNAUTHENTICATED_MAX,
)
from attnstore.streams.frames import FrameStream
from attnstore.wire.page_channel import VERSION, Frame, Kind, Order, encode_frame
from tests.channels import (
    WIDE,
    ChannelNode,
    ask,
    clean_node,
    is_closed,
    page_header,
    payload,
    read,
    read_plan,
    refusal,
    say_hello,
    verdict,
    write_plan,
)
from tests.samples import SMALL, Batch, eventually, make_batch

Act = Callable[[FrameStream, Batch], None]
"""What a peer does before it stops."""

STALL_MS = 150
NARROW = 16 << 10
"""A receive buffer that is smaller than a page of `WIDE`."""


@pytest.fixture
def node() -> Iterator[ChannelNode]:
    with clean_node() as node:
        yield node


@pytest.fixture
def impatient_node() -> Iterator[ChannelNode]:
    """A node that disconnects a peer that moves nothing for `STALL_MS`."""
    node = ChannelNode(stall_ms=STALL_MS)
    try:
        yield node
    finally:
        node.close()


# Peers that stop


def unfinished_hello(stream: FrameStream, _batch: Batch) -> None:
    stream.send(encode_frame(Frame(Kind.HELLO, page=VERSION, size_bytes=CHANNEL_TOKEN_BYTES)), b"half a token")


def silence(_stream: FrameStream, _batch: Batch) -> None:
    pass


@pytest.mark.parametrize("say", [silence, unfinished_hello])
def test_a_stranger_that_says_nothing_more_is_dropped(impatient_node: ChannelNode, say: Act) -> None:
    stream = impatient_node.dial()
    say(stream, make_batch(1, model="silent"))
    assert is_closed(stream)
    stream.close()


def test_a_stranger_that_trickles_its_hello_gains_no_time(impatient_node: ChannelNode) -> None:
    stream = impatient_node.dial()
    hello = encode_frame(Frame(Kind.HELLO, page=VERSION, size_bytes=CHANNEL_TOKEN_BYTES)) + impatient_node.tokens.issue("default")

    def is_dropped(byte: int) -> bool:
        try:
            stream.send(bytes([byte]))
        except errors.Unavailable:
            return True
        return False

    # A byte every 20 ms: a time limit of STALL_MS between two bytes would never be exceeded.
    assert any(is_dropped(byte) or time.sleep(0.02) for byte in hello)
    stream.close()


def half_a_page(stream: FrameStream, batch: Batch) -> None:
    stream.send(page_header(batch, 0), batch.pages[0][: WIDE.page_bytes // 2])


def read_nothing(stream: FrameStream, batch: Batch) -> None:
    ask(stream, batch, [batch.hashes[1]] * 64)


def read_no_layer(stream: FrameStream, batch: Batch) -> None:
    ask(stream, batch, [batch.hashes[1], batch.hashes[2]] * 32, order=Order.LAYERS)


STALLS = [half_a_page, read_nothing, read_no_layer]


def stall(node: ChannelNode, how: Act, batch: Batch) -> FrameStream:
    """A peer that does half of something and holds a slot or pins."""
    stream = node.connect(receive_buffer_bytes=NARROW)
    how(stream, batch)
    assert eventually(lambda: not node.is_clean())
    return stream


def kept_but_the_first(node: ChannelNode, model: str) -> Batch:
    batch = make_batch(3, model=model, layout=WIDE)
    node.keep(batch)
    assert node.store.spaces.delete(batch.space, [batch.hashes[0]]) == [PageStatus.OK]
    return batch


@pytest.mark.parametrize("how", STALLS)
def test_a_peer_that_vanishes_without_a_word_gives_back_what_it_held(impatient_node: ChannelNode, how: Act) -> None:
    batch = kept_but_the_first(impatient_node, "half-open")
    stream = stall(impatient_node, how, batch)
    # The other end stays open and is never used again, as if its machine were gone.
    assert eventually(impatient_node.is_clean)
    stream.close()


@pytest.mark.parametrize("how", STALLS)
def test_a_peer_that_leaves_in_the_middle_gives_back_what_it_held(node: ChannelNode, how: Act) -> None:
    batch = kept_but_the_first(node, "leaves")
    stall(node, how, batch).close()
    assert eventually(node.is_clean)


def test_a_stalled_reader_delays_no_other_and_takes_no_memory(node: ChannelNode) -> None:
    batch = kept_but_the_first(node, "stalled reader")
    stalled = [stall(node, read_no_layer, batch) for _ in range(4)]
    resident = resident_bytes()
    transport = node.transport()
    for _ in range(20):
        buffers = batch.buffers()
        plan = read_plan(batch, buffers)
        transport.read(plan).wait()
        assert plan.landing.result().statuses == (PageStatus.MISSING, PageStatus.OK, PageStatus.OK)
        assert buffers[1:] == batch.pages[1:]
    # The stalled peers requested 128 MiB; it is held in the arena, not in copies.
    assert resident_bytes() - resident < 32 << 20
    assert not node.is_clean()
    transport.close()
    for stream in stalled:
        stream.close()


def resident_bytes() -> int:
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def send_forever(stream: FrameStream, data: bytes) -> None:
    while True:
        stream.send(data)


def test_a_writer_that_takes_no_verdicts_is_dropped(impatient_node: ChannelNode) -> None:
    batch = make_batch(1, model="no verdicts")
    impatient_node.register(batch)
    # Not smaller: a kernel that drops what has no room also drops the acknowledgements in it, and then neither side moves.
    stream = impatient_node.connect(receive_buffer_bytes=64 << 10)
    page = page_header(batch, 0) + batch.pages[0]
    with pytest.raises(errors.Unavailable):
        send_forever(stream, page)
    assert eventually(impatient_node.is_clean)
    stream.close()


# Many peers


def test_silent_peers_take_no_place_of_those_that_have_shown_a_token(node: ChannelNode) -> None:
    batch = make_batch(1, model="beside the silent")
    node.keep(batch)
    before = node.connect()
    silent = [node.dial() for _ in range(CHANNEL_UNAUTHENTICATED_MAX + CHANNEL_CONNECTIONS_MAX)]
    assert is_closed(silent[0]), "the one that was silent longest makes room"
    for stream in (before, node.connect()):
        ask(stream, batch)
        assert payload(stream)[1] == batch.pages[0]


def test_more_idle_clients_than_places_all_keep_the_page_channel(node: ChannelNode) -> None:
    batch = make_batch(1, model="idle workers")
    node.keep(batch)
    workers = [node.transport() for _ in range(CHANNEL_CONNECTIONS_MAX + 12)]
    for _ in range(2):
        for worker in workers:
            result, buffers = read(worker, batch)
            assert result.leading_hits == 1
            assert buffers == batch.pages
    for worker in workers:
        worker.close()


def test_a_connection_in_use_is_not_closed_for_another(node: ChannelNode) -> None:
    batch = make_batch(CHANNEL_CONNECTIONS_MAX, model="in use")
    node.register(batch)
    half = batch.layout.page_bytes // 2
    busy = [node.connect() for _ in batch.pages]
    for index, stream in enumerate(busy):
        stream.send(page_header(batch, index), batch.pages[index][:half])
    assert eventually(lambda: node.store.statistics().pages_arriving == len(busy))
    extra = node.dial()
    say_hello(extra, node.tokens.issue("default"))
    assert isinstance(refusal(extra), errors.Overloaded)
    for index, stream in enumerate(busy):
        stream.send(batch.pages[index][half:])
        assert verdict(stream) is PageStatus.STORED
    assert node.connect()


def test_a_tenant_with_all_its_places_in_use_leaves_places_to_another() -> None:
    node = ChannelNode(tenants=2)
    try:
        batch = make_batch(CHANNEL_CONNECTIONS_MAX, model="greedy")
        node.register(batch, "greedy")
        for index, page in enumerate(batch.pages):
            stream = node.dial()
            say_hello(stream, node.tokens.issue("greedy"))
            if stream.receive().kind is Kind.REFUSED:
                break
            stream.send(page_header(batch, index), page[:10])
            assert eventually(lambda index=index: node.store.statistics().pages_arriving == index + 1)
        modest = [node.connect("modest") for _ in range(CHANNEL_CONNECTIONS_MAX // 4)]
        assert modest
    finally:
        node.close()


def test_bytes_are_counted_exactly_whatever_runs_at_once(node: ChannelNode) -> None:
    batches = [make_batch(20, model=f"counted {index}") for index in range(8)]
    transport = node.transport(channels=2)

    def write_and_read(batch: Batch) -> None:
        node.register(batch)
        assert set(transport.write(write_plan(batch)).wait().verdicts) == {PageStatus.STORED}
        for on_layer in (None, lambda _layer, _pages: None):
            plan = read_plan(batch, batch.buffers(), on_layer=on_layer)
            transport.read(plan).wait()
            assert plan.landing.result().leading_hits == len(batch.pages)

    with ThreadPoolExecutor(len(batches)) as threads:
        list(threads.map(write_and_read, batches))
    total = 8 * 20 * SMALL.page_bytes
    assert node.sample("attnstore_received_bytes_total", transport="tcp") == total
    assert node.sample("attnstore_sent_bytes_total", transport="tcp") == 2 * total == node.metrics.read_bytes
    assert node.sample("attnstore_pages_total", rpc="Read", status="ok") == 2 * 8 * 20
    assert node.sample("attnstore_pages_total", rpc="Write", status="stored") == 8 * 20
    transport.close()


def test_bytes_that_never_came_are_not_counted(node: ChannelNode) -> None:
    batch = make_batch(1, model="uncounted", layout=WIDE)
    node.register(batch)
    stall(node, half_a_page, batch).close()
    assert eventually(node.is_clean)
    assert node.sample("attnstore_received_bytes_total", transport="tcp") == 0


# The end


def test_a_drain_lets_a_running_transfer_end_and_takes_no_new_request() -> None:
    node = ChannelNode()
    batch = make_batch(1, model="drain", layout=WIDE)
    node.register(batch)
    idle, busy = node.connect(), node.connect()
    busy.send(page_header(batch, 0), batch.pages[0][:100])
    assert eventually(lambda: node.store.statistics().pages_arriving == 1)
    draining = threading.Thread(target=node.server.stop, args=(20_000,))
    draining.start()
    assert is_closed(idle)
    busy.send(batch.pages[0][100:])
    assert verdict(busy) is PageStatus.STORED
    assert is_closed(busy)
    draining.join(20)
    assert not draining.is_alive()
    with pytest.raises(ConnectionRefusedError):
        node.dial()
    idle.close()
    busy.close()


def test_a_drain_waits_no_longer_than_it_was_told() -> None:
    node = ChannelNode()
    batch = make_batch(1, model="drain in time", layout=WIDE)
    node.register(batch)
    stream = stall(node, half_a_page, batch)
    node.server.stop(50)
    assert node.is_clean()
    assert is_closed(stream)
    stream.close()


def test_nothing_is_left_after_the_end() -> None:
    threads, descriptors = set(threading.enumerate()), open_sockets()
    node = ChannelNode()
    batch = kept_but_the_first(node, "the end")
    transport = node.transport(channels=4)
    transport.read(read_plan(batch, batch.buffers())).wait()
    streams = [stall(node, how, batch) for how in STALLS] + [node.dial(), node.connect()]
    node.close()
    transport.close()
    for stream in streams:
        stream.close()
    assert eventually(lambda: set(threading.enumerate()) <= threads)
    assert open_sockets() <= descriptors


def open_sockets() -> int:
    count = 0
    for descriptor in os.listdir("/proc/self/fd"):
        try:
            count += os.readlink(f"/proc/self/fd/{descriptor}").startswith("socket:")
        except FileNotFoundError:
            continue  # the directory's own
    return count


def test_peers_that_leave_in_the_queue_do_not_end_the_service(node: ChannelNode) -> None:
    for _ in range(50):
        connection = socket.create_connection(("127.0.0.1", node.server.port))
        # Reset, not closed: the kernel may give the node a connection that is already dead.
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\x00\x00\x00\x00\x00\x00\x00")
        connection.close()
    node.connect().close()
