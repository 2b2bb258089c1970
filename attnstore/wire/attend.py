"""The messages of an attend stream: sets of pages, query rows and partials, as frame payloads and as protobuf messages.

Owns: `AttendOpen`, `AttendQuery`, `AttendClose` and their two encodings, one for the page channel (below) and one for gRPC.
Invariant: what a peer sends is checked here against the limits, before memory is allocated or anything is computed for it.

Payloads on the page channel, little-endian:

    ATTEND_OPEN   q_heads u32 | value_dim u32 | scale f64 | hashes, 32 bytes each
    ATTEND        (set u32 | rows u32) for each set | rows fp32 [total rows, q_heads, head_dim]
    ATTEND        (set u32 | WINDOWED + rows u32) for each set | first keys u32 [total rows] | rows as above
    PARTIAL       out fp32 [total rows, q_heads, head_dim] | lse fp32 [total rows, q_heads]

`value_dim` is 0 for pages with K and V apart. Otherwise the pages hold latents: query rows have `PageLayout.row_dim` elements for
each head, and `out` has `value_dim`. A node that does not know `value_dim` refuses each query for the size of its rows; one that
does not know WINDOWED refuses it as too many rows. So no query is answered as another one.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Final

from attnstore.core.hashing import joint_checksum, page_checksum
from attnstore.errors import InvalidArgument, ProtocolError, Unavailable
from attnstore.limits import (
    ATTEND_BYTES_MAX,
    ATTEND_HASHES_MAX,
    ATTEND_HEADS_MAX,
    ATTEND_ROWS_MAX,
    ATTEND_SETS_MAX,
    DEADLINE_MS_MAX,
    LEASE_ID_BYTES,
)
from attnstore.wire.chunks import Buffer
from attnstore.wire.messages import check_namespace, join_hashes, split_hashes
from attnstore.wire.v1 import store_pb2 as pb

FLOAT_BYTES: Final = 4
_OPEN_HEAD: Final = struct.Struct("<IId")
_SET_HEAD: Final = struct.Struct("<II")
OPEN_HEAD_BYTES: Final = _OPEN_HEAD.size
SET_HEAD_BYTES: Final = _SET_HEAD.size
FIRST_KEY_BYTES: Final = 4
WINDOWED: Final = 1 << 31
"""Added to the number of rows of each set of a windowed query; far above the most rows that a query may have."""

_VALUE_DIM_MAX: Final = (1 << 32) - 1

assert ATTEND_ROWS_MAX < WINDOWED


Sets = tuple[tuple[int, int], ...]
"""`(set_id, rows)` of each set that a query asks about."""

_SETS_KEPT: Final = 256


@lru_cache(_SETS_KEPT)
def _checked_rows(sets: Sets) -> int:
    """Returns the rows of all sets together. Raises `InvalidArgument` beyond the limits."""
    if not 1 <= len(sets) <= ATTEND_SETS_MAX:
        raise InvalidArgument(f"a query names {len(sets)} sets; it must name 1 to {ATTEND_SETS_MAX}")
    total = sum(rows for _, rows in sets)
    if not 1 <= total <= ATTEND_ROWS_MAX or not all(rows for _, rows in sets):
        raise InvalidArgument(f"a query has {total} rows; it must have 1 to {ATTEND_ROWS_MAX}, and at least one for each set")
    return total


@dataclass(frozen=True, slots=True)
class AttendShape:
    """The parameters shared by all sets of one stream. `scale` is the factor on `q . k`. `value_dim` is 0, or how many elements of
    a latent row are its value, see `PageLayout.of_latents`.
    """

    namespace: bytes
    q_heads: int
    scale: float
    value_dim: int = 0


@dataclass(frozen=True, slots=True)
class AttendOpen:
    """Opens a set of pages under the client's number `set_id`; the lease keeps the pages in place."""

    set_id: int
    shape: AttendShape
    hashes: Sequence[bytes]
    lease_id: bytes

    def __post_init__(self) -> None:
        check_namespace(self.shape.namespace)
        if not 1 <= len(self.hashes) <= ATTEND_HASHES_MAX:
            raise InvalidArgument(f"a set has {len(self.hashes)} pages; it must have 1 to {ATTEND_HASHES_MAX}")
        if len(self.lease_id) != LEASE_ID_BYTES:
            raise InvalidArgument(f"a set needs a lease id of {LEASE_ID_BYTES} bytes, not of {len(self.lease_id)}")
        if not 1 <= self.shape.q_heads <= ATTEND_HEADS_MAX:
            raise InvalidArgument(f"q_heads is {self.shape.q_heads}; it must be between 1 and {ATTEND_HEADS_MAX}")
        if not math.isfinite(self.shape.scale):
            raise InvalidArgument(f"scale is {self.shape.scale}; it must be finite")
        if not 0 <= self.shape.value_dim <= _VALUE_DIM_MAX:
            raise InvalidArgument(f"value_dim is {self.shape.value_dim}; it must be between 0 and {_VALUE_DIM_MAX}")


