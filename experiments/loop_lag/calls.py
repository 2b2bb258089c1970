"""Every RPC of the service at its largest size, and a node's background work, as actions on a `WatchedNode`.

Owns: `calls`. Requests are created before the timing, and answers are not decoded, because the node shares the process.
"""

from __future__ import annotations

import asyncio
import hashlib
import itertools
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Final

import grpc

from attnstore import DType, PageLayout, namespace
from attnstore.core.hashing import page_checksum
from attnstore.errors import AttnStoreError
from attnstore.limits import (
    ATTEND_HASHES_MAX,
    CHUNK_BYTES_MAX,
    HASHES_MAX,
    LEASE_MS_MAX,
    LEASES_MAX,
    MESSAGE_BYTES_MAX,
    MIB,
    NAMESPACES_MAX,
)
from attnstore.types import Space
from attnstore.wire import chunks, messages
from attnstore.wire.attend import AttendOpen, AttendShape, step_to_wire
from attnstore.wire.messages import METHODS
from experiments.loop_lag.node import LAYOUT, SPACE, WatchedNode

HASHES: Final = [hashlib.blake2b(number.to_bytes(4, "little"), digest_size=32).digest() for number in range(HASHES_MAX)]
_JOINED: Final = b"".join(HASHES)
_TIMEOUT_S: Final = 120
_WATCHERS: Final = 64
_BIG: Final = PageLayout(layers=32, kv_heads=1, head_dim=MIB, block_tokens=1, dtype=DType.OPAQUE)

Prepare = Callable[[WatchedNode, Any], Callable[[], object]]
"""Receives the node and a gRPC channel to it."""


@dataclass(frozen=True, slots=True)
class Call:
    """`prepare` does the work that is not measured and returns the action that is."""

    rpc: str
    size: str
    prepare: Prepare


def _unary(rpc: str, request: bytes) -> Prepare:
    def prepare(_node: WatchedNode, channel: Any) -> Callable[[], object]:
        return lambda: _call(channel, rpc, request)

    return prepare


def _call(channel: Any, rpc: str, request: bytes) -> bytes:
    """Returns the answer, empty for a refusal."""
    with suppress(grpc.RpcError):
        return bytes(channel.unary_unary(METHODS[rpc].path)(request, timeout=_TIMEOUT_S))
    return b""


def _encoded(request: Any) -> bytes:
    return bytes(request.SerializeToString())


def _match(prefixes: list[bytes], lease_ms: int) -> bytes:
    return _encoded(messages.MatchRequest(namespace=SPACE.namespace, prefixes=prefixes, lease_ms=lease_ms))


def _kept(request: Callable[[], bytes], rpc: str) -> Prepare:
    """With all pages present."""

    def prepare(node: WatchedNode, channel: Any) -> Callable[[], object]:
        node.keep(HASHES)
        made = request()
        return lambda: _call(channel, rpc, made)

    return prepare


def _many_namespaces(rpc: str, request: bytes) -> Prepare:
    def prepare(node: WatchedNode, channel: Any) -> Callable[[], object]:
        with suppress(AttnStoreError):
            for number in range(NAMESPACES_MAX):
                node.store.spaces.register(Space("default", namespace(LAYOUT, model=number.to_bytes(4, "little"))), LAYOUT)
        return lambda: _call(channel, rpc, request)

    return prepare


def _lease(node: WatchedNode) -> bytes:
    node.keep(HASHES)
    lease_id = node.store.leases.match(SPACE, [HASHES], LEASE_MS_MAX).lease_id
    assert lease_id is not None
    return lease_id


def _renew(node: WatchedNode, channel: Any) -> Callable[[], object]:
    request = _encoded(messages.RenewLeaseRequest(lease_id=_lease(node), lease_ms=LEASE_MS_MAX))
    return lambda: _call(channel, "RenewLease", request)


def _release(node: WatchedNode, channel: Any) -> Callable[[], object]:
    request = _encoded(messages.ReleaseLeaseRequest(lease_id=_lease(node)))
    return lambda: _call(channel, "ReleaseLease", request)


