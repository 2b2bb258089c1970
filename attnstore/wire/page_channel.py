"""The page channel: frames that carry page bytes over one TCP connection, as a protocol without I/O.

Owns: the frame format, who may send what when, and the limits of each frame. Sockets belong to whoever uses it: bytes received go
to `FrameReceiver.window`, bytes to send come from `encode_frame`.
Invariant: a payload is never held here. Its frame's header is announced first, the user says where the payload goes (`land`), and
the socket writes there directly; whatever a peer sends, nothing is written anywhere else.

A frame is a header of 128 bytes, little-endian, and `size_bytes` of payload:

    magic 4s | kind u8 | status u8 | order u8 | 0 u8 | request u32 | page u32 | size u64 | offset u64 | checksum u64 |
    layer_begin u32 | layer_end u32 | lease 16s | namespace 32s | hash 32s

| kind         | from   | means                                     | fields used                              | payload       |
|--------------|--------|-------------------------------------------|------------------------------------------|---------------|
| HELLO        | client | opens, with a token of `OpenChannel`      | page = version                           | token         |
| READ         | client | send me these pages                       | request, order, layers, lease, namespace | hashes        |
| WRITE        | client | here is one page (offset: its age in ms   | request, page, checksum, namespace,      | page bytes    |
|              |        | where a node hands it over, else 0)       | hash, offset                             |               |
| MATCH        | client | how much of these prefixes do you have    | request, page = prefixes, namespace,     | counts,       |
|              |        |                                           | offset = lease in ms                     | hashes        |
| ATTEND_OPEN  | client | I will ask about this set of pages        | request, page = set, lease, namespace    | shape, hashes |
| ATTEND       | client | attend to one layer of these sets         | request, page = sets, layer_begin,       | sets, rows    |
|              |        |                                           | offset = budget in ms, checksum          |               |
| ATTEND_CLOSE | client | I will not ask about this set again       | page = set                               | none          |
| WELCOME      | node   | go on                                     | page = READ's hashes, request = credits  | none          |
| SLICE        | node   | (part of) a page and its checksum; a miss | request, page, status, offset, checksum  | see `Order`   |
| VERDICT      | node   | what became of a written page             | request, page, status                    | none          |
| MATCHED      | node   | so many leading pages of each, leased     | request, lease, offset = lease in ms     | hits          |
| OPENED       | node   | the set's pages are here and stay         | request, page = set                      | none          |
| PARTIAL      | node   | what the rows get from the sets           | request, checksum                        | out, lse      |
| REFUSED      | node   | the request, or the HELLO, was wrong      | request                                  | code, message |

The checksum of a SLICE is the one that the whole page was sealed with, or `range_checksum` of those that its layers were sealed
with: nothing is hashed when it is sent, so a byte that changed in the node's memory since is found by whoever receives it.

The payloads of the three attend frames and of PARTIAL are those of `attnstore.wire.attend`, those of MATCH and MATCHED are those of
`attnstore.wire.match`. ATTEND_CLOSE has no answer.

What each side may receive, and what that makes of the connection; anything else ends it:

| side   | state | receives     | becomes |
|--------|-------|--------------|---------|
| node   | new   | HELLO        | open    |
| node   | open  | READ         | open    |
| node   | open  | WRITE        | open    |
| node   | open  | MATCH        | open    |
| node   | open  | ATTEND_OPEN  | open    |
| node   | open  | ATTEND       | open    |
| node   | open  | ATTEND_CLOSE | open    |
| client | new   | WELCOME      | open    |
| client | new   | REFUSED      | closed  |
| client | open  | SLICE        | open    |
| client | open  | VERDICT      | open    |
| client | open  | MATCHED      | open    |
| client | open  | OPENED       | open    |
| client | open  | PARTIAL      | open    |
| client | open  | REFUSED      | open    |

Credits: a client has at most `credits` pages on the way that no VERDICT has come for, and at most two READs that are not fully
answered, the second of at most `CHANNEL_SECOND_READ_HASHES_MAX` hashes: what one side sends before it reads fits the kernel's
buffers, so neither waits for a peer that waits for it. Of MATCH, ATTEND_OPEN and ATTEND together it has one that is not answered.
The node serves a connection's frames one after the other; a client that wants more at once opens several connections.
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
"""2: checksums of parts of pages are made when a page is sealed, no longer when they are sent."""
MAGIC: Final = b"ATPC"
_HEADER: Final = struct.Struct("<4sBBBxIIQQQII16s32s32s")
HEADER_BYTES: Final = _HEADER.size
assert HEADER_BYTES == 128


class Kind(enum.IntEnum):
    """What a frame is. Clients send the numbers below 16."""

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
    """In which order a READ is answered.

    PAGES: one SLICE for each page asked for, in order. LAYERS: first one SLICE without bytes for each page that is missing; then,
    layer by layer, the layer's bytes of all other pages, in order. A SLICE carries the bytes of one or more consecutive of these
    pages then (at most `CHANNEL_GATHER_PAGES`), `page` being the first, and before them the checksum of the layer of each of them,
    u64 little-endian; the header has none.
    """

    PAGES = 0
    LAYERS = 1


class Role(enum.StrEnum):
    """Which side a receiver is on."""

    NODE = "node"
    CLIENT = "client"


class State(enum.StrEnum):
    """Where a connection is, as seen by one receiving side."""

    NEW = "new"
    OPEN = "open"
    CLOSED = "closed"


TRANSITIONS: Final[dict[tuple[Role, State, Kind], State]] = {
    (Role.NODE, State.NEW, Kind.HELLO): State.OPEN,
    (Role.NODE, State.OPEN, Kind.READ): State.OPEN,
    (Role.NODE, State.OPEN, Kind.WRITE): State.OPEN,
    (Role.NODE, State.OPEN, Kind.MATCH): State.OPEN,
    (Role.NODE, State.OPEN, Kind.ATTEND_OPEN): State.OPEN,
    (Role.NODE, State.OPEN, Kind.ATTEND): State.OPEN,
    (Role.NODE, State.OPEN, Kind.ATTEND_CLOSE): State.OPEN,
    (Role.CLIENT, State.NEW, Kind.WELCOME): State.OPEN,
    (Role.CLIENT, State.NEW, Kind.REFUSED): State.CLOSED,
    (Role.CLIENT, State.OPEN, Kind.SLICE): State.OPEN,
    (Role.CLIENT, State.OPEN, Kind.VERDICT): State.OPEN,
    (Role.CLIENT, State.OPEN, Kind.MATCHED): State.OPEN,
    (Role.CLIENT, State.OPEN, Kind.OPENED): State.OPEN,
    (Role.CLIENT, State.OPEN, Kind.PARTIAL): State.OPEN,
    (Role.CLIENT, State.OPEN, Kind.REFUSED): State.OPEN,
}
"""(role, state, kind received) -> state. A frame that is not in the table is a `ProtocolError`."""

_PAYLOAD_BYTES_MAX: Final[dict[Kind, int]] = {
    Kind.HELLO: CHANNEL_TOKEN_BYTES,
    Kind.READ: CHANNEL_READ_HASHES_MAX * HASH_BYTES,
    Kind.WRITE: PAGE_BYTES_MAX,
    Kind.MATCH: CHANNEL_READ_HASHES_MAX * (COUNT_BYTES + HASH_BYTES),
    Kind.ATTEND_OPEN: ATTEND_FRAME_BYTES_MAX,
    Kind.ATTEND: ATTEND_FRAME_BYTES_MAX,
    Kind.ATTEND_CLOSE: 0,
    Kind.WELCOME: 0,
    Kind.SLICE: PAGE_BYTES_MAX + CHANNEL_GATHER_PAGES * LAYER_CHECKSUM_BYTES,
    Kind.VERDICT: 0,
    Kind.MATCHED: CHANNEL_READ_HASHES_MAX * COUNT_BYTES,
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
"""The statuses that a frame of this kind must have one of; other kinds have none."""

_KIND_OF_CODE: Final = {kind.value: kind for kind in Kind}
_ORDER_OF_CODE: Final = {order.value: order for order in Order}
_NO_STATUS: Final = 0
_STATUS_OF_CODE: Final[dict[int, PageStatus | None]] = {_NO_STATUS: None, **{status.value: status for status in PageStatus}}

NO_LEASE: Final = bytes(LEASE_ID_BYTES)
_NO_HASH: Final = bytes(HASH_BYTES)


def next_request(request: int) -> int:
    """The number of the request after this one: a u32, which wraps."""
    return (request + 1) % (1 << 32)


class Frame(NamedTuple):
    """A frame's header. `lease`, `namespace` and `hash` are all zeros, and `status` None, where the frame has none."""

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
        """The lease named, None where there is none."""
        return None if self.lease == NO_LEASE else self.lease


