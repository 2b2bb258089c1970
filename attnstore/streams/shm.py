"""The shm protocol over a blocking Unix socket: whole messages in, whole messages out, each wait bounded.

Owns: the socket, and the descriptors that come with a message until the caller takes them.
Invariant: no system call waits longer than `bound` allows when it begins; an unexpected descriptor is closed and its message
refused.
"""

from __future__ import annotations

import array
import contextlib
import os
import socket
import threading
import time
from collections.abc import Collection
from dataclasses import dataclass

from attnstore.errors import ProtocolError, Unavailable
from attnstore.streams.waits import RECEIVING, SENDING, Waits, lost
from attnstore.wire.shm import HEADER_BYTES, WITH_DESCRIPTOR, Kind, decode_header

_ONE_DESCRIPTOR_BYTES = socket.CMSG_LEN(array.array("i").itemsize)
"""Not `CMSG_SPACE`, whose padding has room for a second descriptor."""
_RECEIVE_FLAGS = int(socket.MSG_WAITALL | socket.MSG_CMSG_CLOEXEC)
_LOOK_FLAGS = int(_RECEIVE_FLAGS | socket.MSG_DONTWAIT)
_TRUNCATED = int(socket.MSG_CTRUNC)
"""Plain integers: operations on enums would cost microseconds for each message."""
_LOOKS_S = 100e-6
"""How long to poll for bytes before sleeping until they come. A core that has gone idle takes 50 us or more to wake up, on each
side of each question; most answers take less.
"""


@dataclass(frozen=True, slots=True)
class Message:
    """One message. The receiver of a `descriptor` closes it."""

    kind: Kind
    count: int
    payload: bytes
    descriptor: int | None

    def close(self) -> None:
        """Closes the descriptor of a message that is not handled."""
        if self.descriptor is not None:
            os.close(self.descriptor)


class ShmStream:
    """Messages over a connected Unix socket, which the stream then owns. Used by one thread at a time; `shutdown`
    from any thread.
    """

    def __init__(self, connection: socket.socket) -> None:
        connection.setblocking(True)
        self._socket = connection
        self._waits = Waits(connection)
        self.bound = self._waits.bound
        # The number of a closed descriptor may be reused by another connection at once.
        self._ending = threading.Lock()

    def send(self, message: bytes) -> None:
        """Sends a message completely. Raises `Unavailable` or `DeadlineExceeded`."""
        self._send(message, 0)

    def send_with_descriptor(self, message: bytes, descriptor: int) -> None:
        """Sends a message with a descriptor attached to its first byte. The caller still closes the descriptor."""
        try:
            sent = self._waits.run(SENDING, socket.send_fds, self._socket, [message], [descriptor])
        except OSError as error:
            raise lost(error) from None
        self._send(message, sent)

    def receive(self, expected: Collection[Kind]) -> Message:
        """Returns the next message, which must be one of `expected`.

        Raises `Unavailable`, `DeadlineExceeded` or `ProtocolError`; the connection is unusable then.
        """
        ancillary_bytes = 0 if WITH_DESCRIPTOR.isdisjoint(expected) else _ONE_DESCRIPTOR_BYTES
        header, descriptor = self._receive(HEADER_BYTES, ancillary_bytes)
        try:
            kind, count, payload_bytes = decode_header(header, expected)
            how = "with" if kind in WITH_DESCRIPTOR else "without"
            if (descriptor is not None) != (how == "with"):
                raise ProtocolError(f"shared memory: a {kind.name} must come {how} a descriptor")
            payload, _ = self._receive(payload_bytes, 0) if payload_bytes else (b"", None)
        except BaseException:
            if descriptor is not None:
                os.close(descriptor)
            raise
        return Message(kind, count, payload, descriptor)

    def peer_uid(self) -> int:
        """The user id of the peer when it connected, as reported by the kernel."""
        credentials = array.array("i", bytes(12))
        data = self._socket.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, len(credentials) * credentials.itemsize)
        return array.array("i", data)[1]

    def shutdown(self) -> None:
        """Ends both directions at once: a thread in `send` or `receive` gets `Unavailable`. Safe from any thread."""
        with self._ending, contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Closes the socket."""
        with self._ending:
            self._socket.close()

    def _send(self, message: bytes, sent: int) -> None:
        view = memoryview(message)
        try:
            while sent < len(view):
                sent += self._waits.run(SENDING, self._socket.send, view[sent:])
        except OSError as error:
            raise lost(error) from None

    def _arrived(self, size_bytes: int, ancillary_bytes: int) -> tuple[bytes, list[tuple[int, int, bytes]], int]:
        """Returns what has arrived, at most `size_bytes`; nothing at the end of the stream. Polls for a while, then sleeps."""
        self._waits.left_ms()
        began_s = time.perf_counter()
        while time.perf_counter() - began_s < _LOOKS_S:
            try:  # cheaper than `suppress` in this loop
                return self._socket.recvmsg(size_bytes, ancillary_bytes, _LOOK_FLAGS)[:3]
            except BlockingIOError:
                continue
        return self._waits.run(RECEIVING, self._socket.recvmsg, size_bytes, ancillary_bytes, _RECEIVE_FLAGS)[:3]

    def _receive(self, size_bytes: int, ancillary_bytes: int) -> tuple[bytes, int | None]:
        """Returns exactly `size_bytes`, and the descriptor that came with the first of them."""
        received = b""
        descriptor: int | None = None
        try:
            while len(received) < size_bytes:
                data, ancillary, flags = self._arrived(size_bytes - len(received), ancillary_bytes)
                for level, kind, content in ancillary:
                    if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                        descriptor = array.array("i", content)[0]
                if flags & _TRUNCATED:
                    # The kernel has closed descriptors that did not fit the ancillary buffer.
                    raise ProtocolError("shared memory: an unexpected descriptor came")
                if not data:
                    raise Unavailable("the peer closed the shared memory connection")
                received += data
                ancillary_bytes = 0
        except BaseException as error:
            if descriptor is not None:
                os.close(descriptor)
            if isinstance(error, OSError):
                raise lost(error) from None
            raise
        return received, descriptor
