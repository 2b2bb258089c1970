"""A node that attends: sets and leases, wrong queries and lost leases, over a real page channel in this process."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from attnstore import PageLayout, errors
from attnstore.client.transports.attend import ChannelAttend
from attnstore.clock import MonotonicClock
from attnstore.core.hashing import joint_checksum
from attnstore.core.layout import DType
from attnstore.limits import ATTEND_ROWS_MAX, ATTEND_SETS_MAX
from attnstore.server import attend as attend_module
from attnstore.streams.frames import FrameStream
from attnstore.testing.clock import ManualClock
from attnstore.types import Lease
from attnstore.wire.attend import AttendShape, encode_sets
from attnstore.wire.page_channel import Frame, Kind, encode_frame
from tests.channels import PATIENCE_MS, ChannelNode, refusal
from tests.samples import Batch, eventually, make_batch

LAYOUT = PageLayout(layers=2, kv_heads=2, head_dim=64, dtype=DType.FP32)
Q_HEADS = 4
LEASE_MS = 60_000


class Node:
    """A page channel that attends, with pages of finite numbers."""

    def __init__(self, *, attends: bool = True) -> None:
        self.clock = ManualClock()
        self.channel = ChannelNode(clock=self.clock, attend_threads=int(attends))
        self.attending = self.channel.attending
        if self.attending is not None:
            self.attending.warm_up()  # compiling may take longer than a query's deadline
        torch.manual_seed(3)
        pages = torch.randn(6, *LAYOUT.shape)
        made = make_batch(6, model="attend", layout=LAYOUT)
        self.batch = Batch(LAYOUT, made.namespace, made.hashes, [page.numpy().tobytes() for page in pages])
        self.channel.keep(self.batch)

    def lease(self, pages: int = 6) -> Lease:
        found = self.channel.store.leases.match(self.batch.space, [self.batch.hashes[:pages]], LEASE_MS)
        assert found.lease_id is not None
        return Lease(found.lease_id, found.lease_ms)

    def stream(self, *, q_heads: int = Q_HEADS, tenant: str = "default") -> ChannelAttend:
        return self.attend(self.channel.connect(tenant), q_heads=q_heads)

    def attend(self, channel: FrameStream, *, q_heads: int = Q_HEADS, scale: float = 0.125) -> ChannelAttend:
        return ChannelAttend(channel, AttendShape(self.batch.namespace, q_heads, scale), MonotonicClock(), PATIENCE_MS)

    def pinned(self) -> int:
        return self.channel.store.statistics().pages_pinned


@pytest.fixture
def node() -> Iterator[Node]:
    node = Node()
    try:
        yield node
        node.channel.stop()
        node.clock.advance_ms(10 * LEASE_MS)
        node.channel.store.spaces.expire()
        assert node.channel.is_clean()
    finally:
        node.channel.close()


def ask(stream: ChannelAttend, set_id: int, *, rows: int = 1, layer: int = 0, query: torch.Tensor | None = None) -> torch.Tensor:
    query = torch.ones(rows, Q_HEADS, LAYOUT.head_dim) if query is None else query
    out, lse = torch.empty(rows, Q_HEADS, LAYOUT.head_dim), torch.empty(rows, Q_HEADS)
    stream.ask(layer, [(set_id, rows)], memoryview(query.numpy()).cast("B"))
    stream.receive(memoryview(out.numpy()).cast("B"), memoryview(lse.numpy()).cast("B"))
    assert torch.isfinite(out).all()
    return out


def test_an_open_set_keeps_its_pages_and_a_closed_one_lets_them_go(node: Node) -> None:
    lease = node.lease()
    with node.stream() as stream:
        first, second = stream.open(node.batch.hashes, lease), stream.open(node.batch.hashes[:2], lease)
        ask(stream, first)
        node.channel.store.leases.release("default", lease.lease_id)
        assert node.pinned() == 6, "the stream's own hold"
        stream.close_set(first)
        assert eventually(lambda: node.pinned() == 2)
        stream.close_set(second)
        assert eventually(lambda: node.pinned() == 0)


def test_the_end_of_the_connection_lets_all_pages_go(node: Node) -> None:
    lease = node.lease()
    with node.stream() as stream:
        stream.open(node.batch.hashes, lease)
        node.channel.store.leases.release("default", lease.lease_id)
    assert eventually(lambda: node.pinned() == 0)


def test_a_lease_that_runs_out_ends_the_set_at_the_next_query(node: Node) -> None:
    with node.stream() as stream:
        set_id = stream.open(node.batch.hashes, node.lease())
        ask(stream, set_id)
        node.clock.advance_ms(LEASE_MS + 1)
        with pytest.raises(errors.LeaseExpired, match="match again"):
            ask(stream, set_id)


def test_a_renewed_lease_keeps_its_set(node: Node) -> None:
    with node.stream() as stream:
        lease = node.lease()
        set_id = stream.open(node.batch.hashes, lease)
        node.clock.advance_ms(LEASE_MS - 1)
        node.channel.store.leases.renew("default", lease.lease_id, LEASE_MS)
        node.clock.advance_ms(LEASE_MS - 1)
        ask(stream, set_id)


def test_the_pages_of_a_silent_client_come_back_when_its_lease_has_run_out(node: Node) -> None:
    with node.stream() as stream:
        stream.open(node.batch.hashes, node.lease())
        node.clock.advance_ms(LEASE_MS + 1)
        node.channel.store.spaces.expire()
        assert node.pinned() == 6
        assert node.attending is not None
        node.attending.expire()
        assert node.pinned() == 0


def test_a_page_that_is_not_there_refuses_the_set_and_holds_nothing(node: Node) -> None:
    absent = make_batch(7, model="attend", layout=LAYOUT).hashes[6]
    lease = node.lease(1)
    with node.stream() as stream:
        with pytest.raises(errors.LeaseExpired, match="page 2 of the set's 3"):
            stream.open([*node.batch.hashes[:2], absent], lease)
        node.channel.store.leases.release("default", lease.lease_id)
        assert node.pinned() == 0
        stream.open(node.batch.hashes, node.lease())  # the stream continues


def test_wrong_queries_are_refused_and_the_stream_goes_on(node: Node) -> None:
    infinite = torch.ones(1, Q_HEADS, LAYOUT.head_dim)
    infinite[0, 1, 2] = torch.nan
    with node.stream() as stream:
        set_id = stream.open(node.batch.hashes, node.lease())
        expected = ask(stream, set_id)
        wrong = [
            (lambda: ask(stream, set_id, query=infinite), errors.InvalidArgument, "finite"),
            (lambda: ask(stream, set_id, layer=LAYOUT.layers), errors.InvalidArgument, "layer is 2"),
            (lambda: ask(stream, set_id, query=torch.ones(1, Q_HEADS, 8)), errors.InvalidArgument, "bytes"),
            (lambda: ask(stream, set_id, rows=2, query=torch.ones(1, Q_HEADS, 64)), errors.InvalidArgument, "bytes"),
            (lambda: ask(stream, 77), errors.LeaseExpired, "not open"),
        ]
        for act, error, words in wrong:
            with pytest.raises(error, match=words):
                act()
            assert torch.equal(ask(stream, set_id), expected)


def test_a_query_of_a_wrong_size_is_refused_before_memory_is_taken_for_it(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    """A frame of some bytes may claim 1,024 rows of 1,024 heads, which would take gigabytes."""
    assert node.attending is not None
    prepared: list[object] = []
    prepare = node.attending.prepare
    monkeypatch.setattr(node.attending, "prepare", lambda *asked: prepared.append(asked) or prepare(*asked))
    with node.stream() as stream:
        set_id = stream.open(node.batch.hashes, node.lease())
        for rows, size in ((1024, 8), (2, Q_HEADS * 64 * 4)):
            stream.ask(0, [(set_id, rows)], bytes(size))
            with pytest.raises(errors.InvalidArgument, match="bytes"):
                stream.receive(memoryview(bytearray(8)), memoryview(bytearray(8)))
        stream.ask(LAYOUT.layers, [(set_id, 1)], bytes(Q_HEADS * 64 * 4))
        with pytest.raises(errors.InvalidArgument, match="layer"):
            stream.receive(memoryview(bytearray(8)), memoryview(bytearray(8)))
        assert prepared == []
        ask(stream, set_id)
        assert len(prepared) == 1


def test_prepared_queries_of_a_stream_are_bounded_by_their_rows(node: Node) -> None:
    with node.stream() as stream:
        set_id = stream.open(node.batch.hashes, node.lease())
        assert node.attending is not None
        [session] = node.attending._sessions
        for rows in (1024, 1000, 24, 1, 2, 3, 1023):
            ask(stream, set_id, rows=rows)
            assert sum(question.rows for question in session._questions.values()) <= ATTEND_ROWS_MAX
        assert eventually(lambda: len(session._questions) > 0)


def test_more_rows_than_allowed_never_leave_the_client(node: Node) -> None:
    with node.stream() as stream:
        set_id = stream.open(node.batch.hashes, node.lease())
        with pytest.raises(errors.InvalidArgument, match="rows"):
            stream.ask(0, [(set_id, 1025)], bytes(1025 * Q_HEADS * LAYOUT.head_dim * 4))
        ask(stream, set_id)


def test_a_node_refuses_more_rows_than_it_allows(node: Node) -> None:
    stream = node.channel.connect()
    payload = (0).to_bytes(4, "little") + (4096).to_bytes(4, "little")
    stream.send(encode_frame(Frame(Kind.ATTEND, request=1, page=1, size_bytes=len(payload))), payload)
    frame = stream.receive()
    assert frame.kind is Kind.REFUSED
    stream.close()


def test_heads_that_do_not_divide_and_a_second_shape_are_refused(node: Node) -> None:
    with node.stream(q_heads=3) as stream, pytest.raises(errors.InvalidArgument, match="multiple"):
        stream.open(node.batch.hashes, node.lease())
    channel = node.channel.connect()
    with node.attend(channel) as stream:
        stream.open(node.batch.hashes, node.lease())
        other = node.attend(channel, scale=0.5)
        with pytest.raises(errors.InvalidArgument, match="set 0 is open"):
            other.open(node.batch.hashes, node.lease())
        with pytest.raises(errors.InvalidArgument, match="another stream"):
            other.open(node.batch.hashes, node.lease())


def test_a_stream_has_a_maximum_of_sets(node: Node) -> None:
    lease = node.lease()
    with node.stream() as stream:
        for _ in range(ATTEND_SETS_MAX):
            stream.open(node.batch.hashes[:1], lease)
        with pytest.raises(errors.InvalidArgument, match="sets are open"):
            stream.open(node.batch.hashes[:1], lease)


def test_a_set_that_names_a_page_twice_is_refused(node: Node) -> None:
    with node.stream() as stream, pytest.raises(errors.InvalidArgument, match="twice"):
        stream.open(node.batch.hashes[:1] * 2, node.lease())


def opens(stream: ChannelAttend, node: Node) -> bool:
    try:
        stream.open(node.batch.hashes, node.lease())
    except errors.Overloaded:
        return False
    return True


def test_the_pages_of_all_sets_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attend_module, "ATTEND_PAGES_MAX", 12)
    node = Node()
    try:
        with node.stream() as first, node.stream() as second:
            sets = [first.open(node.batch.hashes, node.lease()), second.open(node.batch.hashes[:5], node.lease())]
            with pytest.raises(errors.Overloaded, match=r"12 pages of attended sets .* holds 11 .* 2 more"):
                second.open(node.batch.hashes[:2], node.lease())
            first.close_set(sets[0])
            assert eventually(lambda: opens(second, node))
            assert torch.isfinite(ask(second, sets[1])).all()
    finally:
        node.channel.close()


def test_another_tenant_reaches_nothing(node: Node) -> None:
    with node.stream(tenant="other") as stream:
        with pytest.raises(errors.NamespaceUnknown):
            stream.open(node.batch.hashes, node.lease())
        node.channel.register(node.batch, tenant="other")
        with pytest.raises(errors.LeaseExpired):
            stream.open(node.batch.hashes, node.lease())


def test_a_budget_of_ages_is_refused_and_costs_nobody_an_answer(node: Node) -> None:
    channel = node.channel.connect()
    with node.attend(channel) as greedy, node.stream() as other:
        set_id = greedy.open(node.batch.hashes, node.lease())
        rows = torch.ones(1, Q_HEADS, LAYOUT.head_dim).numpy().tobytes()
        parts = (encode_sets(((set_id, 1),)), rows)
        frame = Frame(
            Kind.ATTEND,
            request=9,
            page=1,
            size_bytes=sum(map(len, parts)),
            offset_bytes=1 << 63,
            checksum=joint_checksum(parts),
        )
        channel.send(encode_frame(frame), *parts)
        assert isinstance(refusal(channel), errors.InvalidArgument)
        ask(greedy, set_id)
        ask(other, other.open(node.batch.hashes, node.lease()))


def test_a_query_whose_bytes_changed_on_the_way_is_refused(node: Node) -> None:
    stream = node.channel.connect()
    payload = (0).to_bytes(4, "little") + (1).to_bytes(4, "little") + bytes(Q_HEADS * 64 * 4)
    stream.send(encode_frame(Frame(Kind.ATTEND, request=1, page=1, size_bytes=len(payload), checksum=1)), payload)
    assert stream.receive().kind is Kind.REFUSED
    stream.close()


def test_a_node_without_the_packages_says_so() -> None:
    node = Node(attends=False)
    try:
        with node.stream() as stream, pytest.raises(errors.Unsupported, match=r"attnstore\[attention\]"):
            stream.open(node.batch.hashes, node.lease())
    finally:
        node.channel.close()
