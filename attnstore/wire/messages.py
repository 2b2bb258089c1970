"""The protobuf messages by name, the method table, and conversions to and from our own types.

Owns: every use of the generated stubs. Server and client import messages from here, so a new generator or a new package version
changes this folder only.
Invariant: what a peer sends is checked here and raises a typed error; our own values are asserted.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from typing import Any, cast

from google.protobuf.message import DecodeError

from attnstore.core.layout import DType, PageLayout
from attnstore.errors import InvalidArgument, ProtocolError
from attnstore.limits import HASH_BYTES, HASHES_MAX, LEASE_ID_BYTES, LEASE_MS_MAX
from attnstore.statistics import NamespaceStatistics, NodeStatistics
from attnstore.types import (
    AttendLimits,
    Lease,
    NodeDescription,
    PageEvent,
    PageEventKind,
    PageStatus,
)
from attnstore.wire.v1 import store_pb2 as pb

AttendOffer = pb.AttendOffer
DeleteRequest = pb.DeleteRequest
VerifyRequest = pb.VerifyRequest
VerifyResponse = pb.VerifyResponse
DeleteResponse = pb.DeleteResponse
DescribeRequest = pb.DescribeRequest
DescribeResponse = pb.DescribeResponse
Limits = pb.Limits
MatchRequest = pb.MatchRequest
MatchResponse = pb.MatchResponse
NamespaceStats = pb.NamespaceStats
OpenChannelRequest = pb.OpenChannelRequest
OpenChannelResponse = pb.OpenChannelResponse
ReadRequest = pb.ReadRequest
RegisterLayoutRequest = pb.RegisterLayoutRequest
RegisterLayoutResponse = pb.RegisterLayoutResponse
ReleaseLeaseRequest = pb.ReleaseLeaseRequest
ReleaseLeaseResponse = pb.ReleaseLeaseResponse
RenewLeaseRequest = pb.RenewLeaseRequest
RenewLeaseResponse = pb.RenewLeaseResponse
StatsRequest = pb.StatsRequest
StatsResponse = pb.StatsResponse
Transport = pb.Transport
WatchRequest = pb.WatchRequest
WriteResponse = pb.WriteResponse

SERVICE: str = pb.DESCRIPTOR.services_by_name["AttentionStore"].full_name
ERROR_TRAILER = "attnstore-error"
"""Trailing metadata key that carries the `code` of a typed error."""
WATCHING = ("attnstore-watching", "1")
"""Initial metadata of `Watch`: the node accepted the call, and no event is missed from here on."""

ATTENDING = ("attnstore-attending", "1")
"""Initial metadata of `Attend`: the node accepted the call. A refusal that arrives while the first request is sent
would be lost.
"""
CHALLENGE = "attnstore-challenge-bin"
"""Metadata of a `Describe`: bytes for the node to sign, to prove that it is a member of its cluster."""
PROOF = "attnstore-proof"
"""Initial metadata of the answer to `Describe`, with or without a token: the signature."""


@dataclass(frozen=True, slots=True)
class Method:
    """One RPC: how its messages are encoded and decoded. Page chunks are passed as bytes and coded by `attnstore.wire.chunks`.

    The decoders raise `ProtocolError`, which gRPC's own hooks would hide, so the receiver of the bytes calls them.
    """

    name: str
    streams_requests: bool
    streams_responses: bool
    encode_request: Callable[[Any], bytes]
    decode_request: Callable[[bytes], Any]
    encode_response: Callable[[Any], bytes]
    decode_response: Callable[[bytes], Any]

    @property
    def path(self) -> str:
        """The HTTP/2 path of the method."""
        return f"/{SERVICE}/{self.name}"


def _identity(message: bytes) -> bytes:
    return message


def _message(cls: Any) -> tuple[Callable[[Any], bytes], Callable[[bytes], Any]]:
    def decode(message: bytes) -> Any:
        try:
            return cls.FromString(message)
        except DecodeError:
            raise ProtocolError(f"{len(message)} received bytes are not a valid {cls.DESCRIPTOR.name}") from None

    return cls.SerializeToString, decode


def _decode_match(message: bytes) -> Any:
    """Two million empty prefixes fit one message; decoding them would block the event loop for 50 ms before they
    could be counted.
    """
    if message.count(_EMPTY_PREFIX) > HASHES_MAX:
        raise InvalidArgument(f"the request has more than {HASHES_MAX} prefixes; at most that many fit one request")
    return _message(pb.MatchRequest)[1](message)


_EMPTY_PREFIX = b"\x12\x00"
_BYTES = (_identity, _identity)
_METHODS = (
    Method("Describe", False, False, *_message(pb.DescribeRequest), *_message(pb.DescribeResponse)),
    Method("RegisterLayout", False, False, *_message(pb.RegisterLayoutRequest), *_message(pb.RegisterLayoutResponse)),
    Method("Match", False, False, pb.MatchRequest.SerializeToString, _decode_match, *_message(pb.MatchResponse)),
    Method("Read", False, True, *_message(pb.ReadRequest), *_BYTES),
    Method("Write", True, False, *_BYTES, *_message(pb.WriteResponse)),
    Method("RenewLease", False, False, *_message(pb.RenewLeaseRequest), *_message(pb.RenewLeaseResponse)),
    Method("ReleaseLease", False, False, *_message(pb.ReleaseLeaseRequest), *_message(pb.ReleaseLeaseResponse)),
    Method("Delete", False, False, *_message(pb.DeleteRequest), *_message(pb.DeleteResponse)),
    Method("Verify", False, False, *_message(pb.VerifyRequest), *_message(pb.VerifyResponse)),
    Method("Stats", False, False, *_message(pb.StatsRequest), *_message(pb.StatsResponse)),
    Method("OpenChannel", False, False, *_message(pb.OpenChannelRequest), *_message(pb.OpenChannelResponse)),
    Method("Watch", False, True, *_message(pb.WatchRequest), *_message(pb.PageEvent)),
    Method("Attend", True, True, *_message(pb.AttendRequest), *_message(pb.AttendResponse)),
)
METHODS: dict[str, Method] = {method.name: method for method in _METHODS}
assert set(METHODS) == {method.name for method in pb.DESCRIPTOR.services_by_name["AttentionStore"].methods}


_HASH = struct.Struct(f"{HASH_BYTES}s")


def join_hashes(hashes: Iterable[bytes]) -> bytes:
    """Returns the concatenated hashes, as they are sent. Raises `InvalidArgument` for a wrong length or more than `HASHES_MAX`."""
    hashes = list(hashes)
    if len(hashes) > HASHES_MAX:
        raise InvalidArgument(f"the batch has {len(hashes)} hashes; at most {HASHES_MAX} fit one request")
    for size in set(map(len, hashes)) - {HASH_BYTES}:
        raise InvalidArgument(f"a block hash has {size} bytes; it must have {HASH_BYTES}")
    return b"".join(hashes)


def split_hashes(joined: bytes) -> list[bytes]:
    """The inverse of `join_hashes`, with the same errors."""
    if len(joined) % HASH_BYTES:
        raise InvalidArgument(f"a hash list has {len(joined)} bytes; it must be a multiple of {HASH_BYTES}")
    if len(joined) > HASHES_MAX * HASH_BYTES:
        raise InvalidArgument(f"the batch has {len(joined) // HASH_BYTES} hashes; at most {HASHES_MAX} fit one request")
    return [page_hash for (page_hash,) in _HASH.iter_unpack(joined)]


def check_namespace(namespace: bytes) -> bytes:
    """Returns `namespace` if it has 32 bytes. Raises `InvalidArgument` otherwise."""
    if len(namespace) != HASH_BYTES:
        raise InvalidArgument(f"namespace has {len(namespace)} bytes; it must have {HASH_BYTES}")
    return namespace


def lease_from_wire(lease_id: bytes, lease_ms: int) -> Lease:
    """Returns the lease that a node granted. Raises `ProtocolError` for values that no node sends."""
    if len(lease_id) != LEASE_ID_BYTES or not 0 <= lease_ms <= LEASE_MS_MAX:
        raise ProtocolError(f"the node granted a lease of {lease_ms} ms with an id of {len(lease_id)} bytes")
    return Lease(lease_id, lease_ms)


def layout_to_wire(layout: PageLayout) -> pb.PageLayout:
    """Returns our layout as a message."""
    return pb.PageLayout(
        layers=layout.layers,
        kv_heads=layout.kv_heads,
        head_dim=layout.head_dim,
        block_tokens=layout.block_tokens,
        dtype=pb.DType.Name(layout.dtype.code),
        tp_rank=layout.tp_rank,
        tp_size=layout.tp_size,
    )


def layout_from_wire(message: pb.PageLayout) -> PageLayout:
    """Returns a peer's layout, checked. Raises `InvalidArgument`."""
    return PageLayout(
        layers=message.layers,
        kv_heads=message.kv_heads,
        head_dim=message.head_dim,
        block_tokens=message.block_tokens,
        dtype=DType.from_code(message.dtype),
        tp_rank=message.tp_rank,
        tp_size=message.tp_size,
    )