def encode_frame(frame: Frame) -> bytes:
    """The 128 bytes that go before the payload."""
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
    """The header of a SLICE with bytes, the frame that matters for speed: no `Frame` in between."""
    return _HEADER.pack(
        MAGIC, Kind.SLICE, PageStatus.OK, 0, request, page, size_bytes, offset_bytes, checksum, 0, 0, NO_LEASE, _NO_HASH, _NO_HASH
    )


def encode_refusal(request: int, error: AttnStoreError) -> bytes:
    """A whole REFUSED frame, payload included."""
    reason = f"{error.code}\n{error}".encode()[:CHANNEL_REASON_BYTES_MAX]
    return encode_frame(Frame(Kind.REFUSED, request=request, size_bytes=len(reason))) + reason


def decode_refusal(reason: Buffer) -> AttnStoreError:
    """The typed error that a REFUSED frame's payload carries; `Unavailable` for a code that this version does not know."""
    code, _, message = bytes(reason).decode("utf-8", "replace").partition("\n")
    return (error_of_code(code) or Unavailable)(message or code)


def decode_frame(header: Buffer) -> Frame:
    """The inverse of `encode_frame`. Raises `ProtocolError` for anything that no peer of this version sends."""
    (magic, kind, status, order, request, page, size, offset, checksum, layer_begin, layer_end, lease, namespace, page_hash) = (
        _HEADER.unpack(header)
    )
    if magic != MAGIC:
        raise ProtocolError("the peer does not speak the page channel's protocol")
    try:
        # Look-ups, because a call of an enum's class costs as much as all the rest.
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


