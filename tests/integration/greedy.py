"""A tenant that takes all that it can get of a limit: raw calls to a real node, over real sockets, at the limit's true size."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from itertools import count
from typing import Final

import grpc

import attnstore
from attnstore import DType, PageLayout, PageStatus, errors, namespace
from attnstore.core.hashing import page_checksum
from attnstore.limits import (
    ATTEND_CALLS_MAX,
    CHANNEL_CONNECTIONS_MAX,
    CHANNEL_TOKENS_MAX,
    LEASE_MS_MAX,
    LEASED_PAGES_MAX,
    LEASES_MAX,
    NAMESPACES_MAX,
    SHM_LENT_NODE_BYTES_MAX,
    STREAMS_MAX,
    WATCHED_EVENTS_MAX,
    WATCHERS_MAX,
)
from attnstore.streams.frames import FrameStream
from attnstore.testing import StoreProcess
from attnstore.wire import shm
from attnstore.wire.match import encode_prefixes
from attnstore.wire.messages import ERROR_TRAILER, layout_to_wire
from attnstore.wire.page_channel import Frame, Kind, encode_frame
from attnstore.wire.v1 import store_pb2 as pb
from attnstore.wire.v1 import store_pb2_grpc
from tests.channels import dial, say_hello
from tests.integration.shm_peer import Peer
from tests.memory_files import sealed_file
from tests.samples import SMALL, Batch, eventually, make_batch

CAPACITY_MIB = 64
TINY = PageLayout(layers=1, kv_heads=1, head_dim=2, block_tokens=8, dtype=DType.FP16)
"""64 bytes per page."""
GREEDY, MODEST = "greedys-token", "modests-token"
_CALL_S: Final = 60.0
_PIPELINED: Final = 256


class Greedy:
    """The tenant that takes as much as it can get: raw calls to a node, and what they hold until `close`."""

    def __init__(self, node: StoreProcess) -> None:
        self.node = node
        self.held = ExitStack()
        self.stub = store_pb2_grpc.AttentionStoreStub(self.held.enter_context(grpc.insecure_channel(node.address)))
        self.metadata = (("authorization", f"Bearer {GREEDY}"),)
        self.batch = make_batch(1, model="greedy")
        self.register(self.batch)

    def close(self) -> None:
        self.held.close()

    def register(self, batch: Batch) -> None:
        request = pb.RegisterLayoutRequest(namespace=batch.namespace, layout=layout_to_wire(batch.layout))
        self.stub.RegisterLayout(request, timeout=_CALL_S, metadata=self.metadata)

    def write(self, batch: Batch) -> None:
        with attnstore.connect(self.node.url, token=GREEDY, transport="tcp", deadline_ms=_CALL_S * 1000) as client:
            client.register_layout(batch.namespace, batch.layout)
            assert set(client.write(batch.namespace, batch.hashes, batch.pages).verdicts) == {PageStatus.STORED}

    def channel(self) -> FrameStream:
        """Returns a page channel that has sent HELLO; the next frame tells whether it is admitted."""
        answer = self.stub.OpenChannel(pb.OpenChannelRequest(transport="tcp"), timeout=_CALL_S, metadata=self.metadata)
        stream = dial(int(answer.address.rpartition(":")[2]))
        self.held.callback(stream.close)
        say_hello(stream, answer.token)
        return stream

    def gets(self, call: Callable[..., object], request: object, *codes: str) -> bool:
        """Returns True if the call is answered, False if it is refused as too much, or with one of the codes."""
        try:
            call(request, timeout=_CALL_S, metadata=self.metadata)
        except grpc.RpcError as error:
            if refused(error) not in ("overloaded", *codes):
                raise
            return False
        return True

    def begins(self, call: grpc.Call) -> bool:
        """Returns True if a lasting call has begun, False if it was refused as too much."""
        self.held.callback(call.cancel)
        if call.initial_metadata():
            return True
        assert refused(call) == "overloaded"
        return False


def refused(call: grpc.Call) -> str:
    return dict(call.trailing_metadata() or ()).get(ERROR_TRAILER, "none")


def takes_until_refused(limit: int, take: Callable[[], bool]) -> None:
    """Takes more and more: far more than a share of the limit, but not all of it."""
    taken = 0
    while take():
        taken += 1
        assert taken < limit, "one tenant got all of it"
    assert taken > limit // 4, f"refused after {taken} of {limit}"


def streams(greedy: Greedy) -> None:
    done = threading.Event()
    greedy.held.callback(done.set)

    def half_a_page() -> Iterator[pb.WriteChunk]:
        yield pb.WriteChunk(namespace=greedy.batch.namespace, hash=greedy.batch.hashes[0], payload=bytes(100))
        done.wait(_CALL_S)

    calls = [greedy.stub.Write.future(half_a_page(), metadata=greedy.metadata) for _ in range(STREAMS_MAX)]
    for call in calls:
        greedy.held.callback(call.cancel)
    describe = greedy.stub.Describe
    assert eventually(
        lambda: (
            describe(pb.DescribeRequest(), metadata=greedy.metadata).in_flight + sum(call.done() for call in calls) == STREAMS_MAX
        ),
        _CALL_S,
    )
    over = [call for call in calls if call.done()]
    assert over
    assert {refused(call) for call in over} == {"overloaded"}


def watchers(greedy: Greedy) -> None:
    request = pb.WatchRequest(namespace=greedy.batch.namespace)
    takes_until_refused(WATCHERS_MAX, lambda: greedy.begins(greedy.stub.Watch(request, metadata=greedy.metadata)))


def attend_calls(greedy: Greedy) -> None:
    done = threading.Event()
    greedy.held.callback(done.set)

    def nothing() -> Iterator[pb.AttendRequest]:
        done.wait(_CALL_S)
        yield from ()

    takes_until_refused(ATTEND_CALLS_MAX, lambda: greedy.begins(greedy.stub.Attend(nothing(), metadata=greedy.metadata)))


def events_of_slow_watchers(greedy: Greedy) -> None:
    """Watchers that read nothing, and more events than may be queued for all of them."""
    pages = 2 * WATCHED_EVENTS_MAX // WATCHERS_MAX
    batch = make_batch(pages, model="watched", layout=TINY)
    greedy.register(batch)
    watches = [
        greedy.stub.Watch(pb.WatchRequest(namespace=batch.namespace), metadata=greedy.metadata) for _ in range(WATCHERS_MAX // 4)
    ]
    for watch in watches:
        assert greedy.begins(watch)
    with attnstore.connect(greedy.node.url, token=GREEDY, transport="tcp", deadline_ms=_CALL_S * 1000) as client:
        client.register_layout(batch.namespace, batch.layout)
        for _ in range(4):
            client.write(batch.namespace, batch.hashes, batch.pages)
            client.delete(batch.namespace, batch.hashes)


def leases(greedy: Greedy) -> None:
    greedy.write(greedy.batch)
    stream = greedy.channel()
    assert stream.receive().kind is Kind.WELCOME
    payload = encode_prefixes([greedy.batch.hashes])
    question = Frame(
        Kind.MATCH,
        request=1,
        page=1,
        size_bytes=len(payload),
        offset_bytes=LEASE_MS_MAX,
        namespace=greedy.batch.namespace,
    )
    granted = 0
    while granted < LEASES_MAX:
        stream.send((encode_frame(question) + payload) * _PIPELINED)
        kinds = []
        for _ in range(_PIPELINED):
            frame = stream.receive()
            stream.whole_payload(frame)
            kinds.append(frame.kind)
        granted += kinds.count(Kind.MATCHED)
        if Kind.REFUSED in kinds:
            break
    assert LEASES_MAX // 4 < granted < LEASES_MAX


def leased_pages(greedy: Greedy) -> None:
    batch = make_batch(20_000, model="leased", layout=TINY)
    greedy.write(batch)
    request = pb.MatchRequest(namespace=batch.namespace, prefixes=[b"".join(batch.hashes)], lease_ms=LEASE_MS_MAX)

    def lease() -> bool:
        return greedy.gets(greedy.stub.Match, request)

    takes_until_refused(LEASED_PAGES_MAX // len(batch.hashes), lease)


def namespaces(greedy: Greedy) -> None:
    page = bytes(TINY.page_bytes)
    layout, checksum = layout_to_wire(TINY), page_checksum(page)

    def fill(number: int) -> bool:
        space = namespace(TINY, model=b"%d" % number)
        if not greedy.gets(greedy.stub.RegisterLayout, pb.RegisterLayoutRequest(namespace=space, layout=layout)):
            return False
        chunk = pb.WriteChunk(namespace=space, hash=bytes(32), checksum=checksum, payload=page)
        # Without a page it may have been evicted for another namespace.
        return greedy.gets(greedy.stub.Write, iter([chunk]), "namespace_unknown")

    with ThreadPoolExecutor(8) as callers:
        kept = sum(callers.map(fill, range(NAMESPACES_MAX)))
    assert NAMESPACES_MAX // 4 < kept < NAMESPACES_MAX


def memory(greedy: Greedy) -> None:
    """Leases on everything that it can store, renewed."""
    with attnstore.connect(greedy.node.url, token=GREEDY, transport="tcp", deadline_ms=_CALL_S * 1000) as client:

        def keep() -> bool:
            batch = make_batch((1 << 20) // SMALL.page_bytes, model=f"kept {next(numbers)}")
            client.register_layout(batch.namespace, batch.layout)
            verdicts = client.write(batch.namespace, batch.hashes, batch.pages).verdicts
            lease = client.match(batch.namespace, [batch.hashes], lease_ms=LEASE_MS_MAX).lease
            if lease is not None:
                client.renew(lease, LEASE_MS_MAX)
            return PageStatus.NO_SPACE not in verdicts

        numbers = count()
        takes_until_refused(CAPACITY_MIB, keep)


def page_channels(greedy: Greedy) -> None:
    batch = make_batch(CHANNEL_CONNECTIONS_MAX, model="half pages")
    greedy.register(batch)
    stats = greedy.stub.Stats
    arriving = 0

    def in_use() -> bool:
        nonlocal arriving
        stream = greedy.channel()
        if stream.receive().kind is Kind.REFUSED:
            return False
        page_hash, page = batch.hashes[arriving], batch.pages[arriving]
        write = Frame(Kind.WRITE, request=1, size_bytes=len(page), namespace=batch.namespace, hash=page_hash)
        stream.send(encode_frame(write), page[:100])
        arriving += 1
        return eventually(lambda: stats(pb.StatsRequest(), metadata=greedy.metadata).pages_arriving == arriving)

    takes_until_refused(CHANNEL_CONNECTIONS_MAX, in_use)


def shared_memory_connections(greedy: Greedy) -> None:
    """Idle ones: the node closes the oldest for the next."""
    for _ in range(CHANNEL_CONNECTIONS_MAX + 5):
        greedy.held.enter_context(Peer.greeted(greedy.node, GREEDY))


def both_kinds_of_connections(greedy: Greedy) -> None:
    page_channels(greedy)
    shared_memory_connections(greedy)


def tokens(greedy: Greedy) -> None:
    def ask() -> bool:
        return greedy.gets(greedy.stub.OpenChannel, pb.OpenChannelRequest(transport="tcp"))

    takes_until_refused(CHANNEL_TOKENS_MAX, ask)


def lent_memory(greedy: Greedy) -> None:
    size_bytes = SHM_LENT_NODE_BYTES_MAX // 16

    def lend() -> bool:
        peer = greedy.held.enter_context(Peer.greeted(greedy.node, GREEDY))
        file = sealed_file(size_bytes)
        peer.stream.send_with_descriptor(shm.encode_lend(size_bytes), file)
        os.close(file)
        answer = peer.stream.receive(frozenset({shm.Kind.LENT, shm.Kind.REFUSED}))
        if answer.kind is shm.Kind.LENT:
            return True
        return not isinstance(shm.decode_refusal(answer.payload), errors.Overloaded)

    takes_until_refused(16, lend)


CASES: Final[dict[str, Callable[[Greedy], None]]] = {
    "STREAMS_MAX": streams,
    "WATCHERS_MAX": watchers,
    "WATCHED_EVENTS_MAX": events_of_slow_watchers,
    "ATTEND_CALLS_MAX": attend_calls,
    "LEASES_MAX": leases,
    "LEASED_PAGES_MAX": leased_pages,
    "EXTENTS_MIN": memory,
    "NAMESPACES_MAX": namespaces,
    "CHANNEL_CONNECTIONS_MAX": both_kinds_of_connections,
    "CHANNEL_TOKENS_MAX": tokens,
    "SHM_LENT_NODE_BYTES_MAX": lent_memory,
}
