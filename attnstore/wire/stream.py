"""The page channel over a blocking socket: whole frames in, whole frames out, each wait bounded.

Owns: the system calls. One `recv` for a header, one for a payload straight into its destination, one `sendmsg` for a header and a
payload straight from where it lies; all of them release the interpreter lock while the kernel copies.
Invariant: no system call waits longer than `bound` allows when it begins; a peer that moves less than `demand` asks for, averaged
over the time that it is waited for, is as good as silent.
"""

from __future__ import annotations

import contextlib
import math
import socket
import struct
import threading
import time
from collections.abc import Callable
from typing import NamedTuple, TypeVar

from attnstore.errors import DeadlineExceeded, Retryable, Unavailable
from attnstore.limits import PEER_BYTES_PER_S_MIN
from attnstore.wire.chunks import Buffer
from attnstore.wire.page_channel import Frame, FrameReceiver, Role

T = TypeVar("T")

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
        self.demand = self._waits.demand
        # A descriptor's number may be another connection's as soon as it is closed.
        self._ending = threading.Lock()

    @property
    def at_boundary(self) -> bool:
        """Nothing of the next frame has arrived."""
        return self._receiver.at_boundary

    def send(self, *parts: Buffer) -> None:
        """Sends the parts one after the other, completely. Raises `Unavailable` or `DeadlineExceeded`."""
        left = [memoryview(part) for part in parts]
        window = None
        try:
            while left:
                rest = sent = self._waits.sending(self._socket.sendmsg, left)
                while left and rest >= len(left[0]):
                    rest -= len(left.pop(0))
                if left:
                    left[0] = left[0][rest:]
                    window = self._waits.judged(window, sent)
        except OSError as error:
            raise lost(error) from None

    def receive(self) -> Frame:
        """The next frame, or the one announced before whose payload is whole now.

        Raises `Unavailable`, `DeadlineExceeded` or `ProtocolError`; the connection is useless then.
        """
        receiver, receive = self._receiver, self._socket.recvmsg_into
        frame = receiver.announced()
        if frame is not None:
            return frame
        window = None
        try:
            while True:
                count = self._waits.receiving(receive, receiver.windows(), 0, socket.MSG_WAITALL)[0]
                frame = self._received(count)
                if frame is not None:
                    return frame
                window = self._waits.judged(window, count)
        except OSError as error:
            raise lost(error) from None

    def look(self) -> Frame | None:
        """`receive` of a frame that has begun to arrive; None at once where there is none."""
        try:
            frame = self._received(self._socket.recvmsg_into(self._receiver.windows(), 0, socket.MSG_DONTWAIT)[0])
        except BlockingIOError:
            return None
        except OSError as error:
            raise lost(error) from None
        return frame or self.receive()

    def _received(self, count: int) -> Frame | None:
        if count == 0:
            raise Unavailable("the peer closed the page channel")
        return self._receiver.received(count)

    def receive_payload(self, *views: memoryview, ahead: bool = False) -> None:
        """Receives the announced payload into `views`, hundreds of them at most.

        `ahead` spares a system call where another frame is sure to follow: its header is received at once.
        """
        self._receiver.land(*views, ahead=ahead)
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


class Window(NamedTuple):
    """What a peer has moved since a moment of `time.monotonic`."""

    began_s: float
    moved_bytes: int


class Waits:
    """How long a blocking socket may wait. The kernel keeps the time, so that no call is split to watch a clock.

    A wait ends at its bound, or later by as much as a shorter bound of the wait before it.
    """

    def __init__(self, connection: socket.socket) -> None:
        self._socket = connection
        self._left_ms: Callable[[], float] | None = None
        self._window_s = math.inf
        self._timeouts_ms = {socket.SO_RCVTIMEO: math.inf, socket.SO_SNDTIMEO: math.inf}

    def bound(self, left_ms: Callable[[], float]) -> None:
        """Bounds every later wait for the peer: `left_ms` is asked before each system call and may raise to end the exchange."""
        self._left_ms = left_ms

    def demand(self, window_ms: float) -> None:
        """From now on a transfer fails that the peer slows below `PEER_BYTES_PER_S_MIN` for about `window_ms`."""
        self._window_s = window_ms / 1000

    def judged(self, window: Window | None, moved_bytes: int) -> Window:
        """The window of a transfer of which another wait has ended after so many bytes, before the last one. None: no wait before.

        Raises `DeadlineExceeded` for a peer that is too slow. A transfer that is done in one wait, as most are, pays nothing.
        """
        now_s = time.monotonic()
        if window is None:
            return Window(now_s, 0)
        moved_bytes += window.moved_bytes
        elapsed_s = now_s - window.began_s
        if elapsed_s < self._window_s:
            return Window(window.began_s, moved_bytes)
        if moved_bytes < PEER_BYTES_PER_S_MIN * elapsed_s:
            raise DeadlineExceeded(f"the peer moved {moved_bytes} bytes in {elapsed_s:.1f} s: too few to be waited for")
        return Window(now_s, 0)

    def left_ms(self) -> float:
        """How long the next wait may be. Raises where the exchange is to end."""
        assert self._left_ms is not None, "bound() comes before the first wait"
        return self._left_ms()

    def sending(self, call: Callable[..., T], *arguments: object) -> T:
        """A bounded system call that may wait until the peer takes bytes. Raises as it does, and as `left_ms`."""
        return self._run(socket.SO_SNDTIMEO, call, arguments)

    def receiving(self, call: Callable[..., T], *arguments: object) -> T:
        """A bounded system call that may wait for bytes of the peer. Raises as it does, and as `left_ms`."""
        return self._run(socket.SO_RCVTIMEO, call, arguments)

    def _run(self, option: int, call: Callable[..., T], arguments: tuple[object, ...]) -> T:
        left_ms = self.left_ms()
        if self._timeouts_ms[option] > left_ms + _SLACK_MS:
            self._set(option, left_ms)
        try:
            return call(*arguments)
        except BlockingIOError:
            # A shorter time-out than this wait's, left from another: to raise it only here spares most calls a second one.
            left_ms = self.left_ms()
            if left_ms <= self._timeouts_ms[option] + _SLACK_MS:
                raise
            self._set(option, left_ms)
        return call(*arguments)

    def _set(self, option: int, timeout_ms: float) -> None:
        whole_s, rest_us = divmod(max(1, int(min(timeout_ms, _WAIT_MS_MAX) * 1000)), 1_000_000)
        self._socket.setsockopt(socket.SOL_SOCKET, option, _TIMEVAL.pack(whole_s, rest_us))
        self._timeouts_ms[option] = timeout_ms


def lost(error: OSError) -> Retryable:
    """The typed error of a failed system call on a connection whose waits are bounded."""
    if isinstance(error, BlockingIOError):
        return DeadlineExceeded("the peer moved no byte of the bulk connection within the time-out")
    return Unavailable(f"the bulk connection broke: {error.strerror or error}")
