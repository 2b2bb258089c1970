"""The receiving side of a page channel, without I/O: which frame may arrive in which state, and where its bytes go.

Owns: the state table and `FrameReceiver`. The caller owns the socket: received bytes go to `FrameReceiver.windows`.
Invariant: a payload is never held here. The header of its frame is announced first, the caller says where the payload goes
(`land`), and the socket writes there directly. Whatever a peer sends, nothing is written anywhere else.

The frames that each side may receive, and the state that follows; any other frame ends the connection:

| side   | state | receives     | becomes |
|--------|-------|--------------|---------|
| node   | new   | HELLO        | open    |
| node   | open  | READ         | open    |
| node   | open  | WRITE        | open    |
| node   | open  | MATCH        | open    |
| node   | open  | ATTEND_OPEN  | open    |
| node   | open  | ATTEND       | open    |
| node   | open  | ATTEND_CLOSE | open    |
| client | new   | WELCOME      | open    |
| client | new   | REFUSED      | closed  |
| client | open  | SLICE        | open    |
| client | open  | VERDICT      | open    |
| client | open  | MATCHED      | open    |
| client | open  | OPENED       | open    |
| client | open  | PARTIAL      | open    |
| client | open  | REFUSED      | open    |
"""

from __future__ import annotations

import enum
from typing import Final

from attnstore.errors import ProtocolError
from attnstore.wire.page_channel import HEADER_BYTES, Frame, Kind, decode_frame


class Role(enum.StrEnum):
    """The side of the connection that a receiver is on."""

    NODE = "node"
    CLIENT = "client"


class State(enum.StrEnum):
    """The state of a connection, as seen by one receiving side."""

    NEW = "new"
    OPEN = "open"
    CLOSED = "closed"


TRANSITIONS: Final[dict[tuple[Role, State, Kind], State]] = {
    (Role.NODE, State.NEW, Kind.HELLO): State.OPEN,
    (Role.NODE, State.OPEN, Kind.READ): State.OPEN,
    (Role.NODE, State.OPEN, Kind.WRITE): State.OPEN,
    (Role.NODE, State.OPEN, Kind.MATCH): State.OPEN,
    (Role.NODE, State.OPEN, Kind.ATTEND_OPEN): State.OPEN,
    (Role.NODE, State.OPEN, Kind.ATTEND): State.OPEN,
    (Role.NODE, State.OPEN, Kind.ATTEND_CLOSE): State.OPEN,
    (Role.CLIENT, State.NEW, Kind.WELCOME): State.OPEN,
    (Role.CLIENT, State.NEW, Kind.REFUSED): State.CLOSED,
    (Role.CLIENT, State.OPEN, Kind.SLICE): State.OPEN,
    (Role.CLIENT, State.OPEN, Kind.VERDICT): State.OPEN,
    (Role.CLIENT, State.OPEN, Kind.MATCHED): State.OPEN,
    (Role.CLIENT, State.OPEN, Kind.OPENED): State.OPEN,
    (Role.CLIENT, State.OPEN, Kind.PARTIAL): State.OPEN,
    (Role.CLIENT, State.OPEN, Kind.REFUSED): State.OPEN,
}
"""(role, state, kind received) -> state. A frame that is not in the table raises `ProtocolError`."""


class FrameReceiver:
    """The receiving direction of a connection: says where the next bytes go and which frame has arrived.

    The cycle: write bytes to `windows()`, in order, and report them to `received(count)`, until that returns a frame. If the frame
    announces a payload, call `land(*views)` or `discard(scratch)` before continuing; `received` returns the same frame again when
    its payload is complete.
    """

    def __init__(self, role: Role) -> None:
        self._role = role
        self._header = bytearray(HEADER_BYTES)
        self._windows = [memoryview(self._header)]
        self._scratch = memoryview(b"")
        self._frame: Frame | None = None
        self._left_bytes = 0
        self._ahead = False
        self.state = State.NEW

    @property
    def at_boundary(self) -> bool:
        """True between two frames: the peer may close the connection here."""
        return self._frame is None and bool(self._windows) and len(self._windows[0]) == HEADER_BYTES

    def windows(self) -> list[memoryview]:
        """Returns where the next bytes must be written: non-empty views, to be filled one after the other."""
        assert self._windows, "land() or discard() comes before the payload"
        return self._windows

    def land(self, *views: memoryview, ahead: bool = False) -> None:
        """Directs the announced payload into `views`, whose total size is exactly that of the payload.

        With `ahead`, another frame is sure to follow, and the windows continue with its header. After the payload has arrived, call
        `announced` for that frame before continuing.
        """
        assert sum(map(len, views)) == self._left_bytes > 0
        self._windows = list(views)
        self._ahead = ahead
        if ahead:
            self._windows.append(memoryview(self._header))

    def announced(self) -> Frame | None:
        """Returns the frame whose header arrived together with the payload before it, or None. Raises as `received` does."""
        return self._announced() if self._frame is None and not self._windows else None

    def discard(self, scratch: memoryview) -> None:
        """Discards the announced payload, reading it through `scratch`, which may have any size."""
        assert len(scratch) > 0 < self._left_bytes
        self._scratch = scratch
        self._windows = [scratch[: self._left_bytes]]

    def received(self, count: int) -> Frame | None:
        """Records that `count` bytes were written to the windows. Returns the frame whose header or payload is complete now, or
        None.

        Raises `ProtocolError` for a malformed frame or one that the state does not allow; the state is CLOSED then.
        """
        assert count > 0
        self._consume(count)
        if self._frame is None:
            return None if self._windows else self._announced()
        self._left_bytes -= min(count, self._left_bytes)
        if self._left_bytes > 0:
            if not self._windows:
                self._windows = [self._scratch[: self._left_bytes]]
            return None
        frame, self._frame = self._frame, None
        if not self._ahead:
            self._windows = [memoryview(self._header)]
        self._ahead = False
        return frame

    def _consume(self, count: int) -> None:
        windows = self._windows
        filled = 0
        while filled < len(windows) and count >= len(windows[filled]):
            count -= len(windows[filled])
            filled += 1
        del windows[:filled]
        if count:
            windows[0] = windows[0][count:]

    def _announced(self) -> Frame:
        state, self.state = self.state, State.CLOSED
        frame = decode_frame(self._header)
        following = TRANSITIONS.get((self._role, state, frame.kind))
        if following is None:
            raise ProtocolError(f"a {self._role.value} whose channel is {state.value} expects no {frame.kind.name} frame")
        self.state = following
        if frame.size_bytes > 0:
            self._frame = frame
            self._left_bytes = frame.size_bytes
        else:
            self._windows = [memoryview(self._header)]
        return frame
