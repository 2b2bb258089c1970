"""The page channel: frames that carry page bytes over one TCP connection, as a protocol without I/O.

Owns: the frame format and the limits of each frame. `attnstore.wire.frame_receiver` owns which frame may arrive in which state.
Invariant: a payload is never held here. Bytes to send are a header from `encode_frame` and the payload, which the caller has.

A frame is a header of 128 bytes, little-endian, and `size_bytes` of payload:

    magic 4s | kind u8 | status u8 | order u8 | 0 u8 | request u32 | page u32 | size u64 | offset u64 | checksum u64 |
    layer_begin u32 | layer_end u32 | lease 16s | namespace 32s | hash 32s

| kind         | from   | means                                     | fields used                              | payload       |
|--------------|--------|-------------------------------------------|------------------------------------------|---------------|
| HELLO        | client | open, with a token of `OpenChannel`        | page = version                           | token         |
| READ         | client | send these pages                          | request, order, layers, lease, namespace | hashes        |
| WRITE        | client | store this page (offset: its age in ms    | request, page, checksum, namespace,      | page bytes    |
|              |        | if a node hands it over, else 0)          | hash, offset                             |               |
| MATCH        | client | count the leading pages of these prefixes | request, page = prefixes, namespace,     | counts,       |
|              |        |                                           | offset = lease in ms                     | hashes        |
| ATTEND_OPEN  | client | pin a set of pages for queries            | request, page = set, lease, namespace    | shape, hashes |
| ATTEND       | client | attend to one layer of these sets         | request, page = sets, layer_begin,       | sets, rows    |
|              |        |                                           | offset = budget in ms, checksum          |               |
| ATTEND_CLOSE | client | unpin this set                            | page = set                               | none          |
| WELCOME      | node   | the channel is open                       | page = READ's hashes, request = credits, | none          |
|              |        |                                           | offset = MATCH's hashes                  |               |
| SLICE        | node   | (part of) a page and its checksum; a miss | request, page, status, offset, checksum  | see `Order`   |
| VERDICT      | node   | the result of one WRITE                   | request, page, status                    | none          |
| MATCHED      | node   | leading pages per prefix, now leased      | request, lease, offset = lease in ms     | hits          |
| OPENED       | node   | the pages of the set are pinned           | request, page = set                      | none          |
| PARTIAL      | node   | the partial results of the rows           | request, checksum                        | out, lse      |
| REFUSED      | node   | the request, or the HELLO, was refused    | request                                  | code, message |

The checksum of a SLICE was made when the page was sealed: that of the whole page, or `range_checksum` of the checksums of its
layers. Nothing is hashed when it is sent, so the receiver detects a byte that changed in the node's memory since.

The payloads of the three attend frames and of PARTIAL are those of `attnstore.wire.attend`, those of MATCH and MATCHED are those of
`attnstore.wire.match`. ATTEND_CLOSE has no answer.

Credits: a client has at most `credits` pages in flight without a VERDICT. It has at most two READs that are not fully answered,
the second with at most `CHANNEL_SECOND_READ_HASHES_MAX` hashes. The bytes that one side sends before it reads thus fit the kernel's
buffers, so the two sides never wait for each other. At most one MATCH, ATTEND_OPEN or ATTEND is unanswered at a time. The node
serves the frames of a connection one after the other; a client opens several connections for parallel requests.
"""

from __future__ import annotations

import enum
import struct
from typing import Final, NamedTuple

from attnstore.core.hashing import LAYER_CHECKSUM_BYTES
from attnstore.errors import AttnStoreError, ProtocolError, Unavailable, error_of_code
from attnstore.limits import (
    ATTEND_BYTES_MAX,
    ATTEND_FRAME_BYTES_MAX,
    CHANNEL_GATHER_PAGES,
    CHANNEL_MATCH_HASHES_MAX,
    CHANNEL_READ_HASHES_MAX,
    CHANNEL_REASON_BYTES_MAX,
    CHANNEL_TOKEN_BYTES,
    HASH_BYTES,
    LEASE_ID_BYTES,
    PAGE_BYTES_MAX,
)
from attnstore.types import PageStatus
from attnstore.wire.chunks import Buffer
from attnstore.wire.match import COUNT_BYTES

