"""The page channel's protocol: one format, one table of allowed frames, and no write outside the given windows."""

from __future__ import annotations

import itertools
import random
import re
import struct
import subprocess
import sys
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from attnstore import errors
from attnstore.errors import ProtocolError
from attnstore.limits import (
    ATTEND_BYTES_MAX,
    ATTEND_FRAME_BYTES_MAX,
    CHANNEL_GATHER_PAGES,
    CHANNEL_READ_HASHES_MAX,
    CHANNEL_REASON_BYTES_MAX,
    CHANNEL_TOKEN_BYTES,
    HASH_BYTES,
    PAGE_BYTES_MAX,
)
from attnstore.types import PageStatus
from attnstore.wire import frame_receiver, page_channel
from attnstore.wire.frame_receiver import TRANSITIONS, FrameReceiver, Role, State
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
from tests.wire.fuzz_page_channel import play

reproducible = settings(derandomize=True, deadline=None, max_examples=200)

PAYLOAD_BYTES_MAX = {
    Kind.HELLO: CHANNEL_TOKEN_BYTES,
    Kind.READ: CHANNEL_READ_HASHES_MAX * HASH_BYTES,
    Kind.WRITE: PAGE_BYTES_MAX,
    Kind.MATCH: CHANNEL_READ_HASHES_MAX * (HASH_BYTES + 4),
    Kind.MATCHED: CHANNEL_READ_HASHES_MAX * 4,
    Kind.WELCOME: 0,
    Kind.SLICE: PAGE_BYTES_MAX + 8 * CHANNEL_GATHER_PAGES,
    Kind.VERDICT: 0,
    Kind.REFUSED: CHANNEL_REASON_BYTES_MAX,
    Kind.ATTEND_OPEN: ATTEND_FRAME_BYTES_MAX,
    Kind.ATTEND: ATTEND_FRAME_BYTES_MAX,
    Kind.ATTEND_CLOSE: 0,
    Kind.OPENED: 0,
    Kind.PARTIAL: 2 * ATTEND_BYTES_MAX,
}
READ_STATUSES = {PageStatus.OK, PageStatus.MISSING, PageStatus.LEASE_EXPIRED}
STATUSES = {
    Kind.SLICE: READ_STATUSES,
    Kind.VERDICT: {status for status in PageStatus if status < 100} - READ_STATUSES - {PageStatus.PINNED},
}
U32 = st.integers(0, 2**32 - 1)
U64 = st.integers(0, 2**64 - 1)


@st.composite
def frames(draw: st.DrawFn, size_max: int = PAGE_BYTES_MAX) -> Frame:
    """Any frame that a correct peer could send."""
    kind = draw(st.sampled_from(Kind))
    statuses = STATUSES.get(kind)
    status = draw(st.sampled_from(sorted(statuses))) if statuses else None
    size = draw(st.integers(0, min(size_max, PAYLOAD_BYTES_MAX[kind])))
    if kind is Kind.SLICE:
        size = max(1, size) if status is PageStatus.OK else 0
    return Frame(
        kind,
        request=draw(U32),
        page=draw(U32),
        size_bytes=size,
        offset_bytes=draw(U64),
        checksum=draw(U64),
        status=status,
        order=draw(st.sampled_from(Order)),
        layer_begin=draw(U32),
        layer_end=draw(U32),
        lease=draw(st.binary(min_size=16, max_size=16)),
        namespace=draw(st.binary(min_size=32, max_size=32)),
        hash=draw(st.binary(min_size=32, max_size=32)),
    )


def valid(kind: Kind, size_bytes: int | None = None) -> Frame:
    """The simplest frame of a kind."""
    status = {Kind.SLICE: PageStatus.OK, Kind.VERDICT: PageStatus.STORED}.get(kind)
    size = min(1, PAYLOAD_BYTES_MAX[kind]) if size_bytes is None else size_bytes
    return Frame(kind, size_bytes=size, status=status)


def receiver_in(role: Role, state: State) -> FrameReceiver:
    receiver = FrameReceiver(role)
    receiver.state = state
    return receiver


