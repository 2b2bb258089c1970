"""The page channel's protocol: one format, one table of allowed frames, and no write outside the given windows."""

from __future__ import annotations

import itertools
import re
import struct
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from attnstore import errors
from attnstore.errors import ProtocolError
from attnstore.limits import (
    CHANNEL_REASON_BYTES_MAX,
)
from attnstore.types import PageStatus
from attnstore.wire import frame_receiver, page_channel
from attnstore.wire.frame_receiver import TRANSITIONS, Role, State
from attnstore.wire.page_channel import (
    HEADER_BYTES,
    Frame,
    Kind,
    Order,
    decode_frame,
    decode_refusal,
    encode_frame,
    encode_refusal,
    encode_slice,
)
from tests.wire.frames import PAYLOAD_BYTES_MAX, STATUSES, feed, frames, receiver_in, reproducible, valid
from tests.wire.fuzz_page_channel import play


@reproducible
@given(frames())
def test_what_is_encoded_is_decoded(frame: Frame) -> None:
    encoded = encode_frame(frame)
    assert len(encoded) == HEADER_BYTES
    assert decode_frame(encoded) == frame


def test_the_fast_header_of_a_slice_is_the_ordinary_one() -> None:
    ordinary = Frame(Kind.SLICE, 7, 9, 4096, 512, 2**63 + 1, PageStatus.OK)
    assert encode_slice(7, 9, 4096, 512, 2**63 + 1) == encode_frame(ordinary)


@reproducible
@given(st.binary(min_size=HEADER_BYTES, max_size=HEADER_BYTES), st.booleans())
def test_any_header_is_a_frame_that_encodes_to_it_or_a_protocol_error(header: bytes, well_begun: bool) -> None:
    if well_begun:
        header = page_channel.MAGIC + header[4:]
    try:
        frame = decode_frame(header)
    except ProtocolError:
        return
    assert decode_frame(encode_frame(frame)) == frame
    assert frame.size_bytes <= PAYLOAD_BYTES_MAX[frame.kind]


@pytest.mark.parametrize("kind", Kind)
def test_a_payload_may_have_the_kinds_maximum_and_not_a_byte_more(kind: Kind) -> None:
    maximum = PAYLOAD_BYTES_MAX[kind]
    frame = valid(kind, maximum)
    assert decode_frame(encode_frame(frame)) == frame
    for size in (maximum + 1, 2**63, 2**64 - 1):
        with pytest.raises(ProtocolError):
            decode_frame(encode_frame(valid(kind, size)))


@pytest.mark.parametrize(("kind", "status"), list(itertools.product(Kind, [None, *PageStatus])))
def test_a_frame_has_a_status_of_its_kind_or_none(kind: Kind, status: PageStatus | None) -> None:
    size = 1 if status is PageStatus.OK else 0
    frame = Frame(kind, size_bytes=min(size, PAYLOAD_BYTES_MAX[kind]), status=status)
    if status in STATUSES.get(kind, {None}):
        assert decode_frame(encode_frame(frame)) == frame
    else:
        with pytest.raises(ProtocolError):
            decode_frame(encode_frame(frame))


def test_a_slice_has_bytes_exactly_when_its_page_was_found() -> None:
    for status, size in ((PageStatus.OK, 0), (PageStatus.MISSING, 1), (PageStatus.LEASE_EXPIRED, 1)):
        with pytest.raises(ProtocolError, match="SLICE"):
            decode_frame(encode_frame(Frame(Kind.SLICE, size_bytes=size, status=status)))


@pytest.mark.parametrize(("offset", "value"), [(0, 0), (4, 0), (4, 255), (5, 77), (6, 2)])
def test_a_header_byte_that_no_peer_sends_is_refused(offset: int, value: int) -> None:
    header = bytearray(encode_frame(valid(Kind.SLICE)))
    header[offset] = value
    with pytest.raises(ProtocolError):
        decode_frame(header)


@pytest.mark.parametrize(("role", "state", "kind"), list(itertools.product(Role, State, Kind)))
def test_a_frame_is_taken_exactly_where_the_table_has_it(role: Role, state: State, kind: Kind) -> None:
    receiver = receiver_in(role, state)
    encoded = encode_frame(valid(kind, 0 if kind is not Kind.SLICE else 1))
    following = TRANSITIONS.get((role, state, kind))
    if following is None:
        with pytest.raises(ProtocolError):
            feed(receiver, encoded)
        assert receiver.state is State.CLOSED
    else:
        assert [frame.kind for frame in feed(receiver, encoded)] == [kind]
        assert receiver.state is following


