"""The shared memory protocol between a node and the workers on its host, without I/O.

Owns: the layout of an extent in its file (`ExtentLayout`), and the messages on the Unix socket by which a reader learns where pages
are and a writer tells the node where new pages are. Page bytes are not sent: a reader maps the extent and reads them in place, and
the node maps the file that a writer lends.
Invariant: a location is valid only together with its stamp. The node changes the stamp word of a slot before it writes new bytes
into the slot. A reader that finds the stamp unchanged *after* it used the bytes has used the bytes of the requested page.

An extent's file is `extent_bytes` of data, rounded up to 4096, and then one little-endian u64 of stamps for each 4096 bytes of
data. The stamp of a slot is the word of the 4096 bytes in which it begins: the generation of the slot that last began there. Slots
smaller than that share words, which costs a reader an occasional needless miss and never a wrong byte.

A writer lends the node a memory file, sealed against shrinking, and puts pages there. The node copies each page into its slot and
stores it only if the checksum of its own copy is the announced one, so a writer that changes the bytes meanwhile gains nothing. The
writer reuses the bytes after it has the node's verdict on them. The node unmaps the file when the connection ends.

A message is a header of 12 bytes, little-endian, `magic 4s | kind u8 | 0 3x | count u32`, and a payload whose size follows from
kind and count. The node answers a LOCATE by one or more non-empty LOCATED that together cover all pages, and every other request by
one message. It answers the requests of a connection in order. A client has so few requests in flight (two LOCATEs, a few TAKEs)
that the messages of both sides fit the kernel's buffers, so neither side waits for the other to read.

| kind    | from   | means                                            | payload                               | count     |
|---------|--------|--------------------------------------------------|---------------------------------------|-----------|
| HELLO   | client | open, with a token of `OpenChannel` over gRPC    | token 32s                             | version   |
| LOCATE  | client | return the places of these pages                 | RANGE, lease 16s, hash 32s...         | hashes    |
| MAP     | client | send the descriptor of this extent (see LOCATED) | extent u32, tenancy u64               | 0         |
| LEND    | client | the attached file will contain pages             | size u64                              | 0         |
| TAKE    | client | store these pages of the file lent last          | namespace 32s, ITEM...                | pages     |
| WELCOME | node   | to HELLO; an equal epoch means the same memory   | epoch 16s, extent_bytes u64           | 0         |
| LOCATED | node   | to LOCATE: status and place of the next pages    | PLACE...                              | pages     |
| MAPPED  | node   | to MAP: the descriptor is attached, read-only    | offset u64, size u64                  | 0         |
| GONE    | node   | to MAP: the extent now has another tenant        |                                       | 0         |
| LENT    | node   | to LEND: the file is mapped                      |                                       | 0         |
| TAKEN   | node   | to TAKE: the verdict on each page                | status u8...                          | pages     |
| REFUSED | node   | to any request: it was refused                   | `code\\nmessage`                      | bytes     |

MAPPED names the bytes of the file that the extent occupies; their size is at least the extent's `file_bytes`, and offset and size
are multiples of 4096.

RANGE is `namespace 32s | layer_begin u32 | layer_end u32`: the layers that the reader will use; 0 and 0 mean all layers. PLACE is
`status u8 | 0 3x | extent u32 | tenancy u64 | offset u64 | size u64 | stamp u64 | checksum u64`; all fields but the status are 0
for a page that was not found. Offset and size are those of the whole page. The checksum was made when the page was sealed: that of
the whole page, or `range_checksum` of the checksums of the layers in RANGE. ITEM is `hash 32s | checksum u64 | offset u64`: the
page's bytes begin at `offset` of the file; their number follows from the namespace's layout.
"""

from __future__ import annotations

import enum
import struct
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

from attnstore.errors import AttnStoreError, ProtocolError, Unavailable, error_of_code
from attnstore.limits import (
    CHANNEL_REASON_BYTES_MAX,
    CHANNEL_TOKEN_BYTES,
    EPOCH_BYTES,
    HASH_BYTES,
    KIB,
    LEASE_ID_BYTES,
    SHM_LENT_BYTES_MAX,
    SHM_LOCATE_HASHES_MAX,
    SHM_TAKE_PAGES_MAX,
)
from attnstore.types import PageStatus
from attnstore.wire.chunks import Buffer