def feed(receiver: FrameReceiver, data: bytes) -> list[Frame]:
    """Writes bytes to the receiver's windows as a socket would; a payload is discarded unless the caller lands it."""
    arrived: list[Frame] = []
    view = memoryview(data)
    while view:
        count = 0
        for window in receiver.windows():
            part = view[count : count + len(window)]
            window[: len(part)] = part
            count += len(part)
        view = view[count:]
        frame = receiver.received(count)
        if frame is not None:
            arrived.append(frame)
            if not receiver.at_boundary:
                receiver.discard(memoryview(bytearray(7)))
    return arrived


def feed_all(receiver: FrameReceiver, pieces: Iterable[bytes]) -> list[Frame]:
    return [frame for piece in pieces for frame in feed(receiver, piece)]


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


CONVERSATION = b"".join(
    [
        encode_frame(valid(Kind.HELLO, 32)) + bytes(range(32)),
        encode_frame(valid(Kind.READ, 64)) + bytes(range(64)),
        encode_frame(valid(Kind.READ, 0)),
        encode_frame(valid(Kind.WRITE, 100)) + bytes(range(100)),
    ]
)
ARRIVALS = [Kind.HELLO, Kind.HELLO, Kind.READ, Kind.READ, Kind.READ, Kind.WRITE, Kind.WRITE]
"""A frame with a payload arrives twice: announced and complete."""


def test_a_stream_may_be_cut_at_every_byte() -> None:
    for cut in range(len(CONVERSATION) + 1):
        receiver = FrameReceiver(Role.NODE)
        arrived = feed_all(receiver, (CONVERSATION[:cut], CONVERSATION[cut:]))
        assert [frame.kind for frame in arrived] == ARRIVALS, cut
        assert receiver.at_boundary, cut


def test_a_stream_may_come_byte_by_byte() -> None:
    receiver = FrameReceiver(Role.NODE)
    assert [frame.kind for frame in feed_all(receiver, (bytes([byte]) for byte in CONVERSATION))] == ARRIVALS


def test_only_between_frames_is_a_boundary() -> None:
    receiver = FrameReceiver(Role.NODE)
    boundaries = [0]
    for index, byte in enumerate(CONVERSATION, 1):
        feed(receiver, bytes([byte]))
        if receiver.at_boundary:
            boundaries.append(index)
    frames_end = list(itertools.accumulate([HEADER_BYTES + 32, HEADER_BYTES + 64, HEADER_BYTES, HEADER_BYTES + 100], initial=0))
    assert boundaries == frames_end


@reproducible
@given(st.lists(st.integers(1, 300), min_size=1, max_size=20), st.lists(st.integers(1, 97), min_size=1, max_size=50))
def test_a_payload_lands_in_order_in_the_views_given_and_nowhere_else(views: list[int], steps: list[int]) -> None:
    payload = random.Random(sum(views)).randbytes(sum(views))
    receiver = receiver_in(Role.CLIENT, State.OPEN)
    (announced,) = feed(receiver, encode_frame(valid(Kind.SLICE, len(payload))))
    assert announced.size_bytes == len(payload)
    guarded = [bytearray(b"\xaa" * (size + 2)) for size in views]
    receiver.land(*(memoryview(buffer)[1:-1] for buffer in guarded))
    sent = 0
    for step in itertools.cycle(steps):
        count = 0
        for window in receiver.windows():
            part = payload[sent + count : sent + min(step, count + len(window))]
            window[: len(part)] = part
            count += len(part)
        sent += count
        if receiver.received(count) is not None:
            break
    assert b"".join(buffer[1:-1] for buffer in guarded) == payload
    assert all(buffer[0] == buffer[-1] == 0xAA for buffer in guarded)
    assert receiver.at_boundary


