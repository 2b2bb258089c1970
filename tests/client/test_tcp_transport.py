"""The tcp transport against a node that does exactly, or anything but, what it should."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from attnstore import PageStatus, errors
from attnstore.client.bulk import BulkUnavailable
from attnstore.client.tcp_transport import TcpTransport
from attnstore.core.hashing import page_checksum
from attnstore.errors import ClientClosed, DeadlineExceeded, InvalidArgument, ProtocolError, Unavailable
from attnstore.limits import (
    CHANNEL_CREDITS,
    CHANNEL_GATHER_PAGES,
    CHANNEL_READ_HASHES_MAX,
    CHANNEL_SECOND_READ_HASHES_MAX,
    HASH_BYTES,
)
from attnstore.types import ReadResult
from attnstore.wire.page_channel import Frame, Kind, Order, encode_frame, encode_refusal, encode_slice
from tests.channels import ChannelNode, NodeEnd, Script, ScriptedNode, clean_node, read_plan, scripted, write_plan
from tests.samples import LARGE, SMALL, Batch, make_batch

OK, MISSING, CORRUPT, INCOMPLETE = PageStatus.OK, PageStatus.MISSING, PageStatus.CORRUPT, PageStatus.INCOMPLETE
LAYER = SMALL.layer_bytes


@pytest.fixture
def node() -> Iterator[ChannelNode]:
    with clean_node() as node:
        yield node


def pages_of(batch: Batch) -> Script:
    """A node that has the batch, and sends what it is asked for."""
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
        transport.read(plan)
    except errors.Retryable as error:
        return plan.landing.result(error), buffers
    return plan.landing.result(), buffers


# What works


@pytest.mark.parametrize("channels", [1, 4])
@pytest.mark.parametrize("pages", [1, 3, 4, 5, 70])
def test_pages_go_and_come_back_whatever_number_of_channels_carries_them(node: ChannelNode, channels: int, pages: int) -> None:
    batch = make_batch(pages, model="round trip")
    node.register(batch)
    transport = node.transport(channels)
    assert transport.write(write_plan(batch)) == (PageStatus.STORED,) * pages
    assert transport.write(write_plan(batch)) == (PageStatus.ALREADY_PRESENT,) * pages
    result, buffers = read(transport, batch)
    assert (result.leading_hits, buffers) == (pages, batch.pages)
    transport.close()


def test_each_channel_gets_its_own_part_and_the_parts_are_the_whole(node: ChannelNode) -> None:
    batch = make_batch(7, model="parts", layout=LARGE)
    node.register(batch)
    transport = node.transport(channels=4)
    transport.write(write_plan(batch))
    node.store.delete(batch.namespace, [batch.hashes[2], batch.hashes[6]])
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
    transport.read(plan)
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
        assert set(transport.write(write_plan(batch))) == {PageStatus.ALREADY_PRESENT}
    assert len(tokens) == 1
    transport.close()


def test_a_refusal_arrives_as_the_error_that_it_is(node: ChannelNode) -> None:
    batch = make_batch(1, model="refusal")
    transport = node.transport()
    for call in (lambda: transport.read(read_plan(batch, batch.buffers())), lambda: transport.write(write_plan(batch))):
        with pytest.raises(errors.NamespaceUnknown):
            call()
    node.register(batch, tenant="another")
    for call in (lambda: transport.read(read_plan(batch, batch.buffers())), lambda: transport.write(write_plan(batch))):
        with pytest.raises(errors.PermissionDenied):
            call()
    transport.close()


# Layer by layer


def test_layers_are_told_of_in_order_once_each_and_only_when_they_are_there(node: ChannelNode) -> None:
    pages = CHANNEL_GATHER_PAGES + 3
    batch = make_batch(pages, model="on layer")
    node.keep(batch)
    buffers = batch.buffers()
    seen: list[tuple[int, int]] = []

    def on_layer(layer: int, count: int) -> None:
        seen.append((layer, count))
        upto = (layer + 1) * LAYER
        assert [buffer[:upto] for buffer in buffers[:count]] == [page[:upto] for page in batch.pages[:count]]

    transport = node.transport(channels=4)
    plan = read_plan(batch, buffers, on_layer=on_layer)
    transport.read(plan)
    assert seen == [(layer, pages) for layer in range(SMALL.layers)]
    assert plan.landing.result().leading_hits == pages
    transport.close()


@pytest.mark.parametrize("missing", [{0}, {1}, {3}, {0, 3}, {1, 2}, {0, 1, 2, 3}])
def test_on_layer_counts_the_leading_pages_before_the_first_miss(node: ChannelNode, missing: set[int]) -> None:
    batch = make_batch(4, model="on layer with misses")
    node.keep(batch)
    node.store.delete(batch.namespace, [batch.hashes[index] for index in missing])
    seen: list[tuple[int, int]] = []
    transport = node.transport()
    result, buffers = read(transport, batch, on_layer=lambda *told: seen.append(told))
    assert seen == [(layer, min(missing)) for layer in range(SMALL.layers)]
    assert result.statuses == tuple(MISSING if index in missing else OK for index in range(4))
    assert all(buffers[index] == batch.pages[index] for index in range(4) if index not in missing)
    transport.close()


def test_what_on_layer_raises_reaches_the_caller_and_costs_the_connection(node: ChannelNode) -> None:
    batch = make_batch(2, model="on layer raises")
    node.keep(batch)
    transport = node.transport()

    def on_layer(_layer: int, _pages: int) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        transport.read(read_plan(batch, batch.buffers(), on_layer=on_layer))
    assert read(transport, batch)[0].leading_hits == 2
    transport.close()


def layers_of(*slices: tuple[int, int, bytes]) -> Script:
    """A node that answers a read by layers with `(page, layer, bytes)` each, with right checksums."""

    def serve(end: NodeEnd) -> None:
        frame, _ = end.next_request()
        assert frame.order is Order.LAYERS
        for page, layer, data in slices:
            end.slice(frame.request, page, data, offset_bytes=layer * LAYER)
        end.next_request()

    return serve


FULL = bytes(LAYER)


@pytest.mark.parametrize(
    "slices",
    [
        [(0, 0, FULL), (0, 1, FULL)],
        [(0, 0, FULL), (0, 0, FULL)],
        [(1, 0, FULL)],
        [(0, 1, FULL * 2)],
        [(0, 0, FULL * 2), (0, 0, FULL * 2)],
        [(0, 0, FULL * 3)],
        [(0, 0, FULL[:-1])],
        [(2, 0, FULL)],
        [(2**32 - 1, 0, FULL)],
    ],
    ids=str,
)
def test_layers_that_do_not_come_in_turn_break_the_protocol_before_anybody_is_told(slices: list[tuple[int, int, bytes]]) -> None:
    batch = make_batch(2, model="layers out of turn")
    told: list[tuple[int, int]] = []
    with scripted(layers_of(*slices)) as transport, pytest.raises(ProtocolError):
        transport.read(read_plan(batch, batch.buffers(), on_layer=lambda *layer: told.append(layer)))
    assert all(layer == (0, 2) for layer in told)
    assert len(told) <= 1


def test_a_node_cannot_gather_more_pages_than_agreed() -> None:
    pages = CHANNEL_GATHER_PAGES + 1
    batch = make_batch(pages, model="gather")
    with scripted(layers_of((0, 0, FULL * pages))) as transport, pytest.raises(ProtocolError):
        transport.read(read_plan(batch, batch.buffers(), on_layer=lambda _layer, _pages: None))


def test_a_corrupt_layer_stops_the_count_there_and_marks_its_pages() -> None:
    batch = make_batch(3, model="corrupt layer")

    def serve(end: NodeEnd) -> None:
        frame, _ = end.next_request()
        for layer in range(SMALL.layers):
            for index, page in enumerate(batch.pages):
                data = page[layer * LAYER : (layer + 1) * LAYER]
                wrong = {"checksum": 1} if (index, layer) == (1, 0) else {}
                end.slice(frame.request, index, data, offset_bytes=layer * LAYER, **wrong)
        end.next_request()

    told: list[tuple[int, int]] = []
    with scripted(serve) as transport:
        result, buffers = read(transport, batch, on_layer=lambda *layer: told.append(layer))
    assert result.statuses == (OK, CORRUPT, OK)
    assert told == [(0, 1), (1, 1)]
    assert (buffers[0], buffers[2]) == (batch.pages[0], batch.pages[2])


def test_a_node_cannot_name_a_layer_through_a_page_that_is_corrupt_already() -> None:
    batch = make_batch(1, model="corrupt and lying")
    told: list[tuple[int, int]] = []

    def serve(end: NodeEnd) -> None:
        frame, _ = end.next_request()
        end.slice(frame.request, 0, FULL, checksum=1)
        end.slice(frame.request, 0, FULL, offset_bytes=9 * LAYER)
        end.next_request()

    with scripted(serve) as transport, pytest.raises(ProtocolError):
        transport.read(read_plan(batch, batch.buffers(), on_layer=lambda *layer: told.append(layer)))
    assert told == [(0, 0)]


def test_a_node_that_takes_fewer_pages_by_layer_is_not_asked_for_more() -> None:
    batch = make_batch(3, model="fewer")
    with scripted(pages_of(batch), hashes_max=2) as transport:
        with pytest.raises(InvalidArgument):
            transport.read(read_plan(batch, batch.buffers(), on_layer=lambda _layer, _pages: None))
        assert read(transport, batch)[0].leading_hits == 3


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
        assert transport.write(write_plan(batch)) == (PageStatus.STORED,) * 20
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
        transport.write(write_plan(batch))
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
        transport.read(read_plan(batch, views))  # type: ignore[arg-type]
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
        transport.write(write_plan(batch))


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
        transport.read(plan)
    assert all(buffer[0] == buffer[-1] == 0xAA for buffer in guarded)
    assert OK not in plan.landing.result().statuses


@pytest.mark.parametrize("welcome", [{"credits": 0}, {"hashes_max": 0}])
def test_a_welcome_that_allows_nothing_opens_nothing(welcome: dict[str, int]) -> None:
    batch = make_batch(1, model="no welcome")
    with scripted(pages_of(batch), **welcome) as transport, pytest.raises(BulkUnavailable):
        transport.read(read_plan(batch, batch.buffers()))


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
            transport.write(write_plan(batch, deadline_ms=150))
        ended.set()


# Connections that die


def test_a_pooled_connection_that_died_meanwhile_is_replaced_without_a_word(node: ChannelNode) -> None:
    batch = make_batch(2, model="died")
    node.keep(batch)
    transport = node.transport()
    assert read(transport, batch)[0].leading_hits == 2
    node.stop()
    other = ChannelNode()
    try:
        other.keep(batch)
        transport._open_channel = lambda _name, _deadline: (f":{other.server.port}", other.tokens.issue("default"))
        assert read(transport, batch)[0].leading_hits == 2
        assert set(transport.write(write_plan(batch))) == {PageStatus.ALREADY_PRESENT}
    finally:
        transport.close()
        other.close()


def test_an_exchange_that_had_an_answer_is_not_begun_again() -> None:
    batch = make_batch(2, model="begun")
    reads: list[int] = []

    def serve(end: NodeEnd) -> None:
        for turn in itertools.count():
            frame, _ = end.next_request()
            reads.append(end.number)
            end.slice(frame.request, 0, batch.pages[0])
            if turn == 1:
                return
            end.slice(frame.request, 1, batch.pages[1])

    with scripted(serve) as transport:
        assert read(transport, batch)[0].leading_hits == 2
        result, _ = read(transport, batch)
    assert result.statuses == (OK, INCOMPLETE)
    assert reads == [0, 0]


def test_a_closed_port_a_silent_port_and_a_bad_address_are_said_to_be_unavailable() -> None:
    batch = make_batch(1, model="unavailable")
    silent = ScriptedNode(lambda _end: None)
    silent.close()
    for address in (f"127.0.0.1:{silent.port}", "nonsense", "127.0.0.1:99999", ":"):
        transport = TcpTransport("127.0.0.1", lambda _name, _deadline, address=address: (address, bytes(32)), 1)  # type: ignore[misc]
        with pytest.raises(BulkUnavailable):
            transport.read(read_plan(batch, batch.buffers()))
        transport.close()


@pytest.mark.parametrize("error", [InvalidArgument("not offered any more"), errors.Overloaded("too many tokens")])
def test_a_node_that_opens_no_channel_is_a_transport_that_is_unavailable(error: errors.AttnStoreError) -> None:
    batch = make_batch(1, model="not opened")

    def open_channel(_name: str, _deadline: object) -> tuple[str, bytes]:
        raise error

    transport = TcpTransport("127.0.0.1", open_channel, 1)
    with pytest.raises(BulkUnavailable):
        transport.write(write_plan(batch))
    transport.close()


def test_an_opening_that_hangs_leaves_half_of_the_time_to_the_next_transport() -> None:
    batch = make_batch(1, model="hangs")
    ended = threading.Event()

    class SilentNode(ScriptedNode):
        def _serve(self, _end: NodeEnd) -> None:
            ended.wait(20)

    node = SilentNode(lambda _end: None)
    transport = node.transport()
    plan = read_plan(batch, batch.buffers(), deadline_ms=2_000)
    with pytest.raises(BulkUnavailable):
        transport.read(plan)
    assert plan.deadline.left_ms() > 0
    ended.set()
    transport.close()
    node.close()


def test_a_refused_hello_says_why() -> None:
    batch = make_batch(1, model="refused hello")

    class Refusing(ScriptedNode):
        def _serve(self, end: NodeEnd) -> None:
            end.next_request()
            end.stream.send(encode_refusal(0, errors.Unauthenticated("too old")))

    node = Refusing(lambda _end: None)
    transport = node.transport()
    with pytest.raises(BulkUnavailable, match="too old"):
        transport.read(read_plan(batch, batch.buffers()))
    transport.close()
    node.close()


def test_a_part_without_a_connection_of_its_own_goes_over_anothers(node: ChannelNode) -> None:
    batch = make_batch(9, model="homeless")
    node.register(batch)
    opened: list[int] = []
    lock = threading.Lock()

    def open_channel(_name: str, _deadline: object) -> tuple[str, bytes]:
        with lock:
            opened.append(1)
            if len(opened) > 1:
                raise errors.Overloaded("one connection is all you get")
        return f":{node.server.port}", node.tokens.issue("default")

    transport = TcpTransport("127.0.0.1", open_channel, 3)
    assert transport.write(write_plan(batch)) == (PageStatus.STORED,) * 9
    result, buffers = read(transport, batch)
    assert (result.leading_hits, buffers) == (9, batch.pages)
    transport.close()


def test_if_no_part_finds_a_connection_the_transport_is_unavailable() -> None:
    batch = make_batch(9, model="all homeless")

    def open_channel(_name: str, _deadline: object) -> tuple[str, bytes]:
        raise errors.Overloaded("none")

    transport = TcpTransport("127.0.0.1", open_channel, 3)
    with pytest.raises(BulkUnavailable):
        transport.read(read_plan(batch, batch.buffers()))
    transport.close()


# The end


@pytest.mark.parametrize("channels", [1, 2])
def test_closing_ends_what_runs_and_what_comes_after_with_the_reason(channels: int) -> None:
    batch = make_batch(4, model="closing")
    running = threading.Barrier(channels + 1)

    def serve(end: NodeEnd) -> None:
        end.next_request()
        running.wait(20)
        end.next_request()

    def outcome(transport: TcpTransport) -> type[BaseException] | None:
        try:
            transport.read(read_plan(batch, batch.buffers()))
        except errors.AttnStoreError as error:
            return type(error)
        return None

    with scripted(serve, channels=channels) as transport, ThreadPoolExecutor(1) as thread:
        reading = thread.submit(outcome, transport)
        running.wait(20)
        transport.close()
        assert reading.result(20) is ClientClosed
        assert outcome(transport) is ClientClosed
