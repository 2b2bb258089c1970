"""The tcp transport with correct and with misbehaving nodes."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from attnstore import PageStatus, errors
from attnstore.client.base import BulkUnavailable, MatchPlan
from attnstore.client.transports.tcp import TcpTransport
from attnstore.clock import Deadline, MonotonicClock
from attnstore.core.hashing import page_checksum
from attnstore.errors import DeadlineExceeded, ProtocolError, Unavailable
from attnstore.limits import (
    CHANNEL_CREDITS,
    CHANNEL_READ_HASHES_MAX,
    CHANNEL_SECOND_READ_HASHES_MAX,
    HASH_BYTES,
)
from attnstore.wire.page_channel import Frame, Kind, encode_frame, encode_refusal, encode_slice
from tests.channels import PATIENCE_MS, ChannelNode, NodeEnd, clean_node, pages_of, read, read_plan, scripted, write_plan
from tests.samples import LARGE, SMALL, make_batch

OK, MISSING, CORRUPT, INCOMPLETE = PageStatus.OK, PageStatus.MISSING, PageStatus.CORRUPT, PageStatus.INCOMPLETE


@pytest.fixture
def node() -> Iterator[ChannelNode]:
    with clean_node() as node:
        yield node


# What works


@pytest.mark.parametrize("channels", [1, 4])
@pytest.mark.parametrize("pages", [1, 3, 4, 5, 70])
def test_pages_go_and_come_back_whatever_number_of_channels_carries_them(node: ChannelNode, channels: int, pages: int) -> None:
    batch = make_batch(pages, model="round trip")
    node.register(batch)
    transport = node.transport(channels)
    assert transport.write(write_plan(batch)).wait().verdicts == (PageStatus.STORED,) * pages
    assert transport.write(write_plan(batch)).wait().verdicts == (PageStatus.ALREADY_PRESENT,) * pages
    result, buffers = read(transport, batch)
    assert (result.leading_hits, buffers) == (pages, batch.pages)
    transport.close()


def test_each_channel_gets_its_own_part_and_the_parts_are_the_whole(node: ChannelNode) -> None:
    batch = make_batch(7, model="parts", layout=LARGE)
    node.register(batch)
    transport = node.transport(channels=4)
    transport.write(write_plan(batch)).wait()
    node.store.spaces.delete(batch.space, [batch.hashes[2], batch.hashes[6]])
    result, buffers = read(transport, batch)
    assert result.statuses == (OK, OK, MISSING, OK, OK, OK, MISSING)
    assert [buffers[index] for index in (0, 1, 3, 4, 5)] == [batch.pages[index] for index in (0, 1, 3, 4, 5)]
    assert buffers[2] == bytes(LARGE.page_bytes), "a page that is missing leaves its buffer alone"
    transport.close()


@pytest.mark.parametrize("layers", list(itertools.combinations(range(LARGE.layers + 1), 2)))
@pytest.mark.parametrize("by_layer", [False, True])
def test_a_range_of_layers_is_that_slice_of_each_page(node: ChannelNode, layers: tuple[int, int], by_layer: bool) -> None:
    batch = make_batch(2, model="layers", layout=LARGE)
    node.keep(batch)
    begin, end = layers
    buffers = [bytearray((end - begin) * LARGE.layer_bytes) for _ in batch.pages]
    told: list[tuple[int, int]] = []
    plan = read_plan(batch, buffers, layers=layers, on_layer=(lambda *layer: told.append(layer)) if by_layer else None)
    transport = node.transport()
    transport.read(plan).wait()
    assert plan.landing.result().leading_hits == 2
    assert buffers == [page[begin * LARGE.layer_bytes : end * LARGE.layer_bytes] for page in batch.pages]
    assert told == ([(layer, 2) for layer in range(begin, end)] if by_layer else [])
    transport.close()


def test_a_connection_is_used_again_after_a_whole_exchange(node: ChannelNode) -> None:
    batch = make_batch(2, model="pooled")
    node.keep(batch)
    tokens: list[bytes] = []

    def open_channel(_name: str, _deadline: object) -> tuple[str, bytes]:
        tokens.append(node.tokens.issue("default"))
        return f":{node.server.port}", tokens[-1]

    transport = TcpTransport("127.0.0.1", open_channel, 1)
    for _ in range(3):
        assert read(transport, batch)[0].leading_hits == 2
        assert set(transport.write(write_plan(batch)).wait().verdicts) == {PageStatus.ALREADY_PRESENT}
    assert len(tokens) == 1
    transport.close()


def test_requests_are_numbered_on_past_the_largest_number(node: ChannelNode) -> None:
    batch = make_batch(3, model="wraps")
    node.keep(batch)
    transport = node.transport()
    assert read(transport, batch)[0].leading_hits == 3
    (channel,) = transport._pool._idle
    for started in range((1 << 32) - 3, 1 << 32):
        channel._request = started
        assert read(transport, batch)[0].leading_hits == 3
        assert set(transport.write(write_plan(batch)).wait().verdicts) == {PageStatus.ALREADY_PRESENT}
        plan = MatchPlan(batch.namespace, [batch.hashes], 0, Deadline(MonotonicClock(), PATIENCE_MS))
        assert transport.match(plan).wait().hits == (3,)
        assert transport._pool._idle == [channel], "the connection was never replaced"
        assert channel._request < 3
    transport.close()


def test_a_refusal_arrives_as_the_error_that_it_is(node: ChannelNode) -> None:
    batch = make_batch(1, model="refusal")
    transport = node.transport()
    for call in (
        lambda: transport.read(read_plan(batch, batch.buffers())).wait(),
        lambda: transport.write(write_plan(batch)).wait(),
    ):
        with pytest.raises(errors.NamespaceUnknown):
            call()
    node.register(batch, tenant="another")
    for call in (
        lambda: transport.read(read_plan(batch, batch.buffers())).wait(),
        lambda: transport.write(write_plan(batch)).wait(),
    ):
        with pytest.raises(errors.NamespaceUnknown):
            call()
    transport.close()


def test_a_write_that_was_refused_ends_with_the_nodes_last_answer() -> None:
    """Its later pages are in flight: a slow node would store them after the caller has registered the namespace again."""
    batch = make_batch(4, model="refused")
    answered: list[int] = []

    def serve(end: NodeEnd) -> None:
        for index in range(4):
            frame, _ = end.next_request()
            time.sleep(0.1 * index)
            answered.append(index)
            end.stream.send(encode_refusal(frame.request, errors.NamespaceUnknown("who?")))

    with scripted(serve) as transport:
        with pytest.raises(errors.NamespaceUnknown):
            transport.write(write_plan(batch)).wait()
        assert answered == [0, 1, 2, 3]


# Credits


def test_at_most_the_credits_are_on_the_way_without_a_verdict() -> None:
    batch = make_batch(20, model="credits")
    allowed = threading.Event()
    waiting: list[int] = []

    def serve(end: NodeEnd) -> None:
        for index in range(5):
            assert end.next_request()[0].page == index
        end.stream.bound(lambda: 200)
        with pytest.raises(DeadlineExceeded):
            end.next_request()
        waiting.append(5)
        end.stream.bound(lambda: 20_000)
        for index in range(20):
            end.send(Kind.VERDICT, request=1, page=index, status=PageStatus.STORED)
            if index + 5 < 20:
                assert end.next_request()[0].page == index + 5
        allowed.wait(20)

    with scripted(serve, credits=5) as transport:
        assert transport.write(write_plan(batch)).wait().verdicts == (PageStatus.STORED,) * 20
        allowed.set()
    assert waiting == [5]


def test_a_node_cannot_make_a_client_send_without_end() -> None:
    batch = make_batch(CHANNEL_CREDITS + 5, model="generous")
    counted: list[int] = []

    def serve(end: NodeEnd) -> None:
        end.stream.bound(lambda: 300)
        with pytest.raises(DeadlineExceeded):
            counted.extend(end.next_request()[0].page for _ in itertools.count())

    with scripted(serve, credits=2**32 - 1) as transport, pytest.raises(errors.Retryable):
        transport.write(write_plan(batch)).wait()
    assert counted == list(range(CHANNEL_CREDITS))


@pytest.mark.parametrize("hashes_max", [3, CHANNEL_READ_HASHES_MAX, 2**32 - 1])
def test_at_most_two_reads_are_on_the_way_and_the_second_fits_any_buffer(hashes_max: int) -> None:
    each = min(hashes_max, CHANNEL_SECOND_READ_HASHES_MAX)
    batch = make_batch(each * 3, model="two reads")
    asked: list[tuple[int, int]] = []

    def serve(end: NodeEnd) -> None:
        for _ in range(2):
            frame, joined = end.next_request()
            asked.append((frame.request, len(joined) // HASH_BYTES))
        end.stream.bound(lambda: 200)
        with pytest.raises(DeadlineExceeded):
            end.next_request()
        end.stream.bound(lambda: 20_000)
        for request, count in ((1, each), (2, each), (3, each)):
            for index in range(count):
                end.send(Kind.SLICE, request=request, page=index, status=MISSING)
            if request == 1:
                frame, joined = end.next_request()
                asked.append((frame.request, len(joined) // HASH_BYTES))
        end.next_request()

    with scripted(serve, hashes_max=hashes_max) as transport:
        assert set(read(transport, batch)[0].statuses) == {MISSING}
    assert asked == [(1, each), (2, each), (3, each)]


# A node that is wrong


def test_corrupt_bytes_are_a_status_and_the_other_pages_are_unharmed() -> None:
    batch = make_batch(3, model="corrupt")

    def serve(end: NodeEnd) -> None:
        frame, _ = end.next_request()
        end.slice(frame.request, 0, batch.pages[0])
        end.slice(frame.request, 1, bytes(SMALL.page_bytes), checksum=1)
        end.slice(frame.request, 2, batch.pages[2])
        end.next_request()

    with scripted(serve) as transport:
        result, buffers = read(transport, batch)
    assert result.statuses == (OK, CORRUPT, OK)
    assert (buffers[0], buffers[2]) == (batch.pages[0], batch.pages[2])


PAGE = b"p" * SMALL.page_bytes
TAKEN = [encode_slice(1, 0, len(PAGE), 0, page_checksum(PAGE)), PAGE]
MISS = encode_frame(Frame(Kind.SLICE, 1, status=MISSING))
WRONG_ANSWERS = {
    "another request": [encode_slice(2, 0, len(PAGE), 0, 0), PAGE],
    "a page not asked for": [encode_slice(1, 2, len(PAGE), 0, 0), PAGE],
    "a page far away": [encode_slice(1, 2**32 - 1, len(PAGE), 0, 0), PAGE],
    "a longer page": [encode_slice(1, 0, len(PAGE) + 1, 0, 0), PAGE, b"!"],
    "a shorter page": [encode_slice(1, 0, len(PAGE) - 1, 0, 0), PAGE[1:]],
    "another offset": [encode_slice(1, 0, len(PAGE), 1, 0), PAGE],
    "an offset that wraps": [encode_slice(1, 0, len(PAGE), 2**64 - 1, 0), PAGE],
    "a huge announcement": [encode_slice(1, 0, 2**40, 0, 0)],
    "a page twice": [*TAKEN, *TAKEN],
    "a page after its miss": [MISS, *TAKEN],
    "a miss after its page": [*TAKEN, MISS],
    "a miss twice": [MISS, MISS],
    "a verdict": [encode_frame(Frame(Kind.VERDICT, 1, status=PageStatus.STORED))],
    "a client's frame": [encode_frame(Frame(Kind.READ, 1))],
    "a status of its own": [encode_frame(Frame(Kind.SLICE, 1, status=CORRUPT))],
    "another welcome": [encode_frame(Frame(Kind.WELCOME, 1, 1))],
    "another language": [b"HTTP/1.1 200 OK\r\n".ljust(128)],
}


@pytest.mark.parametrize("wrong", list(WRONG_ANSWERS))
def test_a_wrong_answer_is_a_protocol_error_and_writes_nothing_outside_its_page(wrong: str) -> None:
    batch = make_batch(2, model="wrong answer")

    def serve(end: NodeEnd) -> None:
        end.next_request()
        end.stream.send(*WRONG_ANSWERS[wrong])
        end.next_request()

    guarded = [bytearray(b"\xaa" * (SMALL.page_bytes + 2)) for _ in batch.pages]
    views = [memoryview(buffer)[1:-1] for buffer in guarded]
    with scripted(serve) as transport, pytest.raises(ProtocolError):
        transport.read(read_plan(batch, views)).wait()  # type: ignore[arg-type]
    assert all(buffer[0] == buffer[-1] == 0xAA for buffer in guarded)
    assert guarded[1] == b"\xaa" * (SMALL.page_bytes + 2)


@pytest.mark.parametrize(
    "frame",
    [
        Frame(Kind.VERDICT, request=1, page=1, status=PageStatus.STORED),
        Frame(Kind.VERDICT, request=2, page=0, status=PageStatus.STORED),
        Frame(Kind.VERDICT, request=1, page=0, status=OK),
        Frame(Kind.SLICE, request=1, page=0, status=MISSING),
    ],
    ids=["another page", "another request", "no verdict", "a slice"],
)
def test_a_wrong_verdict_is_a_protocol_error(frame: Frame) -> None:
    batch = make_batch(2, model="wrong verdict")

    def serve(end: NodeEnd) -> None:
        end.next_request()
        end.stream.send(encode_frame(frame))
        end.next_request()
        end.next_request()

    with scripted(serve) as transport, pytest.raises(ProtocolError):
        transport.write(write_plan(batch)).wait()


@settings(derandomize=True, deadline=None, max_examples=60)
@given(st.binary(max_size=400), st.booleans(), st.booleans())
def test_whatever_a_node_says_the_read_ends_typed_and_within_its_buffers(noise: bytes, well_begun: bool, by_layer: bool) -> None:
    batch = make_batch(2, model="noise")
    if well_begun:
        noise = b"ATPC\x11\x01" + noise

    def serve(end: NodeEnd) -> None:
        end.next_request()
        end.stream.send(noise or b"?")

    guarded = [bytearray(b"\xaa" * (SMALL.page_bytes + 2)) for _ in batch.pages]
    views = [memoryview(buffer)[1:-1] for buffer in guarded]
    plan = read_plan(batch, views, on_layer=(lambda _layer, _pages: None) if by_layer else None)  # type: ignore[arg-type]
    with scripted(serve) as transport, pytest.raises((ProtocolError, Unavailable)):
        transport.read(plan).wait()
    assert all(buffer[0] == buffer[-1] == 0xAA for buffer in guarded)
    assert OK not in plan.landing.result().statuses


@pytest.mark.parametrize("welcome", [{"credits": 0}, {"hashes_max": 0}])
def test_a_welcome_that_allows_nothing_opens_nothing(welcome: dict[str, int]) -> None:
    batch = make_batch(1, model="no welcome")
    with scripted(pages_of(batch), **welcome) as transport, pytest.raises(BulkUnavailable):
        transport.read(read_plan(batch, batch.buffers())).wait()


# A node that stops


@pytest.mark.parametrize("cut", [0, 1, 127, 128, 129, 128 + SMALL.page_bytes - 1])
def test_a_node_that_stops_anywhere_costs_what_had_not_arrived(cut: int) -> None:
    batch = make_batch(2, model="stops")

    def serve(end: NodeEnd) -> None:
        frame, _ = end.next_request()
        end.slice(frame.request, 0, batch.pages[0])
        whole = encode_frame(Frame(Kind.SLICE, frame.request, 1, SMALL.page_bytes, status=OK)) + batch.pages[1]
        if cut:
            end.stream.send(whole[:cut])

    with scripted(serve) as transport:
        result, buffers = read(transport, batch)
    assert result.statuses == (OK, INCOMPLETE)
    assert isinstance(result.error, Unavailable)
    assert buffers[0] == batch.pages[0]


@pytest.mark.parametrize("trickle", [False, True])
def test_a_read_ends_with_its_deadline_even_if_bytes_trickle(trickle: bool) -> None:
    batch = make_batch(1, model="deadline")

    def serve(end: NodeEnd) -> None:
        frame, _ = end.next_request()
        end.stream.send(encode_frame(Frame(Kind.SLICE, frame.request, 0, SMALL.page_bytes, status=OK)))
        for byte in batch.pages[0][:-1] if trickle else b"":
            end.stream.send(bytes([byte]))
            if threading.Event().wait(0.02):
                break
        end.next_request()

    with scripted(serve) as transport:
        result, _ = read(transport, batch, deadline_ms=150)
    assert result.statuses == (INCOMPLETE,)
    assert isinstance(result.error, DeadlineExceeded)


def test_a_write_ends_with_its_deadline_when_nobody_reads() -> None:
    batch = make_batch(40, model="write deadline", layout=LARGE)
    ended = threading.Event()
    with scripted(lambda _end: bool(ended.wait(20)) and None) as transport:
        with pytest.raises(DeadlineExceeded):
            transport.write(write_plan(batch, deadline_ms=150)).wait()
        ended.set()
