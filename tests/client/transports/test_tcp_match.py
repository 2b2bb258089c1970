"""Match over the page channel gives the same answers as gRPC, and falls back to gRPC if a frame cannot carry the request."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pytest

from attnstore import errors
from attnstore.client.base import BulkUnavailable, MatchPlan
from attnstore.client.transports.choice import TransportChoice
from attnstore.client.transports.tcp import TcpTransport
from attnstore.clock import Deadline, MonotonicClock
from attnstore.errors import InvalidArgument, ProtocolError, Unavailable
from attnstore.limits import CHANNEL_MATCH_HASHES_MAX, CHANNEL_READ_HASHES_MAX, LEASE_MS_MAX
from attnstore.wire.match import encode_hits
from attnstore.wire.page_channel import Frame, Kind, encode_frame
from tests.channels import PATIENCE_MS, ChannelNode, NodeEnd, ScriptedNode, clean_node, scripted
from tests.samples import Batch, make_batch
from tests.transports import FakeTransport


@pytest.fixture
def node() -> Iterator[ChannelNode]:
    with clean_node() as node:
        yield node


def plan_of(batch: Batch, prefixes: Sequence[Sequence[bytes]], lease_ms: int = 0, deadline_ms: float = PATIENCE_MS) -> MatchPlan:
    return MatchPlan(batch.namespace, prefixes, lease_ms, Deadline(MonotonicClock(), deadline_ms))


def matches(node: ChannelNode) -> tuple[float, float, float]:
    """Returns calls, hit pages and missed pages, as counted by the node."""
    hit, missed = (node.sample("attnstore_pages_total", rpc="Match", status=status) for status in ("ok", "missing"))
    return node.sample("attnstore_rpc_total", rpc="Match", code="ok"), hit, missed


def test_each_prefix_gets_its_leading_hits_and_the_node_counts_them(node: ChannelNode) -> None:
    batch = make_batch(5, model="match")
    node.keep(batch)
    node.store.spaces.delete(batch.space, [batch.hashes[3]])
    transport = node.transport()
    prefixes: list[list[bytes]] = [batch.hashes, batch.hashes[:2], [], batch.hashes[3:], [batch.hashes[4]]]
    found = transport.match(plan_of(batch, prefixes)).wait()
    assert (found.hits, found.lease) == ((3, 2, 0, 0, 1), None)
    assert transport.match(plan_of(batch, [])).wait().hits == ()
    assert matches(node) == (2, 6, 4)
    transport.close()


def test_a_lease_keeps_what_it_found(node: ChannelNode) -> None:
    batch = make_batch(3, model="lease")
    node.keep(batch)
    transport = node.transport()
    found = transport.match(plan_of(batch, [batch.hashes], lease_ms=LEASE_MS_MAX)).wait()
    assert found.lease is not None
    assert found.lease.lease_ms == LEASE_MS_MAX
    assert node.store.statistics().pages_pinned == 3
    assert node.store.leases.release("default", found.lease.lease_id)
    assert node.is_clean()
    assert transport.match(plan_of(batch, [[bytes(32)]], lease_ms=1_000)).wait().lease is None
    transport.close()


def test_a_refusal_arrives_as_the_error_that_it_is_and_the_connection_serves_on(node: ChannelNode) -> None:
    batch = make_batch(2, model="refused")
    transport = node.transport()
    with pytest.raises(errors.NamespaceUnknown):
        transport.match(plan_of(batch, [batch.hashes])).wait()
    node.register(batch, tenant="another")
    with pytest.raises(errors.NamespaceUnknown):
        transport.match(plan_of(batch, [batch.hashes])).wait()
    with pytest.raises(InvalidArgument, match="32"):
        transport.match(plan_of(batch, [[b"short"]])).wait()
    transport.close()


def test_a_frame_that_does_not_hold_its_prefixes_is_refused_and_the_next_one_answered(node: ChannelNode) -> None:
    batch = make_batch(2, model="malformed")
    node.keep(batch)
    stream = node.connect()
    for prefixes, payload in ((1, b""), (9, bytes(12)), (1, bytes(4) + batch.hashes[0])):
        question = Frame(Kind.MATCH, request=7, page=prefixes, size_bytes=len(payload), namespace=batch.namespace)
        stream.send(encode_frame(question), payload)
        answer = stream.receive()
        assert (answer.kind, answer.request) == (Kind.REFUSED, 7)
        stream.receive(memoryview(bytearray(answer.size_bytes)))
    payload = (1).to_bytes(4, "little") + batch.hashes[0]
    stream.send(encode_frame(Frame(Kind.MATCH, page=1, size_bytes=len(payload), namespace=batch.namespace)), payload)
    answer = stream.receive()
    hits = bytearray(answer.size_bytes)
    stream.receive(memoryview(hits))
    assert (answer.kind, hits) == (Kind.MATCHED, encode_hits([1]))
    stream.close()


@pytest.mark.parametrize(("hits", "off"), [([3], 0), ([], 0), ([1, 1], 0), ([1], 1)])
def test_an_answer_to_another_question_breaks_the_protocol(hits: list[int], off: int) -> None:
    batch = make_batch(2, model="hostile")

    def serve(end: NodeEnd) -> None:
        frame, _ = end.next_request()
        payload = encode_hits(hits)
        end.stream.send(encode_frame(Frame(Kind.MATCHED, request=frame.request + off, size_bytes=len(payload))), payload)
        end.next_request()

    with scripted(serve) as transport, pytest.raises(ProtocolError):
        transport.match(plan_of(batch, [batch.hashes])).wait()


def test_a_node_that_does_not_answer_costs_the_deadline_and_one_that_leaves_is_unavailable() -> None:
    batch = make_batch(1, model="silent")

    def silent(end: NodeEnd) -> None:
        end.next_request()
        end.next_request()

    with scripted(silent) as transport, pytest.raises(errors.DeadlineExceeded):
        transport.match(plan_of(batch, [batch.hashes], deadline_ms=100)).wait()
    with scripted(lambda _end: None) as transport, pytest.raises(Unavailable):
        transport.match(plan_of(batch, [batch.hashes])).wait()


def test_a_node_that_does_not_tell_takes_as_many_hashes_as_in_a_read() -> None:
    batch = make_batch(1, model="silent")

    def script(end: NodeEnd) -> None:
        frame, _ = end.next_request()
        end.stream.send(encode_frame(Frame(Kind.MATCHED, request=frame.request, size_bytes=4)), bytes(4))

    silent = ScriptedNode(script, match_hashes_max=0)
    transport = silent.transport()
    assert transport.match(plan_of(batch, [batch.hashes])).wait().hits == (0,)
    assert transport.match(plan_of(batch, [batch.hashes * (CHANNEL_READ_HASHES_MAX + 1)])) is None
    transport.close()
    silent.close()


def test_what_a_frame_cannot_carry_and_a_port_that_is_blocked_are_left_to_grpc(node: ChannelNode) -> None:
    batch = make_batch(1, model="choice")
    node.keep(batch)
    transport = node.transport()
    assert transport.match(plan_of(batch, [batch.hashes * (CHANNEL_READ_HASHES_MAX + 1)])) is None, "before the node has told"
    most = transport.match(plan_of(batch, [batch.hashes] * CHANNEL_READ_HASHES_MAX)).wait()
    assert sum(most.hits) == CHANNEL_READ_HASHES_MAX
    assert transport.match(plan_of(batch, [batch.hashes * (CHANNEL_MATCH_HASHES_MAX + 1)])) is None
    assert transport.match(plan_of(batch, [[]] * (CHANNEL_MATCH_HASHES_MAX + 1))) is None
    most = transport.match(plan_of(batch, [batch.hashes] * CHANNEL_MATCH_HASHES_MAX)).wait()
    assert sum(most.hits) == CHANNEL_MATCH_HASHES_MAX
    transport.close()

    def blocked(_name: str, _deadline: Deadline) -> tuple[str, bytes]:
        raise BulkUnavailable("blocked")

    blocked_one, grpc = TcpTransport("127.0.0.1", blocked, 1), FakeTransport("grpc")
    choice = TransportChoice("auto", MonotonicClock())
    choice.offer([blocked_one, grpc])
    assert choice.wait(lambda transport: transport.match(plan_of(batch, [batch.hashes]))).hits == (0,)
    assert grpc.calls == 1
    blocked_one.close()


@pytest.mark.parametrize("lease_ms", [LEASE_MS_MAX + 1, 1 << 63])
def test_a_lease_that_no_node_grants_breaks_the_protocol(lease_ms: int) -> None:
    batch = make_batch(1, model="lying")

    def serve(end: NodeEnd) -> None:
        frame, _ = end.next_request()
        hits = encode_hits([1])
        answer = Frame(Kind.MATCHED, request=frame.request, size_bytes=len(hits), lease=bytes([1]) * 16, offset_bytes=lease_ms)
        end.stream.send(encode_frame(answer), hits)

    with scripted(serve) as transport, pytest.raises(errors.ProtocolError, match="lease"):
        transport.match(plan_of(batch, [batch.hashes], lease_ms=1_000)).wait()
