"""The page channel over a blocking socket: whole frames in, whole frames out, each wait bounded.

Owns: the system calls. One `recv` for a header, one for a payload straight into its destination, one `sendmsg` for a header and a
payload straight from where it lies; all of them release the interpreter lock while the kernel copies.
Invariant: no system call waits longer than `bound` allows when it begins, so a peer that trickles bytes gains no time.
"""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
from collections.abc import Callable

from attnstore.errors import DeadlineExceeded, Retryable, Unavailable
from attnstore.wire.chunks import Buffer
from attnstore.wire.page_channel import Frame, FrameReceiver, Role

_TIMEVAL = struct.Struct("@ll")
_NO_LINGER = struct.pack("@ii", 1, 0)
_WAIT_MS_MAX = 86_400_000.0
_SLACK_MS = 20.0
"""The kernel's time-out is set again only when it is off by this much; a wait ends no later than this after its bound."""
_KEEPALIVE = (
    (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
    (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 15),
    (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 5),
    (socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3),
    (socket.IPPROTO_TCP, socket.TCP_NODELAY, 1),
)


class FrameStream:
    """Frames over a connected TCP socket, which it owns from now on. One thread at a time; `shutdown` from any."""

    def __init__(self, connection: socket.socket, role: Role) -> None:
        connection.setblocking(True)
        for level, name, value in _KEEPALIVE:
            connection.setsockopt(level, name, value)
        self._socket = connection
        self._receiver = FrameReceiver(role)
        self._waits = Waits(connection)
        self.bound = self._waits.bound
        # A descriptor's number may be another connection's as soon as it is closed.
        self._ending = threading.Lock()

    @property
    def at_boundary(self) -> bool:
        """Nothing of the next frame has arrived."""
        return self._receiver.at_boundary

    def send(self, *parts: Buffer) -> None:
        """Sends the parts one after the other, completely. Raises `Unavailable` or `DeadlineExceeded`."""
        left = [memoryview(part) for part in parts]
        try:
            while left:
                self._waits.before_sending()
                sent = self._socket.sendmsg(left)
                while left and sent >= len(left[0]):
                    sent -= len(left.pop(0))
                if left:
                    left[0] = left[0][sent:]
        except OSError as error:
            raise lost(error) from None

    def receive(self) -> Frame:
        """The next frame, or the one announced before whose payload is whole now.

        Raises `Unavailable`, `DeadlineExceeded` or `ProtocolError`; the connection is useless then.
        """
        receiver = self._receiver
        try:
            while True:
                self._waits.before_receiving()
                count = self._socket.recvmsg_into(receiver.windows(), 0, socket.MSG_WAITALL)[0]
                if count == 0:
                    raise Unavailable("the peer closed the page channel")
                frame = receiver.received(count)
                if frame is not None:
                    return frame
        except OSError as error:
            raise lost(error) from None

    def receive_payload(self, *views: memoryview) -> None:
        """Receives the announced payload into `views`, at most `CHANNEL_GATHER_PAGES` of them."""
        self._receiver.land(*views)
        self.receive()

    def whole_payload(self, frame: Frame) -> bytearray:
        """The payload that `frame` announces, in memory of its own; empty where it has none."""
        payload = bytearray(frame.size_bytes)
        if payload:
            self.receive_payload(memoryview(payload))
        return payload

    def discard_payload(self, scratch: memoryview) -> None:
        """Receives the announced payload and throws it away."""
        self._receiver.discard(scratch)
        self.receive()

    def shutdown(self) -> None:
        """Ends both directions at once: whoever waits in `send` or `receive` gets `Unavailable`. Safe from any thread."""
        with self._ending, contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Gives the socket back."""
        with self._ending:
            self._socket.close()

    def abort(self) -> None:
        """Gives the socket back and resets the connection: a peer that still sends learns it now, even if our window is full."""
        with self._ending, contextlib.suppress(OSError):
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _NO_LINGER)
        self.close()


class Waits:
    """How long a blocking socket may wait. The kernel keeps the time, so that no call is split to watch a clock."""

    def __init__(self, connection: socket.socket) -> None:
        self._socket = connection
        self._left_ms: Callable[[], float] | None = None
        self._timeouts_ms = {socket.SO_RCVTIMEO: 0.0, socket.SO_SNDTIMEO: 0.0}

    def bound(self, left_ms: Callable[[], float]) -> None:
        """Bounds every later wait for the peer: `left_ms` is asked before each system call and may raise to end the exchange."""
        self._left_ms = left_ms

    def left_ms(self) -> float:
        """How long the next wait may be. Raises where the exchange is to end."""
        assert self._left_ms is not None, "bound() comes before the first wait"
        return self._left_ms()

    def before_sending(self) -> None:
        """Bounds the system call that follows. Raises as `left_ms`."""
        self._bound(socket.SO_SNDTIMEO)

    def before_receiving(self) -> None:
        """Bounds the system call that follows. Raises as `left_ms`."""
        self._bound(socket.SO_RCVTIMEO)

    def _bound(self, option: int) -> None:
        left_ms = self.left_ms()
        if not left_ms <= self._timeouts_ms[option] <= left_ms + _SLACK_MS:
            whole_s, rest_us = divmod(max(1, int(min(left_ms, _WAIT_MS_MAX) * 1000)), 1_000_000)
            self._socket.setsockopt(socket.SOL_SOCKET, option, _TIMEVAL.pack(whole_s, rest_us))
            self._timeouts_ms[option] = left_ms


def lost(error: OSError) -> Retryable:
    """The typed error of a failed system call on a connection whose waits are bounded."""
    if isinstance(error, BlockingIOError):
        return DeadlineExceeded("the peer moved no byte of the bulk connection within the time-out")
    return Unavailable(f"the bulk connection broke: {error.strerror or error}")
