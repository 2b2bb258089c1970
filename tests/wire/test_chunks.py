"""The hand-written chunk codec speaks exactly protobuf, and survives anything a peer sends."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from attnstore.errors import ProtocolError
from attnstore.types import PageStatus
from attnstore.wire import chunks
from attnstore.wire.v1 import store_pb2

U32 = st.integers(0, 2**32 - 1)
U64 = st.integers(0, 2**64 - 1)
STATUS = st.sampled_from([status for status in PageStatus if status < 100])
PAYLOAD = st.binary(max_size=300)


@given(U32, STATUS, U64, U64, U64, PAYLOAD)
def test_read_chunks_agree_with_protobuf_in_both_directions(
    page_index: int, status: PageStatus, size: int, offset: int, checksum: int, payload: bytes
) -> None:
    encoded = chunks.encode_read_chunk(page_index, status, size, offset, checksum, payload)
    theirs = store_pb2.ReadChunk.FromString(encoded)
    expected = store_pb2.ReadChunk(
        page_index=page_index, status=status, size_bytes=size, offset_bytes=offset, checksum=checksum, payload=payload
    )
    assert theirs == expected
    ours = chunks.decode_read_chunk(expected.SerializeToString())
    assert ours == chunks.ReadChunk(page_index, status, size, offset, checksum, memoryview(payload))


@given(st.binary(max_size=40), st.binary(max_size=40), U64, U64, PAYLOAD)
def test_write_chunks_agree_with_protobuf_in_both_directions(
    namespace: bytes, page_hash: bytes, checksum: int, offset: int, payload: bytes
) -> None:
    encoded = chunks.encode_write_chunk(namespace, page_hash, checksum, offset, payload)
    expected = store_pb2.WriteChunk(namespace=namespace, hash=page_hash, checksum=checksum, offset_bytes=offset, payload=payload)
    assert store_pb2.WriteChunk.FromString(encoded) == expected
    ours = chunks.decode_write_chunk(expected.SerializeToString())
    assert ours == chunks.WriteChunk(namespace, page_hash, checksum, offset, memoryview(payload))


@given(st.binary(max_size=200))
def test_arbitrary_bytes_decode_or_raise_a_protocol_error(message: bytes) -> None:
    for decode in (chunks.decode_read_chunk, chunks.decode_write_chunk):
        try:
            decode(message)
        except ProtocolError:
            continue


@given(st.integers(0, 10_000), st.binary(min_size=1, max_size=64))
def test_every_truncation_of_a_chunk_is_noticed_or_is_a_shorter_message(cut: int, payload: bytes) -> None:
    encoded = chunks.encode_read_chunk(3, PageStatus.OK, len(payload), 0, 7, payload)
    cut %= len(encoded)
    try:
        chunk = chunks.decode_read_chunk(encoded[:cut])
    except ProtocolError:
        return
    assert len(chunk.payload) == 0, "a payload must never be cut silently"


def test_unknown_fields_of_a_newer_peer_are_ignored() -> None:
    newer = b"\xf8\x01\x05" + b"\xfa\x01\x03abc" + b"\xf9\x01" + bytes(8) + b"\xfd\x01" + bytes(4)
    encoded = newer + chunks.encode_read_chunk(1, PageStatus.OK, 3, 0, 9, b"xyz") + newer
    chunk = chunks.decode_read_chunk(encoded)
    assert (chunk.page_index, bytes(chunk.payload)) == (1, b"xyz")


@pytest.mark.parametrize(
    "message",
    [b"\x08", b"\x32\x05abc", b"\x0b", b"\x08" + b"\xff" * 11, b"\x29\x00", b"\x10\x63"],
    ids=["no number", "short payload", "group", "endless number", "short fixed64", "unknown status"],
)
def test_malformed_chunks_raise_a_protocol_error(message: bytes) -> None:
    with pytest.raises(ProtocolError):
        chunks.decode_read_chunk(message)