class FrameReceiver:
    """One direction of a connection: tells where the next bytes go and what has arrived.

    The cycle: write bytes to `windows()`, in order, report them to `received(count)`, until that returns an arrival. Where a frame
    announces a payload, say `land(*views)` or `discard(scratch)` before the cycle goes on; the same frame arrives once more when
    its payload is whole.
    """

    def __init__(self, role: Role) -> None:
        self._role = role
        self._header = bytearray(HEADER_BYTES)
        self._windows = [memoryview(self._header)]
        self._scratch = memoryview(b"")
        self._frame: Frame | None = None
        self._left_bytes = 0
        self._ahead = False
        self.state = State.NEW

    @property
    def at_boundary(self) -> bool:
        """No frame has begun: the peer may close here."""
        return self._frame is None and bool(self._windows) and len(self._windows[0]) == HEADER_BYTES

    @property
    def payload_left_bytes(self) -> int:
        """Bytes of the announced payload that have not arrived."""
        return self._left_bytes

    def windows(self) -> list[memoryview]:
        """Where the next bytes must be written: views that are not empty, filled one after the other."""
        assert self._windows, "land() or discard() comes before the payload"
        return self._windows

    def land(self, *views: memoryview, ahead: bool = False) -> None:
        """The announced payload goes into `views`, which have exactly its size together.

        `ahead`: another frame is sure to follow, and the windows go on with its header. Once this frame has arrived, ask
        `announced` for that one before the cycle goes on.
        """
        assert sum(map(len, views)) == self._left_bytes > 0
        self._windows = list(views)
        self._ahead = ahead
        if ahead:
            self._windows.append(memoryview(self._header))

    def announced(self) -> Frame | None:
        """The frame whose header came whole with the payload before it; None where there is none. Raises as `received`."""
        return self._announced() if self._frame is None and not self._windows else None

    def discard(self, scratch: memoryview) -> None:
        """The announced payload is thrown away, through `scratch` of any size."""
        assert len(scratch) > 0 < self._left_bytes
        self._scratch = scratch
        self._windows = [scratch[: self._left_bytes]]

    def received(self, count: int) -> Frame | None:
        """Takes note of `count` bytes written to the windows; the frame whose header, or whose payload, is complete now.

        Raises `ProtocolError` for a malformed frame or one out of turn; the state is CLOSED then.
        """
        assert count > 0
        self._consume(count)
        if self._frame is None:
            return None if self._windows else self._announced()
        self._left_bytes -= min(count, self._left_bytes)
        if self._left_bytes > 0:
            if not self._windows:
                self._windows = [self._scratch[: self._left_bytes]]
            return None
        frame, self._frame = self._frame, None
        if not self._ahead:
            self._windows = [memoryview(self._header)]
        self._ahead = False
        return frame

    def _consume(self, count: int) -> None:
        windows = self._windows
        filled = 0
        while filled < len(windows) and count >= len(windows[filled]):
            count -= len(windows[filled])
            filled += 1
        del windows[:filled]
        if count:
            windows[0] = windows[0][count:]

    def _announced(self) -> Frame:
        state, self.state = self.state, State.CLOSED
        frame = decode_frame(self._header)
        following = TRANSITIONS.get((self._role, state, frame.kind))
        if following is None:
            raise ProtocolError(f"a {self._role.value} whose channel is {state.value} expects no {frame.kind.name} frame")
        self.state = following
        if frame.size_bytes > 0:
            self._frame = frame
            self._left_bytes = frame.size_bytes
        else:
            self._windows = [memoryview(self._header)]
        return frame
