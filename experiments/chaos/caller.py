"""`python -m experiments.chaos.caller KIND --store URL`: a misbehaving caller, which must not affect any other caller.

Owns: the behaviour of each kind. It takes whatever it gets and expects refusals. Only a hurried client also reports calls, because
its calls with enough time must hit like those of others. Every loop ends with the caller's time.
"""

from __future__ import annotations

import json
import os
import random
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from typing import Final

import grpc
import redis
from redis.typing import EncodableT, FieldT

import attnstore
from attnstore.command_line import CommandParser
from attnstore.directory.scripts import KEYS
from attnstore.errors import AttnStoreError
from attnstore.limits import CHANNEL_CONNECTIONS_MAX, LEASE_MS_MAX, NAMESPACES_MAX, STREAMS_MAX
from attnstore.streams.frames import FrameStream
from attnstore.wire import messages
from attnstore.wire.chunks import encode_write_chunk
from attnstore.wire.frame_receiver import Role
from attnstore.wire.messages import METHODS
from attnstore.wire.page_channel import VERSION, Frame, Kind, encode_frame
from experiments.chaos.faults import FaultKind
from experiments.chaos.raw_client import RawClient, print_call
from experiments.options import POSITIVE, SEED

_LAYOUT: Final = attnstore.PageLayout(layers=8, kv_heads=2, head_dim=64, dtype=attnstore.DType.BF16)
_DEADLINE_MS: Final = 2_000.0
_HURRY_MS: Final = 2.0
_HURRIES: Final = 4
"""Hurried calls in a row: more than open a circuit breaker."""
_TURNS_PER_S: Final = 5.0
_TRICKLES: Final = 8
"""Pages begun on each transport of each node."""
_TRICKLE_S: Final = 0.3
_ROGUE_S: Final = 0.2
_GREED_S: Final = 0.05
_PAGES_AT_ONCE: Final = 64


