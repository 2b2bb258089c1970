"""The node's end of the page channel over real sockets: whatever a peer does, slots and pins come back and others are served."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from attnstore import PageStatus, errors
from attnstore.core.hashing import page_checksum
from attnstore.limits import (
    CHANNEL_CONNECTIONS_MAX,
    CHANNEL_CREDITS,
    CHANNEL_READ_HASHES_MAX,
    CHANNEL_TOKEN_BYTES,
    CHANNEL_TOKEN_MS_MAX,
    CHANNEL_TOKENS_MAX,
    PAGE_BYTES_MAX,
)
from attnstore.server.page_channel import TokenBook
from attnstore.testing.clock import ManualClock
from attnstore.wire.page_channel import MAGIC, VERSION, Frame, Kind, Order, decode_refusal, encode_frame
from attnstore.wire.stream import FrameStream
from tests.channels import (
    WIDE,
    ChannelNode,
    ask,
    clean_node,
    page_header,
    read_plan,
    say_hello,
    write_plan,
)
from tests.samples import SMALL, Batch, eventually, make_batch

Act = Callable[[FrameStream, Batch], None]
"""What a peer does before it stops."""

STALL_MS = 150
NARROW = 16 << 10
"""A receive buffer that a page of `WIDE` does not fit into."""


@pytest.fixture
def node() -> Iterator[ChannelNode]:
    with clean_node() as node:
        yield node


@pytest.fixture
def impatient_node() -> Iterator[ChannelNode]:
    """A node that gives up on a peer that moves nothing for `STALL_MS`."""
    node = ChannelNode(stall_ms=STALL_MS)
    try:
        yield node
    finally:
        node.close()


def refusal(stream: FrameStream) -> errors.AttnStoreError:
    """The error that the node refuses with."""
    frame = stream.receive()
    assert frame.kind is Kind.REFUSED
    reason = bytearray(frame.size_bytes)
    stream.receive_payload(memoryview(reason))
    return decode_refusal(reason)


def payload(stream: FrameStream) -> tuple[Frame, bytes]:
    """The next frame and its bytes."""
    frame = stream.receive()
    return frame, bytes(stream.whole_payload(frame))


def is_closed(stream: FrameStream) -> bool:
    """The node has ended the connection."""
    try:
        stream.receive()
    except errors.Unavailable:
        return True
    return False


def verdict(stream: FrameStream) -> PageStatus | None:
    frame = stream.receive()
    assert frame.kind is Kind.VERDICT
    return frame.status


# Tokens


def test_the_welcome_says_how_much_may_be_on_the_way(node: ChannelNode) -> None:
    stream = node.dial()
    say_hello(stream, node.tokens.issue("default"))
    welcome = stream.receive()
    assert (welcome.kind, welcome.page, welcome.request) == (Kind.WELCOME, CHANNEL_READ_HASHES_MAX, CHANNEL_CREDITS)
    stream.close()


def test_a_token_opens_one_connection_and_no_second(node: ChannelNode) -> None:
    token = node.tokens.issue("default")
    first, second = node.dial(), node.dial()
    say_hello(first, token)
    assert first.receive().kind is Kind.WELCOME
    say_hello(second, token)
    assert isinstance(refusal(second), errors.Unauthenticated)
    assert is_closed(second)
    first.close()
    second.close()


@pytest.mark.parametrize(
    "token",
    [b"", b"short", bytes(CHANNEL_TOKEN_BYTES), os.urandom(CHANNEL_TOKEN_BYTES)],
    ids=["empty", "short", "zeros", "random"],
)
def test_a_token_that_was_never_given_out_is_refused(node: ChannelNode, token: bytes) -> None:
    node.tokens.issue("default")
    stream = node.dial()
    say_hello(stream, token)
    assert isinstance(refusal(stream), errors.Unauthenticated)
    assert is_closed(stream)
    stream.close()


def test_a_token_is_good_until_its_last_moment_and_not_in_it() -> None:
    clock = ManualClock()
    book = TokenBook(clock)
    late, timely = book.issue("a"), book.issue("b")
    clock.advance_ms(CHANNEL_TOKEN_MS_MAX - 1)
    assert book.redeem(timely) == "b"
    clock.advance_ms(1)
    with pytest.raises(errors.Unauthenticated):
        book.redeem(late)


def test_an_old_token_is_refused_over_the_wire() -> None:
    clock = ManualClock()
    node = ChannelNode(clock=clock)
    try:
        token = node.tokens.issue("default")
        clock.advance_ms(CHANNEL_TOKEN_MS_MAX)
        stream = node.dial()
        say_hello(stream, token)
        assert isinstance(refusal(stream), errors.Unauthenticated)
        stream.close()
    finally:
        node.close()


def test_tokens_are_bounded_and_old_ones_make_room() -> None:
    clock = ManualClock()
    book = TokenBook(clock)
    tokens = {book.issue("default") for _ in range(CHANNEL_TOKENS_MAX)}
    assert len(tokens) == CHANNEL_TOKENS_MAX
    with pytest.raises(errors.Overloaded):
        book.issue("default")
    clock.advance_ms(CHANNEL_TOKEN_MS_MAX)
    assert book.issue("default") not in tokens


def test_a_tenant_that_hoards_tokens_makes_room_for_others_and_not_for_itself() -> None:
    book = TokenBook(ManualClock())
    hoard = [book.issue("greedy") for _ in range(CHANNEL_TOKENS_MAX)]
    others = [book.issue("modest") for _ in range(3)]
    with pytest.raises(errors.Overloaded):
        book.issue("greedy")
    for token in hoard[:3]:
        with pytest.raises(errors.Unauthenticated):
            book.redeem(token)
    assert {book.redeem(token) for token in others} == {"modest"}
    assert {book.redeem(token) for token in hoard[3:]} == {"greedy"}


def test_one_token_raced_for_by_many_opens_for_one() -> None:
    book = TokenBook(ManualClock())
    token = book.issue("default")
    together = threading.Barrier(8)

    def redeem(_: int) -> bool:
        together.wait()
        try:
            return book.redeem(token) == "default"
        except errors.Unauthenticated:
            return False

    with ThreadPoolExecutor(8) as threads:
        assert sum(threads.map(redeem, range(8))) == 1


def test_the_tokens_tenant_is_the_connections_tenant(node: ChannelNode) -> None:
    batch = make_batch(1, model="theirs")
    node.register(batch, tenant="owner")
    owner, stranger = node.connect("owner"), node.connect("stranger")
    for stream, expected in ((owner, Kind.VERDICT), (stranger, Kind.REFUSED)):
        stream.send(page_header(batch, 0), batch.pages[0])
        frame, reason = payload(stream)
        assert frame.kind is expected
    assert isinstance(decode_refusal(reason), errors.PermissionDenied)
    ask(stranger, batch)
    assert isinstance(refusal(stranger), errors.PermissionDenied)
    ask(owner, batch)
    assert payload(owner)[1] == batch.pages[0]
    owner.close()
    stranger.close()


# Frames out of place


def test_another_version_is_refused_by_name(node: ChannelNode) -> None:
    stream = node.dial()
    say_hello(stream, node.tokens.issue("default"), version=VERSION + 1)
    error = refusal(stream)
    assert isinstance(error, errors.InvalidArgument)
    assert str(VERSION + 1) in str(error)
    stream.close()


@pytest.mark.parametrize(
    "header",
    [
        b"GET / HTTP/1.1\r\n".ljust(128, b"x"),
        encode_frame(Frame(Kind.READ)),
        encode_frame(Frame(Kind.WELCOME)),
        encode_frame(Frame(Kind.HELLO, page=VERSION, size_bytes=CHANNEL_TOKEN_BYTES + 1)),
        MAGIC + bytes(124),
    ],
    ids=["http", "read before hello", "a node's frame", "long token", "no kind"],
)
def test_a_stranger_that_speaks_something_else_is_told_so_and_dropped(node: ChannelNode, header: bytes) -> None:
    stream = node.dial()
    stream.send(header)
    assert isinstance(refusal(stream), errors.ProtocolError)
    assert is_closed(stream)
    stream.close()


@pytest.mark.parametrize(
    "header",
    [
        encode_frame(Frame(Kind.HELLO, page=VERSION)),
        encode_frame(Frame(Kind.WRITE, size_bytes=PAGE_BYTES_MAX + 1)),
        encode_frame(Frame(Kind.WRITE, size_bytes=2**64 - 1)),
        encode_frame(Frame(Kind.READ, size_bytes=CHANNEL_READ_HASHES_MAX * 32 + 1)),
        encode_frame(Frame(Kind.REFUSED)),
    ],
    ids=["second hello", "oversize page", "endless page", "too many hashes", "a node's frame"],
)
def test_a_welcomed_peer_that_breaks_the_protocol_is_told_so_and_dropped(node: ChannelNode, header: bytes) -> None:
    stream = node.connect()
    stream.send(header)
    assert isinstance(refusal(stream), errors.ProtocolError)
    assert is_closed(stream)
    stream.close()


def test_a_wrong_request_leaves_the_connection_good_for_the_next(node: ChannelNode) -> None:
    batch = make_batch(2, model="refused")
    stream = node.connect()
    stream.send(page_header(batch, 0), batch.pages[0])
    assert isinstance(refusal(stream), errors.NamespaceUnknown)
    ask(stream, batch)
    assert isinstance(refusal(stream), errors.NamespaceUnknown)
    node.keep(batch)
    ask(stream, batch, [batch.hashes[0], b"half a hash"])
    assert isinstance(refusal(stream), errors.InvalidArgument)
    for begin, end in ((1, 1), (2, 1), (0, SMALL.layers + 1), (2**32 - 1, 0)):
        ask(stream, batch, layer_begin=begin, layer_end=end)
        assert isinstance(refusal(stream), errors.InvalidArgument)
    ask(stream, batch)
    assert [payload(stream)[1] for _ in batch.pages] == batch.pages
    stream.close()


@pytest.mark.parametrize("size", [0, 1, SMALL.page_bytes - 1, SMALL.page_bytes + 1, 3 << 20])
def test_a_page_of_another_size_is_refused_alone(node: ChannelNode, size: int) -> None:
    batch = make_batch(1, model="wrong size")
    node.register(batch)
    stream = node.connect()
    stream.send(page_header(batch, 0, size_bytes=size), bytes(size))
    assert verdict(stream) is PageStatus.WRONG_SIZE
    assert node.store.statistics().pages_arriving == 0
    stream.send(page_header(batch, 0), batch.pages[0])
    assert verdict(stream) is PageStatus.STORED
    stream.close()


def test_a_page_whose_bytes_are_not_those_of_its_checksum_is_not_kept(node: ChannelNode) -> None:
    batch = make_batch(1, model="mismatch")
    node.register(batch)
    stream = node.connect()
    stream.send(page_header(batch, 0, checksum=page_checksum(b"other")), batch.pages[0])
    assert verdict(stream) is PageStatus.CHECKSUM_MISMATCH
    ask(stream, batch)
    assert stream.receive().status is PageStatus.MISSING
    stream.send(page_header(batch, 0), batch.pages[0])
    assert verdict(stream) is PageStatus.STORED
    stream.close()


def test_a_page_that_is_there_or_on_its_way_is_read_to_its_end_and_not_stored_twice(node: ChannelNode) -> None:
    batch = make_batch(1, model="twice")
    node.register(batch)
    slow, quick = node.connect(), node.connect()
    slow.send(page_header(batch, 0), batch.pages[0][:10])
    assert eventually(lambda: node.store.statistics().pages_arriving == 1)
    quick.send(page_header(batch, 0), batch.pages[0])
    assert verdict(quick) is PageStatus.ARRIVING
    slow.send(batch.pages[0][10:])
    assert verdict(slow) is PageStatus.STORED
    quick.send(page_header(batch, 0), batch.pages[0])
    assert verdict(quick) is PageStatus.ALREADY_PRESENT
    slow.close()
    quick.close()


def test_reads_are_answered_one_after_the_other_and_in_order(node: ChannelNode) -> None:
    batch = make_batch(3, model="in order")
    node.keep(batch)
    stream = node.connect()
    ask(stream, batch, request=7)
    ask(stream, batch, [batch.hashes[2], b"?" * 32], request=8)
    frames = [payload(stream)[0] for _ in range(5)]
    assert [(frame.request, frame.page) for frame in frames] == [(7, 0), (7, 1), (7, 2), (8, 0), (8, 1)]
    assert frames[-1].status is PageStatus.MISSING
    stream.close()


def test_a_read_by_layers_names_the_misses_first_and_then_gathers_each_layer(node: ChannelNode) -> None:
    batch = make_batch(3, model="by layers")
    node.keep(batch)
    stream = node.connect()
    ask(stream, batch, [batch.hashes[0], b"?" * 32, batch.hashes[1], batch.hashes[2]], order=Order.LAYERS)
    miss, _ = payload(stream)
    assert (miss.page, miss.status) == (1, PageStatus.MISSING)
    for layer in range(SMALL.layers):
        frame, data = payload(stream)
        begin = layer * SMALL.layer_bytes
        assert (frame.page, frame.offset_bytes) == (0, begin)
        assert data == b"".join(page[begin : begin + SMALL.layer_bytes] for page in batch.pages)
        assert frame.checksum == page_checksum(data)
    stream.close()


def test_a_lease_that_ran_out_is_a_status_and_not_an_error(node: ChannelNode) -> None:
    batch = make_batch(1, model="lease")
    node.keep(batch)
    stream = node.connect()
    ask(stream, batch, lease=b"never granted..!")
    assert stream.receive().status is PageStatus.LEASE_EXPIRED
    stream.close()


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

    # A byte every 20 ms: whoever allowed STALL_MS between two of them would hear it all.
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
    """A peer that does half of something and holds a slot or pins for it."""
    stream = node.connect(receive_buffer_bytes=NARROW)
    how(stream, batch)
    assert eventually(lambda: not node.is_clean())
    return stream


def kept_but_the_first(node: ChannelNode, model: str) -> Batch:
    batch = make_batch(3, model=model, layout=WIDE)
    node.keep(batch)
    assert node.store.delete(batch.namespace, [batch.hashes[0]]) == [PageStatus.OK]
    return batch


@pytest.mark.parametrize("how", STALLS)
def test_a_peer_that_vanishes_without_a_word_gives_back_what_it_held(impatient_node: ChannelNode, how: Act) -> None:
    batch = kept_but_the_first(impatient_node, "half-open")
    stream = stall(impatient_node, how, batch)
    # The other end stays open and is never read from or written to again, as if its machine were gone.
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
        transport.read(plan)
        assert plan.landing.result().statuses == (PageStatus.MISSING, PageStatus.OK, PageStatus.OK)
        assert buffers[1:] == batch.pages[1:]
    # What the stalled ones asked for is 128 MiB; it waits in the arena, not in copies.
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
    # Not smaller: a kernel that drops what has no room drops the acknowledgements in it too, and then neither side moves.
    stream = impatient_node.connect(receive_buffer_bytes=64 << 10)
    page = page_header(batch, 0) + batch.pages[0]
    with pytest.raises(errors.Unavailable):
        send_forever(stream, page)
    assert eventually(impatient_node.is_clean)
    stream.close()


# Many peers


def test_connections_beyond_the_limit_are_closed_and_room_is_reused(node: ChannelNode) -> None:
    streams = [node.connect() for _ in range(CHANNEL_CONNECTIONS_MAX)]
    extra = node.dial()
    assert is_closed(extra)
    extra.close()
    streams.pop().close()

    def welcomed() -> bool:
        stream = node.dial()
        try:
            say_hello(stream, node.tokens.issue("default"))
            return stream.receive().kind is Kind.WELCOME
        except errors.Unavailable:
            return False
        finally:
            stream.close()

    assert eventually(welcomed)
    for stream in streams:
        stream.close()


def test_bytes_are_counted_exactly_whatever_runs_at_once(node: ChannelNode) -> None:
    batches = [make_batch(20, model=f"counted {index}") for index in range(8)]
    transport = node.transport(channels=2)

    def write_and_read(batch: Batch) -> None:
        node.register(batch)
        assert set(transport.write(write_plan(batch))) == {PageStatus.STORED}
        for on_layer in (None, lambda _layer, _pages: None):
            plan = read_plan(batch, batch.buffers(), on_layer=on_layer)
            transport.read(plan)
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
    transport.read(read_plan(batch, batch.buffers()))
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
        # Reset, not closed: the kernel may hand the node a connection that is already dead.
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\x00\x00\x00\x00\x00\x00\x00")
        connection.close()
    node.connect().close()