def test_nothing_is_taken_once_the_channel_is_closed() -> None:
    assert not [key for key in TRANSITIONS if key[1] is State.CLOSED]


def test_the_documented_table_is_the_one_in_force() -> None:
    rows = re.findall(r"^\| (node|client) +\| (\w+) +\| ([A-Z_]+) +\| (\w+) +\|$", frame_receiver.__doc__ or "", re.MULTILINE)
    documented = {(Role(side), State(state), Kind[kind]): State(following) for side, state, kind, following in rows}
    assert documented == TRANSITIONS
    assert len(rows) == len(TRANSITIONS)


def test_the_documented_senders_are_those_that_the_table_receives_from() -> None:
    rows = re.findall(r"^\| ([A-Z_]+) +\| (client|node) +\|", page_channel.__doc__ or "", re.MULTILINE)
    sender = {Role.NODE: "client", Role.CLIENT: "node"}
    assert dict(rows) == {kind.name: sender[role] for role, _, kind in TRANSITIONS}
    assert {kind for kind in Kind if kind < 16} == {Kind[name] for name, side in rows if side == "client"}


@pytest.mark.parametrize(
    "error",
    [
        errors.NamespaceUnknown("register it"),
        errors.PermissionDenied("another tenant's"),
        errors.InvalidArgument("zwölf\nlines"),
        errors.Overloaded(""),
    ],
)
def test_a_refusal_carries_the_class_and_the_words_of_its_error(error: errors.AttnStoreError) -> None:
    encoded = encode_refusal(9, error)
    frame = decode_frame(encoded[:HEADER_BYTES])
    assert (frame.kind, frame.request, frame.size_bytes) == (Kind.REFUSED, 9, len(encoded) - HEADER_BYTES)
    back = decode_refusal(encoded[HEADER_BYTES:])
    assert type(back) is type(error)
    assert str(back) == (str(error) or error.code)


def test_a_refusal_too_long_for_its_frame_is_cut_even_inside_a_character() -> None:
    encoded = encode_refusal(1, errors.InvalidArgument("ü" * CHANNEL_REASON_BYTES_MAX))
    assert len(encoded) == HEADER_BYTES + CHANNEL_REASON_BYTES_MAX
    assert isinstance(decode_refusal(encoded[HEADER_BYTES:]), errors.InvalidArgument)


@reproducible
@given(st.binary(max_size=80))
def test_any_bytes_are_a_typed_refusal(reason: bytes) -> None:
    assert isinstance(decode_refusal(reason), errors.AttnStoreError)


def test_a_refusal_of_an_unknown_kind_may_be_retried() -> None:
    assert isinstance(decode_refusal(b"from_the_future\nwait"), errors.Unavailable)


def test_the_header_is_laid_out_as_documented() -> None:
    frame = Frame(
        Kind.WRITE, 0x01020304, 5, 6, 7, 8, None, Order.LAYERS, 9, 10, lease=b"L" * 16, namespace=b"N" * 32, hash=b"H" * 32
    )
    parts = (
        b"ATPC",
        bytes([3, 0, 1, 0]),
        struct.pack("<IIQQQII", 0x01020304, 5, 6, 7, 8, 9, 10),
        b"L" * 16 + b"N" * 32 + b"H" * 32,
    )
    assert encode_frame(frame) == b"".join(parts)


@reproducible
@given(st.binary(max_size=600))
def test_the_outcome_does_not_depend_on_where_the_stream_is_cut(data: bytes) -> None:
    play(data)


@pytest.mark.skipif(find_spec("atheris") is None, reason="needs atheris: pip install -e '.[dev]'")
def test_a_bounded_run_of_the_coverage_guided_fuzzer_finds_nothing(tmp_path: Path) -> None:
    # Peak memory is not checked: a process inherits its parent's peak, and that of a test run exceeds any useful limit.
    bounds = ("-atheris_runs=20000", "-seed=7", "-max_len=1024", "-rss_limit_mb=0", f"-artifact_prefix={tmp_path}/")
    run = subprocess.run(
        [sys.executable, "-m", "tests.wire.fuzz_page_channel", *bounds],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert run.returncode == 0, run.stderr[-4000:]