VERSION: Final = 2
"""Version 2: the checksums of parts of pages are made when a page is sealed, not when it is sent."""
MAGIC: Final = b"ATPC"
_HEADER: Final = struct.Struct("<4sBBBxIIQQQII16s32s32s")
HEADER_BYTES: Final = _HEADER.size
assert HEADER_BYTES == 128


class Kind(enum.IntEnum):
    """The kind of a frame. Clients send the numbers below 16, nodes the others."""

    HELLO = 1
    READ = 2
    WRITE = 3
    ATTEND_OPEN = 4
    ATTEND = 5
    ATTEND_CLOSE = 6
    MATCH = 7
    WELCOME = 16
    SLICE = 17
    VERDICT = 18
    REFUSED = 19
    OPENED = 20
    PARTIAL = 21
    MATCHED = 22


class Order(enum.IntEnum):
    """The order in which a READ is answered.

    PAGES: one SLICE for each requested page, in order. LAYERS: first one SLICE without bytes for each missing page; then, layer by
    layer, the layer's bytes of all other pages, in order. Such a SLICE carries the bytes of up to `CHANNEL_GATHER_PAGES`
    consecutive pages, and `page` is the first of them. The bytes are preceded by the checksum of the layer of each page, u64
    little-endian; the header's checksum is 0.
    """

    PAGES = 0
    LAYERS = 1


_PAYLOAD_BYTES_MAX: Final[dict[Kind, int]] = {
    Kind.HELLO: CHANNEL_TOKEN_BYTES,
    Kind.READ: CHANNEL_READ_HASHES_MAX * HASH_BYTES,
    Kind.WRITE: PAGE_BYTES_MAX,
    Kind.MATCH: CHANNEL_MATCH_HASHES_MAX * (COUNT_BYTES + HASH_BYTES),
    Kind.ATTEND_OPEN: ATTEND_FRAME_BYTES_MAX,
    Kind.ATTEND: ATTEND_FRAME_BYTES_MAX,
    Kind.ATTEND_CLOSE: 0,
    Kind.WELCOME: 0,
    Kind.SLICE: PAGE_BYTES_MAX + CHANNEL_GATHER_PAGES * LAYER_CHECKSUM_BYTES,
    Kind.VERDICT: 0,
    Kind.MATCHED: CHANNEL_MATCH_HASHES_MAX * COUNT_BYTES,
    Kind.REFUSED: CHANNEL_REASON_BYTES_MAX,
    Kind.OPENED: 0,
    Kind.PARTIAL: 2 * ATTEND_BYTES_MAX,
}

_STATUSES: Final[dict[Kind, frozenset[PageStatus]]] = {
    Kind.SLICE: frozenset({PageStatus.OK, PageStatus.MISSING, PageStatus.LEASE_EXPIRED}),
    Kind.VERDICT: frozenset(
        {
            PageStatus.STORED,
            PageStatus.ALREADY_PRESENT,
            PageStatus.ARRIVING,
            PageStatus.NO_SPACE,
            PageStatus.CHECKSUM_MISMATCH,
            PageStatus.WRONG_SIZE,
            PageStatus.DELETED,
        }
    ),
}
"""The statuses that frames of this kind may have, and must have one of; frames of other kinds have none."""

_KIND_OF_CODE: Final = {kind.value: kind for kind in Kind}
_ORDER_OF_CODE: Final = {order.value: order for order in Order}
_NO_STATUS: Final = 0
_STATUS_OF_CODE: Final[dict[int, PageStatus | None]] = {_NO_STATUS: None, **{status.value: status for status in PageStatus}}

NO_LEASE: Final = bytes(LEASE_ID_BYTES)
_NO_HASH: Final = bytes(HASH_BYTES)