class Caller:
    """One caller: `run` misbehaves for `seconds`. `nodes` are the addresses of all nodes, `host:port`; `directory` is the server
    that `store` names, with write access.
    """

    def __init__(self, store: str, directory: str, nodes: Sequence[str], token: str, draws: random.Random, seconds: float) -> None:
        self._store = store
        self._directory = directory
        self._nodes = nodes
        self._token = token
        self._draws = draws
        self._end_s = time.monotonic() + seconds

    def run(self, kind: FaultKind) -> None:
        """Behaves as its kind until the time is over."""
        {
            FaultKind.ROGUE: self._rogue,
            FaultKind.HURRIED: self._hurried,
            FaultKind.TRICKLING: self._trickling,
            FaultKind.GREEDY: self._greedy,
        }[kind]()

    @property
    def _left_s(self) -> float:
        return max(0.0, self._end_s - time.monotonic())

    def _beats(self, period_s: float) -> Iterator[None]:
        while self._left_s > 0:
            yield
            time.sleep(min(period_s, self._left_s))

    def _connect(self, target: str) -> attnstore.Client | attnstore.ClusterClient:
        return attnstore.connect(target, token=self._token, deadline_ms=_DEADLINE_MS)

    def _rogue(self) -> None:
        """Writes records into the directory that neither a node nor an operator would write, and removes them at the end."""
        key = {name: f"{{attnstore:default}}:{name}" for name in KEYS}
        with closing(redis.Redis.from_url(self._directory)) as directory:
            now_ms = time.time() * 1000
            records = rogue_records(self._draws)
            fields: dict[FieldT, EncodableT] = {node_id: record for node_id, record in records.items()}
            intents: dict[FieldT, EncodableT] = {
                **{_host_and_port(node)[0]: "evict" for node in self._nodes},
                "rogue-0": "explode",
                "rogue-1": b"\xff",
            }
            quotas: dict[FieldT, EncodableT] = {"default": "1", "rogue": "lots"}
            for _ in self._beats(_ROGUE_S):
                directory.hset(key["nodes"], mapping=fields)
                directory.zadd(key["alive"], dict.fromkeys(records, now_ms + 3_600_000))
                directory.hset(key["intents"], mapping=intents)
                directory.hset(key["quotas"], mapping=quotas)
                directory.hincrby(key["revision"], "number", 1)
            directory.hdel(key["nodes"], *records)
            directory.zrem(key["alive"], *records)
            directory.hdel(key["intents"], *intents)
            directory.hdel(key["quotas"], *quotas)
            directory.hincrby(key["revision"], "number", 1)

    def _hurried(self) -> None:
        """Calls with deadlines that cannot be met; the next call has enough time and must hit, whatever happened before."""
        with self._connect(self._store) as store:
            client = RawClient(store, "hurried", _DEADLINE_MS, print_call)
            client.register()
            for _ in self._beats(1 / _TURNS_PER_S):
                for _ in range(_HURRIES):
                    client.hurry(self._draws, _HURRY_MS)
                client.turn(self._draws)

    def _trickling(self) -> None:
        """Begins pages on every transport, sends a byte now and then, and leaves silent connections open."""
        namespace = attnstore.namespace(_LAYOUT, model=b"trickle")
        with ExitStack() as stack:
            trickles: list[Callable[[], None]] = []
            for number, node in enumerate(self._nodes):
                with suppress(AttnStoreError), self._connect(f"grpc://{node}") as client:
                    client.register_layout(namespace, _LAYOUT)
                tokens = range(number * _TRICKLES * _LAYOUT.block_tokens, (number + 1) * _TRICKLES * _LAYOUT.block_tokens)
                for page_hash in attnstore.block_hashes(namespace, tokens, _LAYOUT.block_tokens):
                    with suppress(AttnStoreError, OSError, grpc.RpcError):
                        trickles.append(stack.enter_context(self._page_over_tcp(node, namespace, page_hash)))
                        trickles.append(stack.enter_context(self._page_over_grpc(node, namespace, page_hash)))
                        stack.enter_context(closing(socket.create_connection(_host_and_port(node), timeout=1.0)))
            for _ in self._beats(_TRICKLE_S):
                for trickle in trickles:
                    with suppress(AttnStoreError):
                        trickle()

    @contextmanager
    def _page_over_tcp(self, node: str, namespace: bytes, page_hash: bytes) -> Iterator[Callable[[], None]]:
        with closing(self._page_channel(node)) as stream:
            frame = Frame(Kind.WRITE, request=1, size_bytes=_LAYOUT.page_bytes, namespace=namespace, hash=page_hash)
            stream.send(encode_frame(frame))
            yield lambda: stream.send(b"\0")

    @contextmanager
    def _page_over_grpc(self, node: str, namespace: bytes, page_hash: bytes) -> Iterator[Callable[[], None]]:
        bytes_due = threading.Semaphore(0)
        ended = threading.Event()

        def chunks() -> Iterator[bytes]:
            offset = 0
            while not ended.is_set():
                if bytes_due.acquire(timeout=_TRICKLE_S):
                    yield encode_write_chunk(namespace, b"" if offset else page_hash, 0, offset, b"\0")
                    offset += 1

        with grpc.insecure_channel(node) as channel:
            write: grpc.StreamUnaryMultiCallable[bytes, bytes] = channel.stream_unary(METHODS["Write"].path)
            call = write.future(chunks(), metadata=self._metadata(), timeout=self._left_s)
            yield bytes_due.release
            ended.set()
            call.cancel()

    def _greedy(self) -> None:
        """Takes as much of every limit as it can get, and holds it: namespaces, watches, channels, leases, and its
        quota of pages.
        """
        with ExitStack() as stack:
            greeds = [stack.enter_context(self._greed(node)) for node in self._nodes]
            for _ in self._beats(_GREED_S):
                for greed in greeds:
                    with suppress(AttnStoreError, OSError, grpc.RpcError):
                        greed()

    @contextmanager
    def _greed(self, node: str) -> Iterator[Callable[[], None]]:
        """Takes a little more of one node with each call."""
        held: list[FrameStream] = []
        watches: list[grpc.Call] = []
        namespaces = [attnstore.namespace(_LAYOUT, model=b"greed%d" % number) for number in range(NAMESPACES_MAX)]
        page = bytes(_LAYOUT.page_bytes)
        taken = 0
        with self._connect(f"grpc://{node}") as client, grpc.insecure_channel(node) as channel, ExitStack() as stack:

            def take() -> None:
                nonlocal taken
                for namespace in namespaces[taken : taken + _PAGES_AT_ONCE]:
                    client.register_layout(namespace, _LAYOUT)
                first = namespaces[taken % NAMESPACES_MAX]
                taken += _PAGES_AT_ONCE
                tokens = _PAGES_AT_ONCE * _LAYOUT.block_tokens
                hashes = attnstore.block_hashes(first, range(tokens), _LAYOUT.block_tokens)
                client.write(first, hashes, [page] * len(hashes))
                client.match(first, [hashes], lease_ms=LEASE_MS_MAX)
                if len(watches) < STREAMS_MAX:
                    method = METHODS["Watch"]
                    watch: grpc.UnaryStreamMultiCallable[messages.WatchRequest, bytes] = channel.unary_stream(
                        method.path, request_serializer=method.encode_request
                    )
                    request = messages.WatchRequest(namespace=first)
                    calls = [watch(request, metadata=self._metadata(), timeout=self._left_s) for _ in range(8)]
                    watches.extend(calls)
                if len(held) < CHANNEL_CONNECTIONS_MAX:
                    held.append(stack.enter_context(closing(self._page_channel(node))))

            yield take
            for call in watches:
                call.cancel()

    def _page_channel(self, node: str) -> FrameStream:
        """Returns a page channel after its WELCOME. Raises `AttnStoreError`, `OSError` or `grpc.RpcError`."""
        method = METHODS["OpenChannel"]
        with grpc.insecure_channel(node) as channel:
            call = channel.unary_unary(
                method.path, request_serializer=method.encode_request, response_deserializer=method.decode_response
            )
            offer = call(messages.OpenChannelRequest(transport="tcp"), metadata=self._metadata(), timeout=_DEADLINE_MS / 1000)
        host, _ = _host_and_port(node)
        connection = socket.create_connection((host, int(offer.address.rpartition(":")[2])), timeout=_DEADLINE_MS / 1000)
        stream = FrameStream(connection, Role.CLIENT)
        try:
            stream.bound(lambda: _DEADLINE_MS)
            stream.send(encode_frame(Frame(Kind.HELLO, page=VERSION, size_bytes=len(offer.token))), offer.token)
            stream.receive()
        except BaseException:
            stream.close()
            raise
        return stream

    def _metadata(self) -> tuple[tuple[str, str], ...]:
        return (("authorization", f"Bearer {self._token}"),)