def _read(hashes: bytes, streamed_pages: int) -> Prepare:
    def prepare(node: WatchedNode, channel: Any) -> Callable[[], object]:
        node.keep(HASHES)
        request = _encoded(messages.ReadRequest(namespace=SPACE.namespace, hashes=hashes))

        def take() -> None:
            answers = channel.unary_stream(METHODS["Read"].path)(request, timeout=_TIMEOUT_S)
            for _ in itertools.islice(answers, streamed_pages):
                pass
            answers.cancel()

        return take

    return prepare


def _write_many(streamed_pages: int) -> Prepare:
    def prepare(node: WatchedNode, channel: Any) -> Callable[[], object]:
        node.keep(HASHES)

        def pages() -> Iterator[bytes]:
            page = bytes(LAYOUT.page_bytes)
            for page_hash in HASHES[:streamed_pages]:
                yield chunks.encode_write_chunk(SPACE.namespace, page_hash, page_checksum(page), 0, memoryview(page))

        return lambda: channel.stream_unary(METHODS["Write"].path)(pages(), timeout=_TIMEOUT_S)

    return prepare


def _write_large(node: WatchedNode, channel: Any) -> Callable[[], object]:
    space = Space("default", namespace(_BIG, model=b"one large page"))
    node.store.spaces.register(space, _BIG)
    node.store.spaces.delete(space, HASHES[:1])
    page = memoryview(bytes(_BIG.page_bytes))
    checksum = page_checksum(page)

    def parts() -> Iterator[bytes]:
        for at in range(0, len(page), CHUNK_BYTES_MAX):
            first = (space.namespace, HASHES[0], checksum) if at == 0 else (b"", b"", 0)
            yield chunks.encode_write_chunk(*first, at, page[at : at + CHUNK_BYTES_MAX])

    return lambda: channel.stream_unary(METHODS["Write"].path)(parts(), timeout=_TIMEOUT_S)


def _watch(node: WatchedNode, channel: Any) -> Callable[[], object]:
    node.keep(HASHES)
    request = _encoded(messages.WatchRequest(namespace=SPACE.namespace))
    watches = [channel.unary_stream(METHODS["Watch"].path)(request, timeout=_TIMEOUT_S) for _ in range(_WATCHERS)]
    for watch in watches:
        watch.initial_metadata()
    deletion = _encoded(messages.DeleteRequest(namespace=SPACE.namespace, hashes=_JOINED))

    def flood() -> None:
        _call(channel, "Delete", deletion)
        for watch in watches:
            watch.cancel()

    return flood


def _attend(node: WatchedNode, channel: Any) -> Callable[[], object]:
    layout = PageLayout(layers=1, kv_heads=1, head_dim=64, block_tokens=1, dtype=DType.FP32)
    space = Space("default", namespace(layout, model=b"attended"))
    hashes = HASHES[:ATTEND_HASHES_MAX]
    node.keep(hashes, space, layout)
    lease_id = node.store.leases.match(space, [hashes], LEASE_MS_MAX).lease_id
    assert lease_id is not None
    shape = AttendShape(space.namespace, 1, 1.0)
    encode = METHODS["Attend"].encode_request
    steps = [encode(step_to_wire(AttendOpen(number, shape, hashes, lease_id))) for number in range(8)]

    def attend() -> None:
        call = channel.stream_stream(METHODS["Attend"].path)(iter(steps), timeout=_TIMEOUT_S)
        with suppress(grpc.RpcError):
            for _ in call:
                pass

    return attend


def _expire(node: WatchedNode, _channel: Any) -> Callable[[], object]:
    node.keep(HASHES)
    with suppress(AttnStoreError):
        for number in range(LEASES_MAX):
            at = number % HASHES_MAX
            node.store.leases.match(SPACE, [HASHES[at : at + 8]], 1)
    return lambda: node.run(asyncio.sleep(3))


