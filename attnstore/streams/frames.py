"""The page channel over a blocking socket: whole frames in, whole frames out, each wait bounded.

Owns: the socket. A header and a payload take one `recvmsg_into` or one `sendmsg`, straight into or out of the caller's memory; all
system calls release the interpreter lock while the kernel copies.
Invariant: no system call waits longer than `bound` allows when it begins; a peer that moves fewer bytes than `demand` asks for
counts as silent.
"""

from __future__ import annotations

import contextlib
import socket
import struct
import threading

from attnstore.errors import Unavailable
from attnstore.streams.spin import Spin
from attnstore.streams.waits import RECEIVING, SENDING, Waits, lost
from attnstore.wire.chunks import Buffer
from attnstore.wire.frame_receiver import FrameReceiver, Role
from attnstore.wire.page_channel import Frame

_NO_LINGER = struct.pack("@ii", 1, 0)
_KEEPALIVE = (
    (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
    (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 15),
    (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 5),
    (socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3),
    (socket.IPPROTO_TCP, socket.TCP_NODELAY, 1),
)


class FrameStream:
    """Frames over a connected TCP socket, which the stream then owns. Used by one thread at a time; `shutdown` from any thread."""

    def __init__(self, connection: socket.socket, role: Role) -> None:
        connection.setblocking(True)
        for level, name, value in _KEEPALIVE:
            connection.setsockopt(level, name, value)
        self._socket = connection
        self._receiver = FrameReceiver(role)
        self._waits = Waits(connection)
        self._spin: Spin | None = None
        self.bound = self._waits.bound
        self.demand = self._waits.demand
        # The number of a closed descriptor may be reused by another connection at once.
        self._ending = threading.Lock()

    def spins(self, bound_ms: float) -> None:
        """Makes each wait for a frame's header spin for up to `bound_ms` before it sleeps, as long as that pays."""
        self._spin = Spin(self._socket, bound_ms)

    @property
    def at_boundary(self) -> bool:
        """True if no byte of the next frame has arrived."""
        return self._receiver.at_boundary

    def send(self, *parts: Buffer) -> None:
        """Sends the parts one after the other, completely. Raises `Unavailable` or `DeadlineExceeded`."""
        left = [memoryview(part) for part in parts]
        window = None
        try:
            while left:
                rest = sent = self._waits.run(SENDING, self._socket.sendmsg, left)
                while left and rest >= len(left[0]):
                    rest -= len(left.pop(0))
                if left:
                    left[0] = left[0][rest:]
                    window = self._waits.judged(window, sent)
        except OSError as error:
            raise lost(error) from None

    def receive(self, *payload: memoryview, ahead: bool = False) -> Frame:
        """Returns the next frame, whose payload is still to come. With `payload`, returns the previously announced frame once its
        bytes fill these views.

        At most some hundred views. `ahead` saves a system call if another frame is sure to follow: its header is received with the
        payload. Raises `Unavailable`, `DeadlineExceeded` or `ProtocolError`; the connection is unusable then.
        """
        receiver = self._receiver
        if payload:
            receiver.land(*payload, ahead=ahead)
        else:
            frame = receiver.announced()
            if frame is not None:
                return frame
        window = None
        waits, receive = self._waits, self._socket.recvmsg_into
        spin = self._spin if not payload else None
        try:
            while True:
                if spin is not None:
                    spin.begin()
                waits.begin(RECEIVING)  # and not `waits.run`, which costs another call for each page
                try:
                    count = receive(receiver.windows(), 0, socket.MSG_WAITALL)[0]
                except BlockingIOError:
                    waits.resume(RECEIVING)
                    count = receive(receiver.windows(), 0, socket.MSG_WAITALL)[0]
                if spin is not None:
                    spin.end()
                    spin = None
                frame = self._received(count)
                if frame is not None:
                    return frame
                window = waits.judged(window, count)
        except OSError as error:
            raise lost(error) from None

    def look(self) -> Frame | None:
        """`receive` of a frame that has begun to arrive; returns None at once if there is none."""
        try:
            frame = self._received(self._socket.recvmsg_into(self._receiver.windows(), 0, socket.MSG_DONTWAIT)[0])
        except BlockingIOError:
            return None
        except OSError as error:
            raise lost(error) from None
        return frame or self.receive()

    def whole_payload(self, frame: Frame) -> bytearray:
        """Returns the payload that `frame` announces, in new memory; empty if it has none."""
        payload = bytearray(frame.size_bytes)
        if payload:
            self.receive(memoryview(payload))
        return payload

    def discard_payload(self, scratch: memoryview) -> None:
        """Receives the announced payload and throws it away."""
        self._receiver.discard(scratch)
        self.receive()

    def shutdown(self) -> None:
        """Ends both directions at once: a thread in `send` or `receive` gets `Unavailable`. Safe from any thread."""
        with self._ending, contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Closes the socket."""
        with self._ending:
            self._socket.close()

    def abort(self) -> None:
        """Closes the socket and resets the connection: a peer that still sends learns it now, even if our window is full."""
        with self._ending, contextlib.suppress(OSError):
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _NO_LINGER)
        self.close()

    def _received(self, count: int) -> Frame | None:
        if count == 0:
            raise Unavailable("the peer closed the page channel")
        return self._receiver.received(count)
