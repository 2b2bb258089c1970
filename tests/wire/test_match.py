"""Prefixes and hits as they are sent in a MATCH and its answer."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from attnstore.errors import InvalidArgument, ProtocolError
from attnstore.wire.match import decode_hits, decode_prefixes, encode_hits, encode_prefixes

HASHES = st.binary(min_size=32, max_size=32)


@given(st.lists(st.lists(HASHES, max_size=5), max_size=5))
def test_prefixes_come_back_as_they_were(prefixes: list[list[bytes]]) -> None:
    assert decode_prefixes(len(prefixes), encode_prefixes(prefixes)) == prefixes


@given(st.lists(st.integers(0, 2**32 - 1)))
def test_hits_come_back_as_they_were(hits: list[int]) -> None:
    assert decode_hits(encode_hits(hits)) == tuple(hits)


@given(st.integers(0, 2**32 - 1), st.binary(max_size=200))
def test_any_bytes_are_prefixes_that_fill_them_or_a_typed_error(count: int, payload: bytes) -> None:
    try:
        prefixes = decode_prefixes(count, payload)
    except InvalidArgument:
        return
    assert encode_prefixes(prefixes) == payload


@pytest.mark.parametrize(
    ("count", "payload"),
    [
        (1, b""),
        (1, bytes(3)),
        (2, encode_prefixes([[bytes(32)]])),
        (0, encode_prefixes([[bytes(32)]])),
        (1, encode_prefixes([[bytes(32)]])[:-1]),
        (1, (2).to_bytes(4, "little") + bytes(32)),
    ],
    ids=["no counts", "half a count", "fewer prefixes", "more prefixes", "half a hash", "fewer hashes"],
)
def test_prefixes_that_do_not_fill_the_payload_are_refused(count: int, payload: bytes) -> None:
    with pytest.raises(InvalidArgument):
        decode_prefixes(count, payload)


def test_hits_that_are_no_numbers_break_the_protocol() -> None:
    with pytest.raises(ProtocolError):
        decode_hits(bytes(5))
