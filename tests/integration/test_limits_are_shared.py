"""Every shared limit: one tenant takes as much of it as it can get, and another works as if it were alone.

`CASES` says how the first tenant exhausts a limit of a real node, over real sockets, at the limit's true size. A constant of
`attnstore.limits` that is missing in the tables here fails the first test, so that a new limit cannot be forgotten.
"""

from __future__ import annotations

import importlib
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from itertools import count
from pathlib import Path
from typing import Final

import grpc
import pytest

import attnstore
from attnstore import DType, PageEventKind, PageLayout, PageStatus, errors, limits, namespace
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

ELSEWHERE: Final = {
    "GRPC_CONNECTIONS_MAX": "tests.integration.test_silent_peers:test_silent_connections_stop_nothing",
    "GRPC_CONNECTIONS_MIN": "tests.integration.test_silent_peers:test_silent_connections_stop_nothing",
    "CHANNEL_NEWCOMERS_MAX": "tests.integration.test_silent_peers:test_silent_connections_stop_nothing",
    "CHANNEL_BACKLOG_MAX": "tests.integration.test_silent_peers:test_silent_connections_stop_nothing",
    "DESCRIPTORS_BESIDE_ARENA_MIN": "tests.integration.test_silent_peers:test_silent_connections_stop_nothing",
    "OPEN_STREAMS_MAX": (
        "tests.integration.test_silent_peers:test_services_that_ask_for_no_token_hold_few_streams_and_the_oldest_gives_way"
    ),
    "ATTEND_PAGES_MAX": "tests.server.test_attend:test_the_pages_of_all_sets_are_bounded",
    "ATTEND_WAITING_MAX": "tests.server.test_turns:test_a_tenant_that_fills_the_queue_leaves_places_to_another",
    "HEAT_SEGMENTS_MAX": "tests.core.test_heat:test_a_tenant_that_uses_many_segments_leaves_counts_and_places_to_another",
    "HOT_SEGMENTS_MAX": "tests.core.test_heat:test_a_tenant_that_uses_many_segments_leaves_counts_and_places_to_another",
    "EVENTS_IN_BATCH_MAX": "tests.directory.test_events:test_a_tenant_with_many_events_leaves_room_for_anothers",
    "TOMBSTONES_MAX": "tests.core.test_tombstones:test_a_tenant_that_deletes_a_lot_makes_the_node_forget_its_own_deletions",
    "REPORTED_BYTES_PER_S_MAX": "tests.server.test_scrubber:test_reports_of_two_tenants_take_turns_and_neither_hashes_on_the_loop",
}
"""Shared limits that are tried with a small number, or that are shared by more than the tenants of one node."""

OF_ONE_REQUEST: Final = "what one message, request, page, stream or connection may be: each has its own"
OF_TIME: Final = "a time or a rate for each peer or task by itself"
OF_SIZES: Final = "the size of something, or a number that an operator chooses"
OF_OPERATORS: Final = "counts what operators and nodes write into the directory; no tenant can"
OF_HINTS: Final = "the newest of what all tell the directory; what is forgotten early is at worst a hit of bytes that were right"
OF_OPTIONS: Final = "bounds what a user or an operator may say in an option, of his own process"
OF_CLIENTS: Final = "bounds what one client or worker does, in its own process"

