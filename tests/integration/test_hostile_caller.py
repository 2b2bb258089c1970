"""A foreign, broken or hostile caller is served or refused with a typed trailer, and leaks nothing."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator

import grpc
import pytest

import attnstore
from attnstore import PageStatus
from attnstore.core.hashing import page_checksum
from attnstore.limits import CHUNK_BYTES_MAX, HASH_BYTES, HASHES_MAX, MESSAGE_BYTES_MAX, STREAMS_MAX, WATCHERS_MAX
from attnstore.testing import StoreProcess
from attnstore.wire.messages import ERROR_TRAILER, METHODS, layout_to_wire
from attnstore.wire.v1 import store_pb2 as pb
from attnstore.wire.v1 import store_pb2_grpc
from tests.samples import LARGE, SMALL, Batch, eventually

BatchOf = Callable[..., Batch]
Stub = store_pb2_grpc.AttentionStoreStub


@pytest.fixture(scope="module")
def shared_node() -> Iterator[StoreProcess]:
    """A node with every RPC."""
    with StoreProcess("--capacity", "64MiB", "--attend-threads", "1") as node:
        yield node


@pytest.fixture(scope="module")
def channel(shared_node: StoreProcess) -> Iterator[grpc.Channel]:
    options = (("grpc.max_send_message_length", -1),)
    with grpc.insecure_channel(shared_node.address, options=options) as channel:
        yield channel


@pytest.fixture(scope="module")
def stub(channel: grpc.Channel) -> Stub:
    """The client that protoc generates, as in any other language."""
    return store_pb2_grpc.AttentionStoreStub(channel)


@pytest.fixture
def batch(stub: Stub, batch_of: BatchOf) -> Batch:
    batch = batch_of(3)
    register(stub, batch)
    return batch


def register(stub: Stub, batch: Batch) -> None:
    stub.RegisterLayout(pb.RegisterLayoutRequest(namespace=batch.namespace, layout=layout_to_wire(batch.layout)), timeout=5)


def whole(batch: Batch, index: int) -> pb.WriteChunk:
    """Returns one page as one chunk, as a foreign client would build it."""
    page = batch.pages[index]
    return pb.WriteChunk(
        namespace=batch.namespace, hash=batch.hashes[index], checksum=page_checksum(page), offset_bytes=0, payload=page
    )


def refusal(error: grpc.RpcError) -> str:
    """Returns the typed code of a refused call."""
    return dict(error.trailing_metadata() or ()).get(ERROR_TRAILER, "none")


def write(stub: Stub, *sent: pb.WriteChunk) -> list[int]:
    return list(stub.Write(iter(sent), timeout=5).verdicts)


def slots_in_use(stub: Stub) -> tuple[int, int]:
    stats = stub.Stats(pb.StatsRequest(), timeout=5)
    return stats.used_bytes - stats.written_bytes, stats.pages_arriving


def test_generated_stubs_are_all_that_a_foreign_client_needs(stub: Stub, batch_of: BatchOf) -> None:
    batch = batch_of(3, LARGE)
    register(stub, batch)

    def chunks() -> Iterator[pb.WriteChunk]:
        for index, page in enumerate(batch.pages):
            for offset in range(0, len(page), CHUNK_BYTES_MAX):
                first = pb.WriteChunk(hash=batch.hashes[index], checksum=page_checksum(page)) if not offset else pb.WriteChunk()
                first.namespace = batch.namespace
                first.offset_bytes = offset
                first.payload = page[offset : offset + CHUNK_BYTES_MAX]
                yield first

    assert list(stub.Write(chunks(), timeout=5).verdicts) == [PageStatus.STORED] * 3
    joined = b"".join(batch.hashes)
    found = stub.Match(pb.MatchRequest(namespace=batch.namespace, prefixes=[joined], lease_ms=10_000), timeout=5)
    assert list(found.hits) == [3]
    request = pb.ReadRequest(namespace=batch.namespace, hashes=joined, lease_id=found.lease_id)
    pages = [bytearray() for _ in batch.pages]
    for chunk in stub.Read(request, timeout=5):
        assert (chunk.status, chunk.size_bytes) == (PageStatus.OK, LARGE.page_bytes)
        assert chunk.offset_bytes == len(pages[chunk.page_index])
        assert chunk.checksum == page_checksum(batch.pages[chunk.page_index])
        pages[chunk.page_index] += chunk.payload
    assert pages == batch.pages
    assert stub.RenewLease(pb.RenewLeaseRequest(lease_id=found.lease_id, lease_ms=20_000), timeout=5).lease_ms == 20_000
    assert stub.ReleaseLease(pb.ReleaseLeaseRequest(lease_id=found.lease_id), timeout=5).released
    deleted = stub.Delete(pb.DeleteRequest(namespace=batch.namespace, hashes=joined), timeout=5)
    assert list(deleted.statuses) == [PageStatus.OK] * 3
    assert stub.Describe(pb.DescribeRequest(), timeout=5).limits.chunk_bytes_max == CHUNK_BYTES_MAX


@pytest.mark.parametrize("change", ["flip", "short", "long", "checksum"])
def test_a_page_that_is_not_what_was_announced_is_not_kept(stub: Stub, batch: Batch, change: str) -> None:
    before = slots_in_use(stub)
    bad = whole(batch, 1)
    if change == "flip":
        bad.payload = bytes([bad.payload[0] ^ 1]) + bad.payload[1:]
    elif change == "short":
        bad.payload = bad.payload[:-1]
    elif change == "long":
        bad.payload += b"x"
    else:
        bad.checksum ^= 1
    verdict = PageStatus.CHECKSUM_MISMATCH if change in ("flip", "checksum") else PageStatus.WRONG_SIZE
    assert write(stub, whole(batch, 0), bad, whole(batch, 2)) == [PageStatus.STORED, verdict, PageStatus.STORED]
    found = stub.Match(pb.MatchRequest(namespace=batch.namespace, prefixes=[b"".join(batch.hashes)]), timeout=5)
    assert list(found.hits) == [1]
    assert slots_in_use(stub) == before


def test_an_empty_stream_and_an_empty_page_are_answered(stub: Stub, batch: Batch) -> None:
    assert write(stub) == []
    empty = pb.WriteChunk(namespace=batch.namespace, hash=batch.hashes[0])
    assert write(stub, empty) == [PageStatus.WRONG_SIZE]


@pytest.mark.parametrize(
    ("sent", "code"),
    [
        (lambda batch: [pb.WriteChunk(hash=batch.hashes[0], payload=b"x")], "invalid_argument"),
        (lambda batch: [pb.WriteChunk(namespace=b"short", hash=batch.hashes[0])], "invalid_argument"),
        (lambda batch: [pb.WriteChunk(namespace=bytes(32), hash=batch.hashes[0])], "namespace_unknown"),
        (lambda batch: [pb.WriteChunk(namespace=batch.namespace, hash=b"short")], "invalid_argument"),
        (lambda batch: [pb.WriteChunk(namespace=batch.namespace, payload=b"x")], "protocol_error"),
        (lambda batch: [pb.WriteChunk(namespace=batch.namespace, hash=batch.hashes[0], offset_bytes=1)], "protocol_error"),
        (lambda batch: [pb.WriteChunk(namespace=batch.namespace, hash=batch.hashes[0], offset_bytes=2**63)], "protocol_error"),
        (lambda batch: [whole(batch, 0), pb.WriteChunk(namespace=bytes(32), hash=batch.hashes[1])], "protocol_error"),
        (lambda batch: [whole(batch, 0), pb.WriteChunk(offset_bytes=SMALL.page_bytes, payload=b"x")], "protocol_error"),
        (
            lambda batch: [
                pb.WriteChunk(namespace=batch.namespace, hash=batch.hashes[0], payload=bytes(100)),
                pb.WriteChunk(offset_bytes=50, payload=bytes(100)),
            ],
            "protocol_error",
        ),
        (
            lambda batch: [pb.WriteChunk(namespace=batch.namespace, hash=batch.hashes[0], payload=bytes(CHUNK_BYTES_MAX + 1))],
            "invalid_argument",
        ),
    ],
    ids=[
        "no namespace",
        "short namespace",
        "unknown namespace",
        "short hash",
        "bytes before a hash",
        "begins late",
        "huge offset",
        "second namespace",
        "bytes after the end",
        "overlap",
        "chunk over the limit",
    ],
)
def test_a_malformed_write_is_refused_with_its_code_and_leaks_nothing(
    stub: Stub, batch: Batch, sent: Callable[[Batch], list[pb.WriteChunk]], code: str
) -> None:
    before = slots_in_use(stub)
    with pytest.raises(grpc.RpcError) as caught:
        write(stub, *sent(batch))
    assert refusal(caught.value) == code
    assert caught.value.details()
    assert eventually(lambda: slots_in_use(stub) == before)


@pytest.mark.parametrize("rpc", sorted(METHODS))
def test_bytes_that_are_no_message_are_refused_with_a_code(channel: grpc.Channel, shared_node: StoreProcess, rpc: str) -> None:
    method = METHODS[rpc]
    # One message and one answer at most: gRPC sends the same bytes as for the method's own kind of call.
    answers = channel.stream_stream(method.path)(iter([b"\xff\xff\xff\xff"]), timeout=5)
    with pytest.raises(grpc.RpcError) as caught:
        next(answers)
    assert refusal(caught.value) == "protocol_error"
    assert "call failed" not in shared_node.log


def test_a_message_over_the_limit_is_refused_by_the_node(stub: Stub, batch: Batch) -> None:
    huge = pb.WriteChunk(namespace=batch.namespace, hash=batch.hashes[0], payload=bytes(MESSAGE_BYTES_MAX))
    with pytest.raises(grpc.RpcError) as caught:
        write(stub, huge)
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


def test_the_node_counts_hashes_itself(stub: Stub, batch: Batch) -> None:
    many = bytes(HASH_BYTES * (HASHES_MAX + 1))
    odd = bytes(HASH_BYTES + 1)
    half = bytes(HASH_BYTES * (HASHES_MAX // 2 + 1))
    for call in (
        lambda: stub.Match(pb.MatchRequest(namespace=batch.namespace, prefixes=[many]), timeout=5),
        lambda: stub.Match(pb.MatchRequest(namespace=batch.namespace, prefixes=[half, half]), timeout=5),
        lambda: stub.Match(pb.MatchRequest(namespace=batch.namespace, prefixes=[odd]), timeout=5),
        lambda: stub.Match(pb.MatchRequest(namespace=batch.namespace, prefixes=[b""] * (HASHES_MAX + 1)), timeout=5),
        lambda: stub.Match(pb.MatchRequest(namespace=b"short"), timeout=5),
        lambda: stub.Delete(pb.DeleteRequest(namespace=batch.namespace, hashes=many), timeout=5),
        lambda: list(stub.Read(pb.ReadRequest(namespace=batch.namespace, hashes=many), timeout=5)),
        lambda: list(stub.Read(pb.ReadRequest(namespace=batch.namespace, hashes=odd), timeout=5)),
        lambda: list(stub.Read(pb.ReadRequest(namespace=batch.namespace, layer_begin=2, layer_end=1), timeout=5)),
        lambda: list(stub.Watch(pb.WatchRequest(namespace=b""), timeout=5)),
        lambda: stub.RegisterLayout(pb.RegisterLayoutRequest(namespace=bytes(32)), timeout=5),
        lambda: stub.RegisterLayout(pb.RegisterLayoutRequest(namespace=b"short", layout=layout_to_wire(SMALL)), timeout=5),
        lambda: stub.OpenChannel(pb.OpenChannelRequest(transport="carrier-pigeon"), timeout=5),
    ):
        with pytest.raises(grpc.RpcError) as caught:
            call()
        assert refusal(caught.value) == "invalid_argument", caught.value


def test_two_writers_of_one_page_do_not_disturb_each_other(stub: Stub, batch_of: BatchOf) -> None:
    batch = batch_of(1, LARGE)
    register(stub, batch)
    page, half = batch.pages[0], CHUNK_BYTES_MAX
    gate = Gate()
    first = pb.WriteChunk(namespace=batch.namespace, hash=batch.hashes[0], checksum=page_checksum(page), payload=page[:half])
    rest = [
        pb.WriteChunk(offset_bytes=offset, payload=page[offset : offset + CHUNK_BYTES_MAX])
        for offset in range(half, len(page), CHUNK_BYTES_MAX)
    ]
    slow = stub.Write.future(gate.chunks([first], rest), timeout=10)
    assert eventually(lambda: stub.Stats(pb.StatsRequest(), timeout=5).pages_arriving == 1)
    assert write(stub, first, *rest) == [PageStatus.ARRIVING]
    gate.open()
    assert list(slow.result().verdicts) == [PageStatus.STORED]
    assert write(stub, first, *rest) == [PageStatus.ALREADY_PRESENT]


def test_a_cancelled_write_gives_its_slot_back_and_keeps_whole_pages(stub: Stub, batch: Batch) -> None:
    before = slots_in_use(stub)
    gate = Gate()
    half = pb.WriteChunk(hash=batch.hashes[1], payload=batch.pages[1][:100])
    call = stub.Write.future(gate.chunks([whole(batch, 0), half], []), timeout=10)
    assert eventually(lambda: slots_in_use(stub)[1] == 1)
    call.cancel()
    gate.open()
    assert eventually(lambda: slots_in_use(stub) == before)
    found = stub.Match(pb.MatchRequest(namespace=batch.namespace, prefixes=[b"".join(batch.hashes)]), timeout=5)
    assert list(found.hits) == [1]


def test_watchers_beyond_their_limit_are_refused_and_keep_nobody_from_reading(node: StoreProcess, batch_of: BatchOf) -> None:
    batch = batch_of(1)
    with grpc.insecure_channel(node.address) as channel:
        stub = store_pb2_grpc.AttentionStoreStub(channel)
        register(stub, batch)
        watches = [stub.Watch(pb.WatchRequest(namespace=batch.namespace), timeout=30) for _ in range(WATCHERS_MAX)]
        for watch in watches:
            assert watch.initial_metadata()
        assert stub.Describe(pb.DescribeRequest(), timeout=5).in_flight == WATCHERS_MAX
        with pytest.raises(grpc.RpcError) as caught:
            next(stub.Watch(pb.WatchRequest(namespace=batch.namespace), timeout=30))
        assert refusal(caught.value) == "overloaded"
        with attnstore.connect(node.url, transport="grpc") as client:
            client.register_layout(batch.namespace, batch.layout)
            assert client.read(batch.namespace, batch.hashes, batch.buffers()).error is None
        for watch in watches:
            watch.cancel()
        assert eventually(lambda: stub.Describe(pb.DescribeRequest(), timeout=5).in_flight == 0)


def test_writes_beyond_the_limit_are_refused_as_overload(node: StoreProcess, batch_of: BatchOf) -> None:
    batch = batch_of(1)
    gate = Gate()
    with grpc.insecure_channel(node.address) as channel:
        stub = store_pb2_grpc.AttentionStoreStub(channel)
        register(stub, batch)
        half = pb.WriteChunk(namespace=batch.namespace, hash=batch.hashes[0], payload=batch.pages[0][:100])
        writes = [stub.Write.future(gate.chunks([half], []), timeout=60) for _ in range(STREAMS_MAX)]
        assert eventually(lambda: stub.Describe(pb.DescribeRequest(), timeout=5).in_flight == STREAMS_MAX)
        with attnstore.connect(node.url, transport="grpc") as client:
            client.register_layout(batch.namespace, batch.layout)
            answer = client.read(batch.namespace, batch.hashes, batch.buffers())
            assert isinstance(answer.error, attnstore.errors.Overloaded)
            assert answer.statuses == (PageStatus.INCOMPLETE,)
            gate.open()
            for write in writes:
                write.result()
            assert eventually(lambda: client.describe().in_flight == 0)
            assert client.read(batch.namespace, batch.hashes, batch.buffers()).error is None


class Gate:
    """A request stream that stops half-way until it is released."""

    def __init__(self) -> None:
        self._open = threading.Event()

    def open(self) -> None:
        self._open.set()

    def chunks(self, before: list[pb.WriteChunk], after: list[pb.WriteChunk]) -> Iterator[pb.WriteChunk]:
        yield from before
        assert self._open.wait(20)
        yield from after


def test_a_refusal_that_quotes_a_long_request_reaches_its_caller(channel: grpc.Channel) -> None:
    request = pb.OpenChannelRequest(transport="\x01" * (MESSAGE_BYTES_MAX - 64))
    with pytest.raises(grpc.RpcError) as caught:
        store_pb2_grpc.AttentionStoreStub(channel).OpenChannel(request, timeout=20)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert dict(caught.value.trailing_metadata())[ERROR_TRAILER] == "invalid_argument"