@dataclass(frozen=True, slots=True)
class AttendQuery:
    """Query rows against one layer. `sets`: `(set_id, rows)` in the order of `rows`, fp32 `[total rows, q_heads, head_dim]`; a
    step asks each layer about the same sets, so they are checked and encoded once.

    `windowed`: before them, `rows` has the first key that each row sees, u32 `[total rows]`, counted from the first key of the
    row's set and below the set's keys. The row sees that key and all after it. Otherwise every row sees all keys.
    The node may drop a query that it cannot answer within `budget_ms` from now; 0 means no limit.
    """

    layer: int
    budget_ms: int
    sets: Sets
    rows: Buffer
    windowed: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.budget_ms <= DEADLINE_MS_MAX:
            raise InvalidArgument(f"budget_ms is {self.budget_ms}; it must be between 0 and {DEADLINE_MS_MAX}")
        _checked_rows(self.sets)
        vectors_bytes = memoryview(self.rows).nbytes - self._firsts_bytes
        if not 0 <= vectors_bytes <= ATTEND_BYTES_MAX:
            raise InvalidArgument(f"a query's rows have {vectors_bytes} bytes; 0 to {ATTEND_BYTES_MAX} are allowed")

    @property
    def total_rows(self) -> int:
        """The rows of all sets together."""
        return _checked_rows(self.sets)

    @property
    def firsts(self) -> memoryview:
        """The first key that each row sees, u32 little-endian `[total rows]`, if `windowed`; else empty."""
        return memoryview(self.rows).cast("B")[: self._firsts_bytes]

    @property
    def vectors(self) -> memoryview:
        """The query rows without their first keys, fp32 `[total rows, q_heads, head_dim]`."""
        return memoryview(self.rows).cast("B")[self._firsts_bytes :]

    @property
    def _firsts_bytes(self) -> int:
        return FIRST_KEY_BYTES * self.total_rows if self.windowed else 0


@dataclass(frozen=True, slots=True)
class AttendClose:
    """Closes a set. A set that is not open is ignored, because its lease may have expired."""

    set_id: int


def query_of(layer: int, budget_ms: int, sets: Sequence[tuple[int, int]], rows: Buffer, firsts: Sequence[int] = ()) -> AttendQuery:
    """Returns the query of rows, fp32 `[total rows, q_heads, head_dim]`; windowed if there are `firsts`, one for each row.

    Raises `InvalidArgument`.
    """
    named = tuple(sets)
    if len(firsts) == 0:
        return AttendQuery(layer, budget_ms, named, rows)
    total_rows = sum(count for _, count in named)
    if len(firsts) != total_rows:
        raise InvalidArgument(f"{len(firsts)} first keys are given for {total_rows} rows; give one for each row, or none")
    try:
        head = struct.pack(f"<{total_rows}I", *firsts)
    except struct.error:
        raise InvalidArgument("a first key is negative or above 32 bits; it must be a number of keys of the row's set") from None
    return AttendQuery(layer, budget_ms, named, b"".join((head, rows)), windowed=True)


AttendStep = AttendOpen | AttendQuery | AttendClose


def encode_open(opening: AttendOpen) -> bytes:
    """Returns the payload of an ATTEND_OPEN frame."""
    shape = opening.shape
    return _OPEN_HEAD.pack(shape.q_heads, shape.value_dim, shape.scale) + join_hashes(opening.hashes)


def decode_open(set_id: int, namespace: bytes, lease_id: bytes, payload: Buffer) -> AttendOpen:
    """The inverse of `encode_open`, given the fields of the frame's header. Raises `InvalidArgument`."""
    if len(payload) < OPEN_HEAD_BYTES:
        raise InvalidArgument(f"an ATTEND_OPEN frame has {len(payload)} bytes; its head alone has {OPEN_HEAD_BYTES}")
    q_heads, value_dim, scale = _OPEN_HEAD.unpack_from(payload)
    shape = AttendShape(namespace, q_heads, scale, value_dim)
    return AttendOpen(set_id, shape, split_hashes(bytes(payload[OPEN_HEAD_BYTES:])), lease_id)