NOT_SHARED: Final[dict[str, tuple[str, ...]]] = {
    OF_SIZES: (
        *(
            "KIB",
            "MIB",
            "GIB",
            "HASH_BYTES",
            "LEASE_ID_BYTES",
            "EPOCH_BYTES",
            "SEGMENT_BLOCKS",
            "SEGMENT_KEY_BYTES",
            "CHALLENGE_BYTES",
        ),
        *("CAPACITY_BYTES_MAX", "PAGE_BYTES_MAX", "EXTENT_BYTES_MAX", "EXTENT_BYTES_MIN", "CHANNEL_TOKEN_BYTES"),
        *("REPLICAS_MAX", "NODE_WEIGHT_MAX", "HOT_USES_DEFAULT", "HOT_REPLICAS", "DESCRIPTORS_OTHER_MAX"),
        *("NODE_OTHER_BYTES_MIN", "VISIBLE_PAGES_MAX", "VISIBLE_LEASED_PAGES_MAX", "UNSEEN_OBJECTS_MAX", "_OBJECT_BYTES"),
        *("SCRUB_BYTES_PER_S_DEFAULT", "SCRUB_BYTES_PER_S_MAX", "NODE_ID_CHARS_MAX", "NODE_URL_CHARS_MAX", "QUOTA_BYTES_MAX"),
    ),
    OF_ONE_REQUEST: (
        *("MESSAGE_BYTES_MAX", "FRAME_BYTES_MAX", "CHUNK_BYTES_MAX", "CHUNK_HEADER_BYTES_MAX", "HASHES_MAX", "GRPC_CALLS_MAX"),
        *("CHANNEL_READ_HASHES_MAX", "CHANNEL_SECOND_READ_HASHES_MAX", "CHANNEL_CREDITS", "CHANNEL_GATHER_PAGES"),
        *("CHANNEL_REASON_BYTES_MAX", "SHM_LOCATE_HASHES_MAX", "SHM_TAKE_PAGES_MAX", "SHM_LENT_BYTES_MAX"),
        *("ATTEND_SETS_MAX", "ATTEND_HASHES_MAX", "ATTEND_ROWS_MAX", "ATTEND_BYTES_MAX", "ATTEND_FRAME_BYTES_MAX"),
        *("ATTEND_HEADS_MAX", "ATTEND_TOGETHER_MAX", "MESSAGE_OVERHEAD_BYTES", "REPORTED_HASHES_MAX", "WATCH_EVENTS_MAX"),
        *(
            "HTTP_BODY_BYTES_MAX",
            "HTTP_BODY_BRACKETS_MAX",
            "CACHE_SALT_CHARACTERS_MAX",
            "RECORD_BYTES_MAX",
            "WORK_PAGES_MAX",
            "MATCH_PAGES_MAX",
            "CREDENTIAL_BYTES_MAX",
            "REFUSAL_CHARS_MAX",
        ),
        "DELETION_HASHES_MAX",
    ),
    OF_TIME: (
        *(
            "LEASE_MS_MAX",
            "NAMESPACE_EMPTY_MS_MAX",
            "DEADLINE_MS_DEFAULT",
            "DEADLINE_MS_MAX",
            "KEEPALIVE_MS",
            "KEEPALIVE_TIMEOUT_MS",
        ),
        *("CONNECT_MS_MAX", "DRAIN_MS_DEFAULT", "STOP_MS_MAX", "GRPC_IDLE_MS_MAX", "OPEN_WRITE_MS_MAX", "PEER_BYTES_PER_S_MIN"),
        *("CHANNEL_TOKEN_MS_MAX", "CHANNEL_HELLO_MS_MAX", "CHANNEL_IDLE_MS_MAX", "CHANNEL_LAYER_PINS_MS_MAX"),
        *("HEARTBEAT_MS", "MEMBER_MS_MAX", "DIRECTORY_GAP_MS", "INTENT_MS_MAX", "DIRECTORY_MS_MAX", "HEAT_WINDOW_MS"),
        *("LAYOUT_MS_MAX", "PREVIOUS_OWNERS_MS_MAX", "TASK_AGAIN_MS_MIN", "TASK_AGAIN_MS_MAX", "REPORT_MS_MAX"),
        *("RECORD_AGAIN_MS", "RECORD_SIGNED_MS_MAX", "CREDENTIAL_MS_MAX", "CLOCKS_APART_MS_MAX"),
        *("TOMBSTONE_MS_MAX", "TOMBSTONE_MARGIN_MS", "PAGE_AGE_MS_MAX"),
        *("ATTEND_VERIFIED_MS_MAX", "HTTP_IDLE_MS_MAX", "HTTP_HEAD_MS_MAX", "HTTP_BODY_MS_MAX", "HTTP_STALL_MS_MAX"),
    ),
    OF_OPTIONS: (
        *("BLOCK_TOKENS_MAX", "CONTEXT_TOKENS_MAX", "DECISIONS_SHOWN_MAX", "GPUS_MAX", "HOT_USES_MAX", "MEMORY_GB_PER_S_MAX"),
        *("PROMPT_CHARS_MAX", "SECRET_CHARS_MAX", "SEQUENCES_MAX", "SETTINGS_CHARS_MAX", "TENANT_CHARS_MAX", "THREADS_MAX"),
        "WAITING_MAX",
    ),
    OF_HINTS: ("DELETIONS_MAX", "DELETIONS_IN_BEAT_MAX"),
    OF_OPERATORS: ("NODES_MAX", "TENANTS_MAX", "DIRECTORY_LAYOUTS_MAX", "EVENT_BATCHES_MAX"),
    OF_CLIENTS: (
        *("CHANNELS_MAX", "NODE_ANSWER_MS_MAX", "NODE_FAIR_MS", "NODE_FAIR_BYTES_PER_MS", "HEDGES_PERCENT_MAX"),
        *("HEDGES_BURST_MAX", "PREVIOUS_OWNERS_MAX"),
    ),
}