def test_a_header_that_came_with_the_payload_before_it_is_announced_next() -> None:
    payload = bytes(range(100))
    stream = encode_frame(valid(Kind.SLICE, 100)) + payload + encode_frame(valid(Kind.SLICE, 50))
    for short in range(HEADER_BYTES + 1):
        receiver = receiver_in(Role.CLIENT, State.OPEN)
        feed(receiver, stream[:HEADER_BYTES])
        landed = bytearray(100)
        receiver.land(memoryview(landed), ahead=True)
        payload_window, header_window = receiver.windows()
        payload_window[:] = payload
        header_window[: HEADER_BYTES - short] = stream[HEADER_BYTES + 100 :][: HEADER_BYTES - short]
        whole = receiver.received(100 + HEADER_BYTES - short)
        assert whole is not None
        assert (whole.size_bytes, landed) == (100, payload)
        following = receiver.announced()
        if short:
            assert following is None
            assert receiver.at_boundary is (short == HEADER_BYTES)
            (following,) = feed(receiver, stream[-short:])
        assert following.size_bytes == 50
        assert receiver.announced() is None
        receiver.land(memoryview(bytearray(50)))  # exactly the rest of the payload


def test_a_malformed_header_behind_a_payload_does_not_spoil_the_payload() -> None:
    receiver = receiver_in(Role.CLIENT, State.OPEN)
    feed(receiver, encode_frame(valid(Kind.SLICE, 10)))
    receiver.land(memoryview(bytearray(10)), ahead=True)
    for window in receiver.windows():
        window[:] = b"x" * len(window)
    assert receiver.received(10 + HEADER_BYTES) is not None
    with pytest.raises(errors.ProtocolError):
        receiver.announced()
    assert receiver.state is State.CLOSED


def test_a_window_of_another_size_than_the_payload_is_our_own_mistake() -> None:
    for size in (0, 9, 11):
        receiver = receiver_in(Role.CLIENT, State.OPEN)
        receiver.windows()[0][:] = encode_frame(valid(Kind.SLICE, 10))
        receiver.received(HEADER_BYTES)
        with pytest.raises(AssertionError):
            receiver.land(memoryview(bytearray(size)))
        with pytest.raises(AssertionError):
            receiver.windows()


class HostilePeer(RuleBasedStateMachine):
    """A peer that sends whole frames, foreign ones, garbage, and everything in pieces, against a simple model."""

    @initialize(role=st.sampled_from(Role))
    def open(self, role: Role) -> None:
        self.role = role
        self.receiver = FrameReceiver(role)
        self.state = State.NEW
        self.broken = False

    @precondition(lambda self: not self.broken)
    @rule(frame=frames(size_max=300), cuts=st.lists(st.integers(1, 500), max_size=4))
    def sends_a_frame(self, frame: Frame, cuts: list[int]) -> None:
        data = encode_frame(frame) + bytes(frame.size_bytes)
        following = TRANSITIONS.get((self.role, self.state, frame.kind))
        edges = sorted({0, len(data), *(cut for cut in cuts if cut < len(data))})
        pieces = [data[begin:end] for begin, end in itertools.pairwise(edges)]
        if following is None:
            with pytest.raises(ProtocolError):
                feed_all(self.receiver, pieces)
            self.broken = True
            following = State.CLOSED
        else:
            assert feed_all(self.receiver, pieces) == [frame] * (2 if frame.size_bytes else 1)
        self.state = following

    @precondition(lambda self: not self.broken)
    @rule(header=st.binary(min_size=HEADER_BYTES, max_size=HEADER_BYTES))
    def sends_garbage(self, header: bytes) -> None:
        with pytest.raises(ProtocolError):
            feed(self.receiver, b"XXXX" + header[4:])
        self.broken = True
        self.state = State.CLOSED

    @precondition(lambda self: self.broken)
    @rule()
    def connects_again(self) -> None:
        self.open(self.role)

    @invariant()
    def the_state_is_the_models(self) -> None:
        assert self.receiver.state is self.state
        if not self.broken:
            assert self.receiver.at_boundary


TestHostilePeer = HostilePeer.TestCase
TestHostilePeer.settings = settings(derandomize=True, deadline=None, max_examples=60, stateful_step_count=12)


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
