"""Shared memory between a node and the workers on its host: what both sides must agree on, without I/O.

Owns: how one extent is laid out in its file (`ExtentLayout`), and the protocol on the Unix socket by which a reader learns where
pages are, and a writer says where the node finds new ones. Page bytes never travel here: a reader maps the extent and reads them
where they lie, and the node maps what a writer lends it.
Invariant: a location is worth something only together with its stamp. The node changes the stamp word of a slot before it lets
new bytes into the slot, so a reader that finds the stamp unchanged *after* it used the bytes used those of the page it asked for.

An extent's file is `extent_bytes` of data, rounded up to 4096, and then one little-endian u64 of stamps for each 4096 bytes of
data. A slot's stamp is the word of the 4096 bytes that it begins in: the generation of the slot that last began there. Slots
smaller than that share words, which costs a reader an occasional needless miss and never a wrong byte.

A writer lends the node a memory file of its own, sealed against shrinking, and puts pages there. The node copies each into its slot
and takes it only if the checksum of what *it* has then is the one announced, so a writer that changes the bytes meanwhile gains
nothing. The writer uses the bytes again when it has the node's verdict on them; a node forgets the file with the connection.

A message is a header of 12 bytes, little-endian, `magic 4s | kind u8 | 0 3x | count u32`, and a payload whose size follows from
kind and count. A LOCATE is answered by as many LOCATED as the node likes, none of them empty, until each page had its answer; every
other request by one message. The node answers a connection's requests in their order; a client has so few of them on the way (two
LOCATEs, a few TAKEs) that both sides' messages fit the kernel's buffers and neither waits for the other to read.

| kind    | from   | means                                            | payload                               | count     |
|---------|--------|--------------------------------------------------|---------------------------------------|-----------|
| HELLO   | client | the token came from `OpenChannel` over gRPC      | token 32s                             | version   |
| LOCATE  | client | where are these pages?                           | RANGE, lease 16s, hash 32s...         | hashes    |
| MAP     | client | give me this extent, as LOCATED named it         | extent u32, tenancy u64               | 0         |
| LEND    | client | pages will lie in the attached file              | size u64                              | 0         |
| TAKE    | client | store these pages of the file lent last          | namespace 32s, ITEM...                | pages     |
| WELCOME | node   | to HELLO; an equal epoch means the same memory   | epoch 16s, extent_bytes u64           | 0         |
| LOCATED | node   | to LOCATE: status and place of the next pages    | PLACE...                              | pages     |
| MAPPED  | node   | to MAP: the descriptor is attached, read-only    | offset u64, size u64                  | 0         |
| GONE    | node   | to MAP: the extent has another tenant by now     |                                       | 0         |
| LENT    | node   | to LEND: it is mapped                            |                                       | 0         |
| TAKEN   | node   | to TAKE: the verdict on each                     | status u8...                          | pages     |
| REFUSED | node   | to any: the request was wrong                    | `code\\nmessage`                      | bytes     |

MAPPED says which bytes of the file the extent is; the size is at least the extent's `file_bytes`, and both are multiples of 4096.

RANGE is `namespace 32s | layer_begin u32 | layer_end u32`: the layers that the reader will look at, 0 and 0 being all of them.
PLACE is `status u8 | 0 3x | extent u32 | tenancy u64 | offset u64 | size u64 | stamp u64 | checksum u64`; all but the status are 0
for a page that is not there. Offset and size are those of the whole page; the checksum is the one that the whole page was sealed
with, or `range_checksum` of those that the layers of RANGE were sealed with. ITEM is `hash 32s | checksum u64 | offset u64`: the
page's bytes are those from `offset` of the file on, as many as the namespace's pages have.
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
"""4: a LOCATE says which layers, and gets their checksum."""
MAGIC: Final = b"ATSM"
SHM_FILE_OFFER: Final = "shm-file"
"""How `Describe` names this transport where the extents are parts of a file that is not sealed: only clients that were told of the
file, and trust it not to shrink, may map it.
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
    """What a message is. Clients send the numbers below 16."""

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
    """Where a connection is, as the node sees it."""

    NEW = "new"
    OPEN = "open"


REQUESTS: Final[dict[State, frozenset[Kind]]] = {
    State.NEW: frozenset({Kind.HELLO}),
    State.OPEN: frozenset({Kind.LOCATE, Kind.MAP, Kind.LEND, Kind.TAKE}),
}
"""What a node expects in each state; the connection is OPEN once a HELLO was answered by WELCOME."""