def rogue_records(draws: random.Random) -> dict[str, str | bytes]:
    """Returns node id -> a record that no node would write, in a new order each time."""
    good = {"url": "grpc://127.0.0.1:1", "epoch": "", "weight": 1.0, "replicas": 1, "state": "active", "hot": []}
    wrong: list[dict[str, object]] = [
        {"url": "http://127.0.0.1:1"},
        {"url": "grpc://"},
        {"url": 7},
        {"state": "exploding"},
        {"weight": 1e308},
        {"weight": "NaN"},
        {"replicas": -1},
        {"replicas": [3]},
        {"hot": {"a": 1}},
        {"epoch": "zz"},
    ]
    records: list[str | bytes] = [json.dumps({**good, "node_id": f"rogue-{at}", **fields}) for at, fields in enumerate(wrong)]
    infinite = json.dumps({**good, "node_id": "infinite"}).replace('"replicas": 1', '"replicas": 1e999')
    records += [infinite, "[" * 2_000, "null", b"\xff\xfe\x00", json.dumps({**good, "node_id": "x" * 10_000})]
    draws.shuffle(records)
    return {f"rogue-{at}": record for at, record in enumerate(records)}


def _host_and_port(node: str) -> tuple[str, int]:
    host, _, port = node.rpartition(":")
    return host, int(port)


def main() -> int:
    """Runs until its time is over."""
    parser = CommandParser("python -m experiments.chaos.caller")
    parser.add_argument("kind", choices=[kind.value for kind in FaultKind if kind.is_caller])
    parser.add_argument("--store", required=True, metavar="URL", help="the cluster, as any client names it")
    parser.add_argument("--directory", required=True, metavar="URL", help="its directory's server, without a key")
    parser.add_argument("--nodes", required=True, metavar="HOST:PORT,...", help="its nodes")
    parser.add_argument("--seed", type=SEED, default=0)
    parser.add_argument("--seconds", type=POSITIVE, default=3.0)
    options = parser.parse_args()
    nodes, token = options.nodes.split(","), os.environ["ATTNSTORE_TOKEN"]
    caller = Caller(options.store, options.directory, nodes, token, random.Random(options.seed), options.seconds)
    caller.run(FaultKind(options.kind))
    return 0


if __name__ == "__main__":
    sys.exit(main())
