"""Coverage-guided fuzzing of the page channel's receiving side.

    python -m tests.wire.fuzz_page_channel -max_total_time=60

Owns: `play`, which interprets any bytes as a role, a way to split the stream, and the stream. It must end in frames or a
`ProtocolError`, must never write outside the given windows, and must not depend on where the stream was split.
"""

from __future__ import annotations

import sys

from attnstore.errors import ProtocolError
from attnstore.wire.frame_receiver import FrameReceiver, Role, State
from attnstore.wire.page_channel import Frame, Kind, decode_frame, encode_frame

_GUARD = 0xA5
_PAYLOAD_BYTES_MAX = 4096
"""Larger payloads are announced and not sent, because fuzzing headers is more useful."""

_WITHOUT_PAYLOAD = {Kind.WELCOME, Kind.VERDICT, Kind.OPENED, Kind.ATTEND_CLOSE}
_WITH_PAYLOAD = set(Kind) - _WITHOUT_PAYLOAD

Outcome = tuple[list[Frame], bytes, State, bool]


def play(data: bytes) -> None:
    """Plays one input: the outcome is the same however the stream is split, and every accepted frame encodes to itself."""
    role = Role.NODE if data[:1] < b"\x80" else Role.CLIENT
    step, stream = 1 + int.from_bytes(data[1:2], "little"), _mend(data[2:])
    whole = receive(role, stream, len(stream) + 1, ahead=False)
    for size, ahead in ((step, False), (len(stream) + 1, True), (step, True)):
        cut = receive(role, stream, size, ahead=ahead)
        assert whole == cut, (whole, cut, size, ahead)
    for frame in whole[0]:
        assert decode_frame(encode_frame(frame)) == frame


def receive(role: Role, stream: bytes, step: int, *, ahead: bool) -> Outcome:
    """Returns accepted frames, payload bytes landed, last state, and whether the peer broke the protocol. Receives at most `step`
    bytes at a time, over as many windows as they fill. `ahead`: the header after a payload is received with it.
    """
    receiver = FrameReceiver(role)
    frames: list[Frame] = []
    landed = bytearray()
    guarded = bytearray()
    announced: Frame | None = None
    at = 0
    try:
        while True:
            frame = receiver.announced()
            if frame is None:
                if at >= len(stream):
                    break
                count = _fill(receiver.windows(), stream[at : at + step])
                at += count
                frame = receiver.received(count)
            if frame is None:
                continue
            if frame is announced or frame.size_bytes == 0:
                announced = None
                landed += guarded[1:-1]
                assert not guarded or guarded[0] == guarded[-1] == _GUARD
                guarded = bytearray()
                frames.append(frame)
            elif frame.size_bytes > _PAYLOAD_BYTES_MAX:
                break
            else:
                announced = frame
                guarded = bytearray([_GUARD]) * (frame.size_bytes + 2)
                receiver.land(memoryview(guarded)[1:-1], ahead=ahead)
    except ProtocolError:
        assert receiver.state is State.CLOSED
        return frames, bytes(landed), State.CLOSED, True
    return frames, bytes(landed), receiver.state, False


def _fill(windows: list[memoryview], data: bytes) -> int:
    """Writes data into the windows, one after the other. Returns the number of bytes."""
    count = 0
    for window in windows:
        part = data[count : count + len(window)]
        window[: len(part)] = part
        count += len(part)
    return count


def _mend(stream: bytes) -> bytes:
    """Gives most headers the magic number and a small size, which mutations would rarely find."""
    mended = bytearray(stream)
    at = 0
    while at + 128 <= len(mended):
        mended[at : at + 4] = b"ATPC"
        size = mended[at + 16] if mended[at + 4] in _WITH_PAYLOAD else 0
        if mended[at + 17] < 0xF0:
            mended[at + 16 : at + 24] = size.to_bytes(8, "little")
        at += 128 + size
    return bytes(mended)


def main() -> None:
    """Passes `play` to atheris."""
    import atheris

    atheris.instrument_func(FrameReceiver.received)
    atheris.instrument_func(FrameReceiver._announced)
    atheris.instrument_func(decode_frame)
    atheris.Setup(sys.argv, play)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