VERSION: Final = 4
"""Version 4: a LOCATE names layers, and the answer has the checksum of those layers."""
MAGIC: Final = b"ATSM"
SHM_FILE_OFFER: Final = "shm-file"
"""The name in `Describe` of this transport for extents that are parts of a file that is not sealed. Only clients configured with
the path of the file, which trust it not to shrink, may map it.
"""
_HEADER: Final = struct.Struct("<4sBxxxI")
_EXTENT: Final = struct.Struct("<IQ")
_SPAN: Final = struct.Struct("<QQ")
_FILE_BYTES_MAX: Final = 1 << 62
_WELCOME: Final = struct.Struct(f"<{EPOCH_BYTES}sQ")
_SIZE: Final = struct.Struct("<Q")
_ITEM: Final = struct.Struct(f"<{HASH_BYTES}sQQ")
_PLACE: Final = struct.Struct("<BxxxIQQQQQ")
_LOCATE: Final = struct.Struct(f"<{HASH_BYTES}sII{LEASE_ID_BYTES}s")
_NO_LEASE: Final = bytes(LEASE_ID_BYTES)
ALL_LAYERS: Final = (0, 0)
_OK: Final = int(PageStatus.OK)
_GRAIN_BYTES: Final = 4 * KIB
_STAMP_BYTES: Final = 8
HEADER_BYTES: Final = _HEADER.size


class Kind(enum.IntEnum):
    """The kind of a message. Clients send the numbers below 16, nodes the others."""

    HELLO = 1
    LOCATE = 2
    MAP = 3
    LEND = 4
    TAKE = 5
    WELCOME = 16
    LOCATED = 17
    MAPPED = 18
    GONE = 19
    REFUSED = 20
    LENT = 21
    TAKEN = 22


class State(enum.Enum):
    """The state of a connection, as the node sees it."""

    NEW = "new"
    OPEN = "open"


REQUESTS: Final[dict[State, frozenset[Kind]]] = {
    State.NEW: frozenset({Kind.HELLO}),
    State.OPEN: frozenset({Kind.LOCATE, Kind.MAP, Kind.LEND, Kind.TAKE}),
}
"""The kinds that a node expects in each state. A connection becomes OPEN when a HELLO is answered by WELCOME."""

ANSWERS: Final[dict[Kind, frozenset[Kind]]] = {
    Kind.HELLO: frozenset({Kind.WELCOME, Kind.REFUSED}),
    Kind.LOCATE: frozenset({Kind.LOCATED, Kind.REFUSED}),
    Kind.MAP: frozenset({Kind.MAPPED, Kind.GONE, Kind.REFUSED}),
    Kind.LEND: frozenset({Kind.LENT, Kind.REFUSED}),
    Kind.TAKE: frozenset({Kind.TAKEN, Kind.REFUSED}),
}
"""The kinds that a client expects after each request."""

WITH_DESCRIPTOR: Final = frozenset({Kind.MAPPED, Kind.LEND})
"""The kinds with a descriptor attached to their first byte."""


class _Shape(NamedTuple):
    """A payload of `fixed_bytes`, plus `item_bytes` for each of the items counted in the header, at most `items_max`."""

    fixed_bytes: int
    item_bytes: int
    items_max: int


_COUNT_MAX: Final = (1 << 32) - 1
_SHAPES: Final[dict[Kind, _Shape]] = {
    Kind.HELLO: _Shape(CHANNEL_TOKEN_BYTES, 0, _COUNT_MAX),
    Kind.LOCATE: _Shape(_LOCATE.size, HASH_BYTES, SHM_LOCATE_HASHES_MAX),
    Kind.MAP: _Shape(_EXTENT.size, 0, 0),
    Kind.LEND: _Shape(_SIZE.size, 0, 0),
    Kind.TAKE: _Shape(HASH_BYTES, _ITEM.size, SHM_TAKE_PAGES_MAX),
    Kind.WELCOME: _Shape(_WELCOME.size, 0, 0),
    Kind.LOCATED: _Shape(0, _PLACE.size, SHM_LOCATE_HASHES_MAX),
    Kind.MAPPED: _Shape(_SPAN.size, 0, 0),
    Kind.GONE: _Shape(0, 0, 0),
    Kind.LENT: _Shape(0, 0, 0),
    Kind.TAKEN: _Shape(0, 1, SHM_TAKE_PAGES_MAX),
    Kind.REFUSED: _Shape(0, 1, CHANNEL_REASON_BYTES_MAX),
}


