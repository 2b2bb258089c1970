"""The receiving side of the page channel: frames wherever the stream is cut, and payloads in the views given alone."""

from __future__ import annotations

import itertools
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from attnstore import errors
from attnstore.errors import ProtocolError
from attnstore.wire.frame_receiver import TRANSITIONS, FrameReceiver, Role, State
from attnstore.wire.page_channel import (
    HEADER_BYTES,
    Frame,
    Kind,
    encode_frame,
)
from tests.wire.frames import feed, feed_all, frames, receiver_in, reproducible, valid

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