def works(node: StoreProcess, transport: str) -> None:
    """Uses everything that a tenant uses on a node, over one transport."""
    batch = make_batch(2, model=f"modest, over {transport}")
    with attnstore.connect(node.url, token=MODEST, transport=transport) as client:
        client.register_layout(batch.namespace, batch.layout)
        events = client.watch(batch.namespace)
        assert set(client.write(batch.namespace, batch.hashes, batch.pages).verdicts) == {PageStatus.STORED}
        assert next(events).kind is PageEventKind.SEALED
        events.close()
        lease = client.match(batch.namespace, [batch.hashes], lease_ms=10_000).lease
        assert lease is not None
        client.renew(lease, 20_000)
        buffers = batch.buffers()
        answer = client.read(batch.namespace, batch.hashes, buffers, lease=lease)
        assert (answer.error, answer.transport, buffers) == (None, transport, batch.pages)
        assert client.release(lease)
        assert client.delete(batch.namespace, batch.hashes) == (PageStatus.OK, PageStatus.OK)


@pytest.fixture
def two_tenants(tmp_path: Path, limit: str) -> Iterator[StoreProcess]:
    tokens_file = tmp_path / "tokens.toml"
    tokens_file.write_text(f'greedy = "{GREEDY}"\nmodest = "{MODEST}"\n')
    options = ("--capacity", f"{CAPACITY_MIB}MiB", "--tokens-file", str(tokens_file), "--drain-ms", "100")
    # A node that answers queries takes two seconds more to start.
    attends = ("--attend-threads", "1") if limit == "ATTEND_CALLS_MAX" else ()
    with StoreProcess(*options, *attends) as node:
        yield node


def test_every_limit_is_shared_or_bounds_nothing_shared() -> None:
    names = {name for name, value in vars(limits).items() if name.isupper() and isinstance(value, int | float)}
    not_shared = [name for group in NOT_SHARED.values() for name in group]
    listed = [*CASES, *ELSEWHERE, *not_shared]
    assert sorted(listed) == sorted(names)
    for where in ELSEWHERE.values():
        module, _, test = where.partition(":")
        assert callable(getattr(importlib.import_module(module), test))


@pytest.mark.parametrize("limit", CASES)
def test_what_one_tenant_takes_of_a_limit_leaves_another_its_part(two_tenants: StoreProcess, limit: str) -> None:
    greedy = Greedy(two_tenants)
    try:
        CASES[limit](greedy)
        for transport in ("grpc", "tcp", "shm"):
            works(two_tenants, transport)
    finally:
        greedy.close()