@lru_cache(_SETS_KEPT)
def encode_sets(sets: Sets, *, windowed: bool = False) -> bytes:
    """Returns the head of an ATTEND frame's payload; `AttendQuery.rows` follow it."""
    mark = WINDOWED if windowed else 0
    return b"".join(_SET_HEAD.pack(set_id, mark + rows) for set_id, rows in sets)


def decode_query(layer: int, budget_ms: int, sets: int, payload: memoryview) -> AttendQuery:
    """Returns the query of `sets` sets in an ATTEND frame's payload, sharing its memory. Raises `InvalidArgument`."""
    head_bytes = sets * SET_HEAD_BYTES
    if not 1 <= sets <= ATTEND_SETS_MAX or len(payload) < head_bytes:
        raise InvalidArgument(f"an ATTEND frame of {len(payload)} bytes names {sets} sets")
    named, windowed = _decoded_sets(bytes(payload[:head_bytes]))
    return AttendQuery(layer, budget_ms, named, payload[head_bytes:], windowed)


@lru_cache(_SETS_KEPT)
def _decoded_sets(head: bytes) -> tuple[Sets, bool]:
    """Returns the sets that `encode_sets` encoded, and whether their query is windowed."""
    named = tuple(_SET_HEAD.iter_unpack(head))
    marked = {rows >= WINDOWED for _, rows in named}
    if len(marked) > 1:
        raise InvalidArgument("an ATTEND frame has first keys for the rows of some sets; it must have them for all or for none")
    if True not in marked:
        return named, False
    return tuple((set_id, rows - WINDOWED) for set_id, rows in named), True


def step_to_wire(step: AttendStep) -> pb.AttendRequest:
    """Returns a step as a message."""
    match step:
        case AttendOpen(set_id, shape, hashes, lease_id):
            return pb.AttendRequest(
                open=pb.AttendOpen(
                    set=set_id,
                    namespace=shape.namespace,
                    hashes=join_hashes(hashes),
                    lease_id=lease_id,
                    q_heads=shape.q_heads,
                    scale=shape.scale,
                    value_dim=shape.value_dim,
                )
            )
        case AttendQuery(layer, budget_ms, sets, rows, windowed):
            named = [pb.AttendRows(set=set_id, rows=count) for set_id, count in sets]
            query = pb.AttendQuery(
                layer=layer, budget_ms=budget_ms, sets=named, rows=bytes(rows), checksum=page_checksum(rows), windowed=windowed
            )
            return pb.AttendRequest(query=query)
        case AttendClose(set_id):
            return pb.AttendRequest(close=pb.AttendClose(set=set_id))


def step_from_wire(message: Any) -> AttendStep:
    """Returns a peer's step, checked. Raises `InvalidArgument`, or `ProtocolError` for an unknown kind of step."""
    kind = message.WhichOneof("step")
    if kind == "open":
        opening = message.open
        shape = AttendShape(opening.namespace, opening.q_heads, opening.scale, opening.value_dim)
        return AttendOpen(opening.set, shape, split_hashes(opening.hashes), opening.lease_id)
    if kind == "query":
        query = message.query
        if query.HasField("checksum") and query.checksum != page_checksum(query.rows):
            raise ProtocolError("the rows of an attend query do not match their checksum")
        sets = tuple((named.set, named.rows) for named in query.sets)
        return AttendQuery(query.layer, query.budget_ms, sets, query.rows, query.windowed)
    if kind == "close":
        return AttendClose(message.close.set)
    raise ProtocolError("an attend request is neither open, query nor close")


def opened_to_wire(set_id: int) -> pb.AttendResponse:
    """Returns the answer to an open."""
    return pb.AttendResponse(opened=pb.AttendOpened(set=set_id))


def partial_to_wire(out: Buffer, lse: Buffer) -> pb.AttendResponse:
    """Returns the answer to a query."""
    return pb.AttendResponse(partial=pb.AttendPartial(out=bytes(out), lse=bytes(lse), checksum=joint_checksum((out, lse))))


def partial_from_wire(message: Any) -> tuple[bytes, bytes]:
    """Returns `out` and `lse` of an answer. Raises `Unavailable` if they do not match their checksum."""
    partial = message.partial
    if partial.HasField("checksum") and partial.checksum != joint_checksum((partial.out, partial.lse)):
        raise Unavailable("the received partial does not match its checksum")
    return partial.out, partial.lse
