"""Connections of the tcp transport: opened, reused, replaced when they break, closed."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from attnstore import PageStatus, errors
from attnstore.client.base import BulkUnavailable
from attnstore.client.transports.tcp import TcpTransport
from attnstore.errors import ClientClosed, InvalidArgument
from attnstore.wire.page_channel import encode_refusal
from tests.channels import ChannelNode, NodeEnd, ScriptedNode, clean_node, read, read_plan, scripted, write_plan
from tests.samples import make_batch

OK, INCOMPLETE = PageStatus.OK, PageStatus.INCOMPLETE


@pytest.fixture
def node() -> Iterator[ChannelNode]:
    with clean_node() as node:
        yield node


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
        assert set(transport.write(write_plan(batch)).wait().verdicts) == {PageStatus.ALREADY_PRESENT}
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
            transport.read(read_plan(batch, batch.buffers())).wait()
        transport.close()


@pytest.mark.parametrize("error", [InvalidArgument("not offered any more"), errors.Overloaded("too many tokens")])
def test_a_node_that_opens_no_channel_is_a_transport_that_is_unavailable(error: errors.AttnStoreError) -> None:
    batch = make_batch(1, model="not opened")

    def open_channel(_name: str, _deadline: object) -> tuple[str, bytes]:
        raise error

    transport = TcpTransport("127.0.0.1", open_channel, 1)
    with pytest.raises(BulkUnavailable):
        transport.write(write_plan(batch)).wait()
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
        transport.read(plan).wait()
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
        transport.read(read_plan(batch, batch.buffers())).wait()
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
    assert transport.write(write_plan(batch)).wait().verdicts == (PageStatus.STORED,) * 9
    result, buffers = read(transport, batch)
    assert (result.leading_hits, buffers) == (9, batch.pages)
    transport.close()


def test_if_no_part_finds_a_connection_the_transport_is_unavailable() -> None:
    batch = make_batch(9, model="all homeless")

    def open_channel(_name: str, _deadline: object) -> tuple[str, bytes]:
        raise errors.Overloaded("none")

    transport = TcpTransport("127.0.0.1", open_channel, 3)
    with pytest.raises(BulkUnavailable):
        transport.read(read_plan(batch, batch.buffers())).wait()
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
            transport.read(read_plan(batch, batch.buffers())).wait()
        except errors.AttnStoreError as error:
            return type(error)
        return None

    with scripted(serve, channels=channels) as transport, ThreadPoolExecutor(1) as thread:
        reading = thread.submit(outcome, transport)
        running.wait(20)
        transport.close()
        assert reading.result(20) is ClientClosed
        assert outcome(transport) is ClientClosed