@dataclass(frozen=True, slots=True)
class ExtentLayout:
    """The places of data and stamps in the file of an extent of `extent_bytes`.

    >>> layout = ExtentLayout(10_000)
    >>> layout.stamps_offset_bytes, layout.stamps, layout.file_bytes, layout.stamp_index(5_000)
    (12288, 3, 16384, 1)
    """

    extent_bytes: int

    @property
    def stamps(self) -> int:
        """The number of stamp words."""
        return -(-self.extent_bytes // _GRAIN_BYTES)

    @property
    def stamps_offset_bytes(self) -> int:
        """The offset of the first stamp."""
        return self.stamps * _GRAIN_BYTES

    @property
    def file_bytes(self) -> int:
        """The size of the file: a multiple of 4096."""
        return self.stamps_offset_bytes + -(-self.stamps * _STAMP_BYTES // _GRAIN_BYTES) * _GRAIN_BYTES

    def stamp_index(self, offset_bytes: int) -> int:
        """Returns the index of the stamp word for the slot at `offset_bytes`."""
        return offset_bytes // _GRAIN_BYTES


class Place(NamedTuple):
    """The place of a sealed page. `checksum` is that of the requested layers. The page is valid while its stamp word equals
    `stamp`.
    """

    extent: int
    tenancy: int
    offset_bytes: int
    size_bytes: int
    stamp: int
    checksum: int


class LocateRequest(NamedTuple):
    """The arguments of a LOCATE; `layers` as in `PageLayout.layer_slice`."""

    namespace: bytes
    lease_id: bytes | None
    hashes: list[bytes]
    layers: tuple[int, int]


class Item(NamedTuple):
    """A page that a writer offers: its bytes begin at `offset_bytes` of the file lent last."""

    hash: bytes
    checksum: int
    offset_bytes: int


class Taken(NamedTuple):
    """The arguments of a TAKE."""

    namespace: bytes
    items: list[Item]


@dataclass(frozen=True, slots=True)
class Welcome:
    """A node's description of its memory. `epoch` is 16 bytes, new with each start of the node."""

    epoch: bytes
    extent_bytes: int


def encode_hello(token: bytes) -> bytes:
    """Returns a HELLO."""
    assert len(token) == CHANNEL_TOKEN_BYTES
    return _HEADER.pack(MAGIC, Kind.HELLO, VERSION) + token


def encode_locate(namespace: bytes, lease_id: bytes | None, hashes: Sequence[bytes], layers: tuple[int, int] = ALL_LAYERS) -> bytes:
    """Returns a LOCATE of at most `SHM_LOCATE_HASHES_MAX` hashes."""
    fixed = _LOCATE.pack(namespace, *layers, lease_id or _NO_LEASE)
    return b"".join((_HEADER.pack(MAGIC, Kind.LOCATE, len(hashes)), fixed, *hashes))


def encode_map(extent: int, tenancy: int) -> bytes:
    """Returns a MAP."""
    return _HEADER.pack(MAGIC, Kind.MAP, 0) + _EXTENT.pack(extent, tenancy)


def encode_lend(size_bytes: int) -> bytes:
    """Returns a LEND; the caller attaches the descriptor."""
    return _HEADER.pack(MAGIC, Kind.LEND, 0) + _SIZE.pack(size_bytes)


def encode_take(namespace: bytes, items: Sequence[Item]) -> bytes:
    """Returns a TAKE of at most `SHM_TAKE_PAGES_MAX` pages."""
    return b"".join((_HEADER.pack(MAGIC, Kind.TAKE, len(items)), namespace, *(_ITEM.pack(*item) for item in items)))


def encode_welcome(welcome: Welcome) -> bytes:
    """Returns a WELCOME."""
    return _HEADER.pack(MAGIC, Kind.WELCOME, 0) + _WELCOME.pack(welcome.epoch, welcome.extent_bytes)


def encode_located(places: Sequence[Place | PageStatus]) -> bytes:
    """Returns a LOCATED; a page that is not found has a status other than OK instead of a place."""
    pack = _PLACE.pack
    entries = (pack(place, 0, 0, 0, 0, 0, 0) if isinstance(place, PageStatus) else pack(PageStatus.OK, *place) for place in places)
    return b"".join((_HEADER.pack(MAGIC, Kind.LOCATED, len(places)), *entries))


def encode_mapped(offset_bytes: int, size_bytes: int) -> bytes:
    """Returns a MAPPED."""
    return _HEADER.pack(MAGIC, Kind.MAPPED, 0) + _SPAN.pack(offset_bytes, size_bytes)


def encode_gone() -> bytes:
    """Returns a GONE."""
    return _HEADER.pack(MAGIC, Kind.GONE, 0)


def encode_lent() -> bytes:
    """Returns a LENT."""
    return _HEADER.pack(MAGIC, Kind.LENT, 0)


def encode_taken(verdicts: Sequence[PageStatus]) -> bytes:
    """Returns a TAKEN."""
    return _HEADER.pack(MAGIC, Kind.TAKEN, len(verdicts)) + bytes(verdicts)


def encode_refusal(error: AttnStoreError) -> bytes:
    """Returns a REFUSED."""
    reason = f"{error.code}\n{error}".encode()[:CHANNEL_REASON_BYTES_MAX]
    return _HEADER.pack(MAGIC, Kind.REFUSED, len(reason)) + reason


def decode_header(header: Buffer, expected: Collection[Kind]) -> tuple[Kind, int, int]:
    """Returns kind, count and payload size of the message with this header. Raises `ProtocolError` unless the kind is
    `expected`.
    """
    magic, number, count = _HEADER.unpack(header)
    if magic != MAGIC:
        raise ProtocolError("the peer does not speak the shared memory protocol")
    kind = next((kind for kind in expected if kind == number), None)
    if kind is None:
        due = ", ".join(sorted(kind.name for kind in expected))
        raise ProtocolError(f"shared memory: a message of kind {number} came where {due} was due")
    shape = _SHAPES[kind]
    if count > shape.items_max:
        raise ProtocolError(f"shared memory: a {kind.name} announces {count} items; the maximum is {shape.items_max}")
    return kind, count, shape.fixed_bytes + shape.item_bytes * count


def decode_locate(payload: bytes) -> LocateRequest:
    """Returns the arguments of a LOCATE whose header was accepted."""
    namespace, layer_begin, layer_end, lease = _LOCATE.unpack_from(payload)
    hashes = [payload[at : at + HASH_BYTES] for at in range(_LOCATE.size, len(payload), HASH_BYTES)]
    return LocateRequest(namespace, None if lease == _NO_LEASE else lease, hashes, (layer_begin, layer_end))


def decode_map(payload: bytes) -> tuple[int, int]:
    """Returns extent and tenancy of a MAP."""
    extent, tenancy = _EXTENT.unpack(payload)
    return extent, tenancy


def decode_lend(payload: bytes) -> int:
    """Returns the size of a lent file. Raises `ProtocolError` if it is 0 or above the maximum."""
    (size_bytes,) = _SIZE.unpack(payload)
    if not 0 < size_bytes <= SHM_LENT_BYTES_MAX:
        raise ProtocolError(f"shared memory: {size_bytes} bytes are lent; the maximum is {SHM_LENT_BYTES_MAX}")
    return int(size_bytes)


def decode_take(payload: bytes) -> Taken:
    """Returns the arguments of a TAKE whose header was accepted."""
    return Taken(payload[:HASH_BYTES], [Item(*fields) for fields in _ITEM.iter_unpack(payload[HASH_BYTES:])])


def decode_taken(payload: bytes) -> list[PageStatus]:
    """Returns the verdicts. Raises `ProtocolError` for an unknown status."""
    return [_status(status) for status in payload]


def decode_welcome(payload: bytes) -> Welcome:
    """The inverse of `encode_welcome`. Raises `ProtocolError` for extents of no bytes."""
    epoch, extent_bytes = _WELCOME.unpack(payload)
    if not extent_bytes:
        raise ProtocolError("the node's WELCOME names extents of no bytes")
    return Welcome(epoch, extent_bytes)


def decode_located(payload: bytes, layout: ExtentLayout) -> list[Place | PageStatus]:
    """Returns place or status of each page. Raises `ProtocolError` for a status or a place that no correct node sends."""
    places: list[Place | PageStatus] = []
    extent_bytes = layout.extent_bytes
    for status, extent, tenancy, offset_bytes, size_bytes, stamp, checksum in _PLACE.iter_unpack(payload):
        if status != _OK:
            places.append(_status(status))
        elif size_bytes and offset_bytes + size_bytes <= extent_bytes:
            places.append(Place(extent, tenancy, offset_bytes, size_bytes, stamp, checksum))
        else:
            raise ProtocolError(f"the node places a page outside its extent of {extent_bytes} bytes")
    return places


def decode_mapped(payload: bytes, layout: ExtentLayout) -> tuple[int, int]:
    """Returns offset and size of a MAPPED. Raises `ProtocolError` for bytes that cannot hold an extent."""
    offset_bytes, size_bytes = _SPAN.unpack(payload)
    if size_bytes < layout.file_bytes or offset_bytes % _GRAIN_BYTES or size_bytes % _GRAIN_BYTES:
        raise ProtocolError(f"the node hands out {size_bytes} bytes at {offset_bytes} for an extent of {layout.file_bytes}")
    if offset_bytes + size_bytes > _FILE_BYTES_MAX:
        raise ProtocolError("the node hands out bytes beyond the maximum size of a file")
    return offset_bytes, size_bytes


def decode_refusal(reason: bytes) -> AttnStoreError:
    """Returns the typed error that a REFUSED carries, or `Unavailable` for a code that this version does not know."""
    code, _, message = reason.decode("utf-8", "replace").partition("\n")
    return (error_of_code(code) or Unavailable)(message or code)


def _status(status: int) -> PageStatus:
    try:
        return PageStatus(status)
    except ValueError as error:
        raise ProtocolError(f"shared memory: {error}") from None