ANSWERS: Final[dict[Kind, frozenset[Kind]]] = {
    Kind.HELLO: frozenset({Kind.WELCOME, Kind.REFUSED}),
    Kind.LOCATE: frozenset({Kind.LOCATED, Kind.REFUSED}),
    Kind.MAP: frozenset({Kind.MAPPED, Kind.GONE, Kind.REFUSED}),
    Kind.LEND: frozenset({Kind.LENT, Kind.REFUSED}),
    Kind.TAKE: frozenset({Kind.TAKEN, Kind.REFUSED}),
}
"""What a client expects after each request."""

WITH_DESCRIPTOR: Final = frozenset({Kind.MAPPED, Kind.LEND})
"""Kinds to which a descriptor is attached, to the first byte."""


class _Shape(NamedTuple):
    """A payload of `fixed_bytes`, and `item_bytes` for each of at most `items_max` that the header's count says."""

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
    """Where data and stamps are in the file of an extent of `extent_bytes`.

    >>> layout = ExtentLayout(10_000)
    >>> layout.stamps_offset_bytes, layout.stamps, layout.file_bytes, layout.stamp_index(5_000)
    (12288, 3, 16384, 1)
    """

    extent_bytes: int

    @property
    def stamps(self) -> int:
        """How many stamp words there are."""
        return -(-self.extent_bytes // _GRAIN_BYTES)

    @property
    def stamps_offset_bytes(self) -> int:
        """Where the stamps begin."""
        return self.stamps * _GRAIN_BYTES

    @property
    def file_bytes(self) -> int:
        """The whole file: a multiple of 4096."""
        return self.stamps_offset_bytes + -(-self.stamps * _STAMP_BYTES // _GRAIN_BYTES) * _GRAIN_BYTES

    def stamp_index(self, offset_bytes: int) -> int:
        """Which stamp word is that of the slot at `offset_bytes`."""
        return offset_bytes // _GRAIN_BYTES


class Place(NamedTuple):
    """Where a sealed page is. `checksum` is that of the layers asked about; `stamp` is what its stamp word must still say."""

    extent: int
    tenancy: int
    offset_bytes: int
    size_bytes: int
    stamp: int
    checksum: int


class Located(NamedTuple):
    """A LOCATE's arguments; `layers` as in `PageLayout.layer_slice`."""

    namespace: bytes
    lease_id: bytes | None
    hashes: list[bytes]
    layers: tuple[int, int]


class Item(NamedTuple):
    """A page that a writer offers: its bytes begin at `offset_bytes` of what it lent."""

    hash: bytes
    checksum: int
    offset_bytes: int


class Taken(NamedTuple):
    """A TAKE's arguments."""

    namespace: bytes
    items: list[Item]


@dataclass(frozen=True, slots=True)
class Welcome:
    """What a node says of its memory. `epoch` is 16 bytes, new with each start of the node."""

    epoch: bytes
    extent_bytes: int


def encode_hello(token: bytes) -> bytes:
    """A whole HELLO."""
    assert len(token) == CHANNEL_TOKEN_BYTES
    return _HEADER.pack(MAGIC, Kind.HELLO, VERSION) + token


def encode_locate(namespace: bytes, lease_id: bytes | None, hashes: Sequence[bytes], layers: tuple[int, int] = ALL_LAYERS) -> bytes:
    """A whole LOCATE of at most `SHM_LOCATE_HASHES_MAX` hashes."""
    fixed = _LOCATE.pack(namespace, *layers, lease_id or _NO_LEASE)
    return b"".join((_HEADER.pack(MAGIC, Kind.LOCATE, len(hashes)), fixed, *hashes))


def encode_map(extent: int, tenancy: int) -> bytes:
    """A whole MAP."""
    return _HEADER.pack(MAGIC, Kind.MAP, 0) + _EXTENT.pack(extent, tenancy)


def encode_lend(size_bytes: int) -> bytes:
    """A whole LEND, to which the descriptor is attached."""
    return _HEADER.pack(MAGIC, Kind.LEND, 0) + _SIZE.pack(size_bytes)


def encode_take(namespace: bytes, items: Sequence[Item]) -> bytes:
    """A whole TAKE of at most `SHM_TAKE_PAGES_MAX` pages."""
    return b"".join((_HEADER.pack(MAGIC, Kind.TAKE, len(items)), namespace, *(_ITEM.pack(*item) for item in items)))


def encode_welcome(welcome: Welcome) -> bytes:
    """A whole WELCOME."""
    return _HEADER.pack(MAGIC, Kind.WELCOME, 0) + _WELCOME.pack(welcome.epoch, welcome.extent_bytes)


def encode_located(places: Sequence[Place | PageStatus]) -> bytes:
    """A whole LOCATED; a status other than OK stands for a page that is not there."""
    pack = _PLACE.pack
    entries = (pack(place, 0, 0, 0, 0, 0, 0) if isinstance(place, PageStatus) else pack(PageStatus.OK, *place) for place in places)
    return b"".join((_HEADER.pack(MAGIC, Kind.LOCATED, len(places)), *entries))


def encode_mapped(offset_bytes: int, size_bytes: int) -> bytes:
    """A whole MAPPED."""
    return _HEADER.pack(MAGIC, Kind.MAPPED, 0) + _SPAN.pack(offset_bytes, size_bytes)


def encode_gone() -> bytes:
    """A whole GONE."""
    return _HEADER.pack(MAGIC, Kind.GONE, 0)


def encode_lent() -> bytes:
    """A whole LENT."""
    return _HEADER.pack(MAGIC, Kind.LENT, 0)


def encode_taken(verdicts: Sequence[PageStatus]) -> bytes:
    """A whole TAKEN."""
    return _HEADER.pack(MAGIC, Kind.TAKEN, len(verdicts)) + bytes(verdicts)


def encode_refusal(error: AttnStoreError) -> bytes:
    """A whole REFUSED."""
    reason = f"{error.code}\n{error}".encode()[:CHANNEL_REASON_BYTES_MAX]
    return _HEADER.pack(MAGIC, Kind.REFUSED, len(reason)) + reason


def decode_header(header: Buffer, expected: Collection[Kind]) -> tuple[Kind, int, int]:
    """Kind, count and payload bytes of the message that begins so. Raises `ProtocolError` for anything not `expected`."""
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


def decode_locate(payload: bytes) -> Located:
    """The arguments of a LOCATE whose header was accepted."""
    namespace, layer_begin, layer_end, lease = _LOCATE.unpack_from(payload)
    hashes = [payload[at : at + HASH_BYTES] for at in range(_LOCATE.size, len(payload), HASH_BYTES)]
    return Located(namespace, None if lease == _NO_LEASE else lease, hashes, (layer_begin, layer_end))


def decode_map(payload: bytes) -> tuple[int, int]:
    """Extent and tenancy of a MAP."""
    extent, tenancy = _EXTENT.unpack(payload)
    return extent, tenancy


def decode_lend(payload: bytes) -> int:
    """The size of what is lent. Raises `ProtocolError` for more than any writer needs, or nothing."""
    (size_bytes,) = _SIZE.unpack(payload)
    if not 0 < size_bytes <= SHM_LENT_BYTES_MAX:
        raise ProtocolError(f"shared memory: {size_bytes} bytes are lent; the maximum is {SHM_LENT_BYTES_MAX}")
    return int(size_bytes)


def decode_take(payload: bytes) -> Taken:
    """The arguments of a TAKE whose header was accepted."""
    return Taken(payload[:HASH_BYTES], [Item(*fields) for fields in _ITEM.iter_unpack(payload[HASH_BYTES:])])


def decode_taken(payload: bytes) -> list[PageStatus]:
    """The verdicts. Raises `ProtocolError` for one that is none."""
    return [_status(status) for status in payload]


def decode_welcome(payload: bytes) -> Welcome:
    """The inverse of `encode_welcome`. Raises `ProtocolError` for memory without bytes."""
    epoch, extent_bytes = _WELCOME.unpack(payload)
    if not extent_bytes:
        raise ProtocolError("the node's WELCOME names extents of no bytes")
    return Welcome(epoch, extent_bytes)


def decode_located(payload: bytes, layout: ExtentLayout) -> list[Place | PageStatus]:
    """Place or status of each page. Raises `ProtocolError` for a status or a place that no correct node sends."""
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
    """Offset and size of a MAPPED. Raises `ProtocolError` for bytes that hold no extent."""
    offset_bytes, size_bytes = _SPAN.unpack(payload)
    if size_bytes < layout.file_bytes or offset_bytes % _GRAIN_BYTES or size_bytes % _GRAIN_BYTES:
        raise ProtocolError(f"the node hands out {size_bytes} bytes at {offset_bytes} for an extent of {layout.file_bytes}")
    if offset_bytes + size_bytes > _FILE_BYTES_MAX:
        raise ProtocolError("the node hands out bytes that no file has")
    return offset_bytes, size_bytes


def decode_refusal(reason: bytes) -> AttnStoreError:
    """The typed error that a REFUSED carries; `Unavailable` for a code that this version does not know."""
    code, _, message = reason.decode("utf-8", "replace").partition("\n")
    return (error_of_code(code) or Unavailable)(message or code)


def _status(status: int) -> PageStatus:
    try:
        return PageStatus(status)
    except ValueError as error:
        raise ProtocolError(f"shared memory: {error}") from None
