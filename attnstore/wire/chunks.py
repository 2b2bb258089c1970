"""The codec for page chunks: `ReadChunk` and `WriteChunk`, encoded and decoded without copying the payload twice.

Owns: a hand-written protobuf codec for the two messages that carry page bytes. The generated classes would copy each payload into a
message object and out again. This codec copies it once into the outgoing message and returns a view of the incoming one.
Invariant: the bytes are exactly those of protobuf, so a peer with generated stubs understands them (tests/wire compares both ways).
Malformed bytes from a peer raise `ProtocolError`.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

from attnstore.errors import ProtocolError
from attnstore.types import PageStatus

Buffer = bytes | bytearray | memoryview

_FIXED64 = struct.Struct("<Q")
_VARINT_BYTES_MAX = 10
_NOTHING = memoryview(b"")
_VARINT, _FIXED_64, _LENGTH, _FIXED_32 = 0, 1, 2, 5


class ReadChunk(NamedTuple):
    """One chunk of one page of a `Read` answer. See `ReadChunk` in store.proto for the fields."""

    page_index: int
    status: PageStatus
    size_bytes: int = 0
    offset_bytes: int = 0
    checksum: int = 0
    payload: memoryview = _NOTHING


class WriteChunk(NamedTuple):
    """One chunk of one page of a `Write` stream. `namespace` and `page_hash` are empty if the message has none."""

    namespace: bytes
    page_hash: bytes
    checksum: int
    offset_bytes: int
    payload: memoryview
    age_ms: int = 0


def encode_read_chunk(
    page_index: int, status: PageStatus, size_bytes: int = 0, offset_bytes: int = 0, checksum: int = 0, payload: Buffer = b""
) -> bytes:
    """Returns a serialized `ReadChunk`; copies `payload` once."""
    head = b"\x08%b\x10%b\x18%b\x20%b\x29%b\x32%b" % (
        _varint(page_index),
        _varint(status),
        _varint(size_bytes),
        _varint(offset_bytes),
        _FIXED64.pack(checksum),
        _varint(len(payload)),
    )
    return b"".join((head, payload))


def encode_write_chunk(
    namespace: bytes, page_hash: bytes, checksum: int, offset_bytes: int, payload: Buffer, age_ms: int = 0
) -> bytes:
    """Returns a serialized `WriteChunk`; copies `payload` once."""
    head = b"\x0a%b%b\x12%b%b\x19%b\x20%b\x30%b\x2a%b" % (
        _varint(len(namespace)),
        namespace,
        _varint(len(page_hash)),
        page_hash,
        _FIXED64.pack(checksum),
        _varint(offset_bytes),
        _varint(age_ms),
        _varint(len(payload)),
    )
    return b"".join((head, payload))


def decode_read_chunk(message: bytes) -> ReadChunk:
    """Returns the fields of a serialized `ReadChunk`; the payload is a view of `message`. Raises `ProtocolError`."""
    numbers, views = _fields(message)
    try:
        status = PageStatus(numbers.get(2, 0))
    except ValueError:
        raise ProtocolError(f"ReadChunk has the unknown status {numbers.get(2, 0)}") from None
    return ReadChunk(
        page_index=numbers.get(1, 0),
        status=status,
        size_bytes=numbers.get(3, 0),
        offset_bytes=numbers.get(4, 0),
        checksum=numbers.get(5, 0),
        payload=views.get(6, _NOTHING),
    )


def decode_write_chunk(message: bytes) -> WriteChunk:
    """Returns the fields of a serialized `WriteChunk`; the payload is a view of `message`. Raises `ProtocolError`."""
    numbers, views = _fields(message)
    return WriteChunk(
        namespace=bytes(views.get(1, _NOTHING)),
        page_hash=bytes(views.get(2, _NOTHING)),
        checksum=numbers.get(3, 0),
        offset_bytes=numbers.get(4, 0),
        payload=views.get(5, _NOTHING),
        age_ms=numbers.get(6, 0),
    )


def _fields(message: bytes) -> tuple[dict[int, int], dict[int, memoryview]]:
    """Splits a protobuf message into its numeric and its length-delimited fields; the last field of each number wins."""
    numbers: dict[int, int] = {}
    views: dict[int, memoryview] = {}
    view = memoryview(message)
    end = len(message)
    at = 0
    while at < end:
        tag, at = _read_varint(message, at)
        field, kind = tag >> 3, tag & 7
        if kind == _VARINT:
            numbers[field], at = _read_varint(message, at)
            continue
        if kind == _LENGTH:
            size, at = _read_varint(message, at)
        elif kind in (_FIXED_64, _FIXED_32):
            size = 8 if kind == _FIXED_64 else 4
        else:
            raise ProtocolError(f"page chunk has a field of the unknown wire type {kind}")
        if size > end - at:
            raise ProtocolError(f"page chunk is truncated: field {field} announces {size} bytes, {end - at} are left")
        if kind == _LENGTH:
            views[field] = view[at : at + size]
        else:
            numbers[field] = int.from_bytes(view[at : at + size], "little")
        at += size
    return numbers, views


def _varint(value: int) -> bytes:
    if value < 0x80:
        return value.to_bytes(1, "little")
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _read_varint(message: bytes, at: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 7 * _VARINT_BYTES_MAX, 7):
        if at >= len(message):
            raise ProtocolError("page chunk is truncated inside a number")
        byte = message[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value & 0xFFFF_FFFF_FFFF_FFFF, at
    raise ProtocolError(f"page chunk has a number longer than {_VARINT_BYTES_MAX} bytes")
