"""Frames of the page channel, and a receiver fed as a socket would feed it."""

from __future__ import annotations

from collections.abc import Iterable

from hypothesis import settings
from hypothesis import strategies as st

from attnstore.limits import (
    ATTEND_BYTES_MAX,
    ATTEND_FRAME_BYTES_MAX,
    CHANNEL_GATHER_PAGES,
    CHANNEL_MATCH_HASHES_MAX,
    CHANNEL_READ_HASHES_MAX,
    CHANNEL_REASON_BYTES_MAX,
    CHANNEL_TOKEN_BYTES,
    HASH_BYTES,
    PAGE_BYTES_MAX,
)
from attnstore.types import PageStatus
from attnstore.wire.frame_receiver import FrameReceiver, Role, State
from attnstore.wire.page_channel import (
    Frame,
    Kind,
    Order,
)

reproducible = settings(derandomize=True, deadline=None, max_examples=200)
PAYLOAD_BYTES_MAX = {
    Kind.HELLO: CHANNEL_TOKEN_BYTES,
    Kind.READ: CHANNEL_READ_HASHES_MAX * HASH_BYTES,
    Kind.WRITE: PAGE_BYTES_MAX,
    Kind.MATCH: CHANNEL_MATCH_HASHES_MAX * (HASH_BYTES + 4),
    Kind.MATCHED: CHANNEL_MATCH_HASHES_MAX * 4,
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


def receiver_in(role: Role, state: State) -> FrameReceiver:
    receiver = FrameReceiver(role)
    receiver.state = state
    return receiver