def next_request(request: int) -> int:
    """Returns the number of the request after this one: a u32 that wraps around."""
    return (request + 1) % (1 << 32)


class Frame(NamedTuple):
    """The header of a frame. `lease`, `namespace` and `hash` are all zeros, and `status` is None, if the frame has none."""

    kind: Kind
    request: int = 0
    page: int = 0
    size_bytes: int = 0
    offset_bytes: int = 0
    checksum: int = 0
    status: PageStatus | None = None
    order: Order = Order.PAGES
    layer_begin: int = 0
    layer_end: int = 0
    lease: bytes = NO_LEASE
    namespace: bytes = _NO_HASH
    hash: bytes = _NO_HASH

    @property
    def lease_id(self) -> bytes | None:
        """The lease that the frame names, or None."""
        return None if self.lease == NO_LEASE else self.lease


def encode_frame(frame: Frame) -> bytes:
    """Returns the 128 bytes that precede the payload."""
    return _HEADER.pack(
        MAGIC,
        frame.kind,
        _NO_STATUS if frame.status is None else frame.status,
        frame.order,
        frame.request,
        frame.page,
        frame.size_bytes,
        frame.offset_bytes,
        frame.checksum,
        frame.layer_begin,
        frame.layer_end,
        frame.lease,
        frame.namespace,
        frame.hash,
    )


def encode_slice(request: int, page: int, size_bytes: int, offset_bytes: int, checksum: int) -> bytes:
    """Returns the header of a SLICE with bytes. Builds no `Frame`, because this is the frame whose speed matters."""
    return _HEADER.pack(
        MAGIC, Kind.SLICE, PageStatus.OK, 0, request, page, size_bytes, offset_bytes, checksum, 0, 0, NO_LEASE, _NO_HASH, _NO_HASH
    )


def encode_refusal(request: int, error: AttnStoreError) -> bytes:
    """Returns a whole REFUSED frame, including its payload."""
    reason = f"{error.code}\n{error}".encode()[:CHANNEL_REASON_BYTES_MAX]
    return encode_frame(Frame(Kind.REFUSED, request=request, size_bytes=len(reason))) + reason


def decode_refusal(reason: Buffer) -> AttnStoreError:
    """Returns the typed error that a REFUSED frame carries, or `Unavailable` for a code that this version does not know."""
    code, _, message = bytes(reason).decode("utf-8", "replace").partition("\n")
    return (error_of_code(code) or Unavailable)(message or code)


def decode_frame(header: Buffer) -> Frame:
    """The inverse of `encode_frame`. Raises `ProtocolError` for a header that no peer of this version sends."""
    (magic, kind, status, order, request, page, size, offset, checksum, layer_begin, layer_end, lease, namespace, page_hash) = (
        _HEADER.unpack(header)
    )
    if magic != MAGIC:
        raise ProtocolError("the peer does not speak the page channel's protocol")
    try:
        # Dictionary look-ups, because calling an enum class would double the cost of this function.
        known = _KIND_OF_CODE[kind]
        frame = Frame(
            known,
            request,
            page,
            size,
            offset,
            checksum,
            _STATUS_OF_CODE[status],
            _ORDER_OF_CODE[order],
            layer_begin,
            layer_end,
            lease,
            namespace,
            page_hash,
        )
    except KeyError as error:
        raise ProtocolError(
            f"a page channel frame of kind {kind}, status {status}, order {order} has the unknown code {error}"
        ) from None
    if size > _PAYLOAD_BYTES_MAX[known]:
        raise ProtocolError(f"a {known.name} frame announces {size} bytes; the maximum is {_PAYLOAD_BYTES_MAX[known]}")
    statuses = _STATUSES.get(known)
    if frame.status is not None if statuses is None else frame.status not in statuses:
        raise ProtocolError(f"a {known.name} frame has the status {status}")
    if known is Kind.SLICE and (size > 0) != (frame.status is PageStatus.OK):
        raise ProtocolError(f"a SLICE of status {status} has {size} bytes")
    return frame