def _trim(node: WatchedNode, channel: Any) -> Callable[[], object]:
    node.keep(HASHES)
    page = bytes(LAYOUT.page_bytes)
    message = chunks.encode_write_chunk(SPACE.namespace, b"n" * 32, page_checksum(page), 0, memoryview(page))

    def lower() -> None:
        node.store.spaces.limit_tenants({"default": 64 * MIB})
        channel.stream_unary(METHODS["Write"].path)(iter([message]), timeout=_TIMEOUT_S)
        node.run(asyncio.sleep(3))
        node.store.spaces.limit_tenants({})

    return lower


def calls(streamed_pages: int = HASHES_MAX) -> tuple[Call, ...]:
    """Every call, in an order in which each finds the node in the state that it needs.

    A Read asks for `HASHES_MAX` pages and ends after the answers for the first `streamed_pages`; a Write sends as many. Each page
    of a stream is a message of its own and costs the same wherever it stands, so a part of a stream has the longest pause as well.
    """
    return (
        Call("Describe", f"{NAMESPACES_MAX} namespaces", _many_namespaces("Describe", b"")),
        Call("Stats", f"{NAMESPACES_MAX} namespaces", _many_namespaces("Stats", b"")),
        Call(
            "RegisterLayout",
            f"{NAMESPACES_MAX} namespaces",
            _many_namespaces(
                "RegisterLayout",
                _encoded(messages.RegisterLayoutRequest(namespace=SPACE.namespace, layout=messages.layout_to_wire(LAYOUT))),
            ),
        ),
        Call("Match", f"{HASHES_MAX} hashes of one prefix, leased", _kept(lambda: _match([_JOINED], LEASE_MS_MAX), "Match")),
        Call("Match", f"{HASHES_MAX} hashes of one prefix", _kept(lambda: _match([_JOINED], 0), "Match")),
        Call("Match", f"{HASHES_MAX} prefixes of one hash", _kept(lambda: _match(HASHES, 0), "Match")),
        Call(
            "Match",
            f"{MESSAGE_BYTES_MAX // 2} prefixes of none, refused",
            _unary("Match", _match([b""] * (MESSAGE_BYTES_MAX // 2 - 64), 0)),
        ),
        Call("Read", f"{HASHES_MAX} pages", _read(_JOINED, streamed_pages)),
        Call("Read", f"{HASHES_MAX} hashes, all missing", _read(b"".join(page_hash[::-1] for page_hash in HASHES), streamed_pages)),
        Call("Write", f"{HASHES_MAX} pages", _write_many(streamed_pages)),
        Call("Write", f"one page of {_BIG.page_bytes // MIB} MiB", _write_large),
        Call("RenewLease", f"{HASHES_MAX} pages", _renew),
        Call("ReleaseLease", f"{HASHES_MAX} pages", _release),
        Call(
            "Delete",
            f"{HASHES_MAX} pages",
            _kept(lambda: _encoded(messages.DeleteRequest(namespace=SPACE.namespace, hashes=_JOINED)), "Delete"),
        ),
        Call(
            "Verify",
            f"{HASHES_MAX} hashes, refused",
            _unary("Verify", _encoded(messages.VerifyRequest(namespace=SPACE.namespace, hashes=_JOINED))),
        ),
        Call(
            "OpenChannel",
            "a name of 4 MiB, refused",
            _unary("OpenChannel", _encoded(messages.OpenChannelRequest(transport="\x01" * (MESSAGE_BYTES_MAX - 64)))),
        ),
        Call("Watch", f"{_WATCHERS} watchers of {HASHES_MAX} deletions", _watch),
        Call("Attend", f"8 sets of {ATTEND_HASHES_MAX} pages, opened and closed", _attend),
        Call("(leases expire)", f"{LEASES_MAX} at once", _expire),
        Call("(quota is lowered)", f"to 64 MiB, with {HASHES_MAX} pages", _trim),
    )


assert {call.rpc for call in calls() if not call.rpc.startswith("(")} == set(METHODS), "an RPC is not measured"