def event_to_wire(event: PageEvent) -> pb.PageEvent:
    """Returns our page event as a message."""
    return pb.PageEvent(kind=pb.PageEvent.Kind.Name(event.kind), hash=event.hash, sequence=event.sequence, dropped=event.dropped)


def event_from_wire(message: pb.PageEvent) -> PageEvent:
    """Returns a peer's page event. Raises `ProtocolError` for an unknown kind."""
    try:
        kind = PageEventKind(message.kind)
    except ValueError:
        raise ProtocolError(f"the node sent an event of the unknown kind {message.kind}") from None
    return PageEvent(kind, message.hash, message.sequence, message.dropped)


def statuses_from_wire(numbers: Iterable[int], pages: int) -> tuple[PageStatus, ...]:
    """Returns a peer's verdicts on a batch of `pages`. Raises `ProtocolError` for another count or an unknown status."""
    try:
        statuses = tuple(PageStatus(number) for number in numbers)
    except ValueError as error:
        raise ProtocolError(f"the node gave an unknown verdict: {error}") from None
    if len(statuses) != pages:
        raise ProtocolError(f"the node gave {len(statuses)} verdicts on {pages} pages")
    return statuses


def statuses_to_wire(statuses: Iterable[PageStatus]) -> list[pb.PageStatus]:
    """Returns statuses as the message's enum values."""
    # The numbers are equal; the generated type is there only for type checkers.
    return cast("list[pb.PageStatus]", [int(status) for status in statuses])


