"""The node's side of the page channel over real sockets: who is admitted, and the answers to frames in and out of place."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from attnstore import PageStatus, errors
from attnstore.core.hashing import layer_checksums, page_checksum
from attnstore.limits import (
    CHANNEL_CREDITS,
    CHANNEL_MATCH_HASHES_MAX,
    CHANNEL_READ_HASHES_MAX,
    CHANNEL_TOKEN_BYTES,
    CHANNEL_TOKEN_MS_MAX,
    CHANNEL_TOKENS_MAX,
    PAGE_BYTES_MAX,
)
from attnstore.server.page_channel import TokenBook
from attnstore.testing.clock import ManualClock
from attnstore.wire.page_channel import MAGIC, VERSION, Frame, Kind, Order, decode_refusal, encode_frame
from tests.channels import (
    ChannelNode,
    ask,
    clean_node,
    is_closed,
    page_header,
    payload,
    refusal,
    say_hello,
    verdict,
)
from tests.samples import SMALL, eventually, make_batch


@pytest.fixture
def node() -> Iterator[ChannelNode]:
    with clean_node() as node:
        yield node


# Tokens


def test_the_welcome_says_how_much_may_be_on_the_way(node: ChannelNode) -> None:
    stream = node.dial()
    say_hello(stream, node.tokens.issue("default"))
    welcome = stream.receive()
    assert (welcome.kind, welcome.page, welcome.request) == (Kind.WELCOME, CHANNEL_READ_HASHES_MAX, CHANNEL_CREDITS)
    assert welcome.offset_bytes == CHANNEL_MATCH_HASHES_MAX
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


def test_a_tenant_that_hoards_tokens_leaves_some_to_others() -> None:
    book = TokenBook(ManualClock(), tenants=2)
    with pytest.raises(errors.Overloaded, match="channel tokens"):
        [book.issue("greedy") for _ in range(CHANNEL_TOKENS_MAX)]
    assert {book.redeem(book.issue("modest")) for _ in range(3)} == {"modest"}
    others = [book.issue("modest") for _ in range(CHANNEL_TOKENS_MAX // 4)]
    assert {book.redeem(token) for token in others} == {"modest"}


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
    assert isinstance(decode_refusal(reason), errors.NamespaceUnknown)
    ask(stranger, batch)
    assert isinstance(refusal(stranger), errors.NamespaceUnknown)
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


def test_verdicts_come_in_order_and_before_whatever_was_asked_after_their_pages(node: ChannelNode) -> None:
    """Verdicts may be sent together, but do not wait for pages that are not in flight yet."""
    batch = make_batch(40, model="verdicts together")
    node.register(batch)
    stream = node.connect()
    for index, page in enumerate(batch.pages):
        stream.send(page_header(batch, index), page)
    ask(stream, batch)
    frames = [stream.receive() for _ in batch.pages]
    assert [(frame.kind, frame.page, frame.status) for frame in frames] == [
        (Kind.VERDICT, index, PageStatus.STORED) for index in range(40)
    ]
    assert [payload(stream)[1] for _ in batch.pages] == batch.pages
    # A page that arrives alone gets its verdict at once, and an error does not overtake a verdict.
    other = make_batch(2, model="verdict at once")
    node.register(other)
    stream.send(page_header(other, 0), other.pages[0])
    assert verdict(stream) is PageStatus.STORED
    stream.send(page_header(other, 1), other.pages[1])
    stream.send(page_header(make_batch(1, model="of nobody"), 0), batch.pages[0])
    assert verdict(stream) is PageStatus.STORED
    assert isinstance(refusal(stream), errors.NamespaceUnknown)
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
        row = b"".join(page[begin : begin + SMALL.layer_bytes] for page in batch.pages)
        assert data == layer_checksums(row, SMALL.layer_bytes) + row
    stream.close()


def test_a_lease_that_ran_out_is_a_status_and_not_an_error(node: ChannelNode) -> None:
    batch = make_batch(1, model="lease")
    node.keep(batch)
    stream = node.connect()
    ask(stream, batch, lease=b"never granted..!")
    assert stream.receive().status is PageStatus.LEASE_EXPIRED
    stream.close()