def description_from_wire(message: pb.DescribeResponse) -> NodeDescription:
    """Returns a node's answer to `Describe`."""
    return NodeDescription(
        node_id=message.node_id,
        epoch=message.epoch,
        version=message.version,
        capacity_bytes=message.capacity_bytes,
        used_bytes=message.used_bytes,
        in_flight=message.in_flight,
        draining=message.draining,
        transports={transport.name: transport.address for transport in message.transports},
        hashes_max=message.limits.hashes_max,
        lease_ms_max=message.limits.lease_ms_max,
        page_bytes_max=message.limits.page_bytes_max,
        attend=_attend_limits(message.attend) if message.HasField("attend") else None,
        tenant=message.tenant,
    )


def _attend_limits(message: pb.AttendOffer) -> AttendLimits:
    return AttendLimits(message.rows_max, message.bytes_max, message.hashes_max, message.sets_max, message.latents, message.windows)


def statistics_to_wire(statistics: NodeStatistics) -> pb.StatsResponse:
    """Returns a node's counters as a message."""
    message = pb.StatsResponse(**{name: getattr(statistics, name) for name in _STATISTICS_FIELDS})
    add_namespaces(message, statistics.namespaces)
    return message


def add_namespaces(message: pb.StatsResponse, namespaces: Iterable[NamespaceStatistics]) -> None:
    """Adds more of a tenant's namespaces to a node's counters."""
    for space in namespaces:
        message.namespaces.add(namespace=space.namespace, layout=layout_to_wire(space.layout), pages_sealed=space.pages_sealed)


def statistics_from_wire(message: pb.StatsResponse) -> NodeStatistics:
    """Returns a node's answer to `Stats`."""
    return NodeStatistics(
        **{name: getattr(message, name) for name in _STATISTICS_FIELDS},
        namespaces=tuple(
            NamespaceStatistics(space.namespace, layout_from_wire(space.layout), space.pages_sealed) for space in message.namespaces
        ),
    )


_STATISTICS_FIELDS = tuple(field.name for field in fields(NodeStatistics) if field.name != "namespaces")
