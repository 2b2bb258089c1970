"""The shared memory protocol over a blocking Unix socket: whole messages in, whole messages out, each wait bounded.

Owns: the system calls, and the descriptors that come with a message until the caller takes them.
Invariant: no system call waits longer than `bound` allows at its start; a descriptor that nobody asked for is closed.
"""

from __future__ import annotations

import array
import contextlib
import os
import socket
import threading
from collections.abc import Callable, Collection
from dataclasses import dataclass

from attnstore.errors import Unavailable
from attnstore.wire.shared import HEADER_BYTES, Kind, decode_header
from attnstore.wire.stream import WAIT_SLACK_MS, bound_waits, lost

_ONE_DESCRIPTOR_BYTES = socket.CMSG_SPACE(array.array("i").itemsize)
_RECEIVE_FLAGS = int(socket.MSG_WAITALL | socket.MSG_CMSG_CLOEXEC)
_DESCRIPTOR_ALLOWED = frozenset({Kind.MAPPED})


@dataclass(frozen=True, slots=True)
class Message:
    """One message. The receiver of a `descriptor` closes it."""

    kind: Kind
    count: int
    payload: bytes
    descriptor: int | None


class SharedStream:
    """Messages over a connected Unix socket, which it owns from now on. One thread at a time; `shutdown` from any."""

    def __init__(self, connection: socket.socket) -> None:
        connection.setblocking(True)
        self._socket = connection
        self._left_ms: Callable[[], float] | None = None
        self._timeout_ms = 0.0
        # A descriptor's number may be another connection's as soon as it is closed.
        self._ending = threading.Lock()

    def bound(self, left_ms: Callable[[], float]) -> None:
        """Bounds every later wait for the peer: `left_ms` is asked before each system call and may raise to end the exchange."""
        self._left_ms = left_ms

    def send(self, message: bytes) -> None:
        """Sends a message completely. Raises `Unavailable` or `DeadlineExceeded`."""
        self._send(message, 0)

    def send_with_descriptor(self, message: bytes, descriptor: int) -> None:
        """Sends a message with a descriptor attached to its first byte; the descriptor stays the caller's to close."""
        try:
            self._bound_wait()
            sent = socket.send_fds(self._socket, [message], [descriptor])
        except OSError as error:
            raise lost(error) from None
        self._send(message, sent)

    def receive(self, expected: Collection[Kind]) -> Message:
        """The next message, which must be one of `expected`.

        Raises `Unavailable`, `DeadlineExceeded` or `ProtocolError`; the connection is useless then.
        """
        ancillary_bytes = 0 if _DESCRIPTOR_ALLOWED.isdisjoint(expected) else _ONE_DESCRIPTOR_BYTES
        header, descriptor = self._receive(HEADER_BYTES, ancillary_bytes)
        try:
            kind, count, payload_bytes = decode_header(header, expected)
            payload, _ = self._receive(payload_bytes, 0) if payload_bytes else (b"", None)
        except BaseException:
            if descriptor is not None:
                os.close(descriptor)
            raise
        return Message(kind, count, payload, descriptor)

    def peer_uid(self) -> int:
        """The user that the peer ran as when it connected, as the kernel knows it."""
        credentials = array.array("i", bytes(12))
        data = self._socket.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, len(credentials) * credentials.itemsize)
        return array.array("i", data)[1]

    def shutdown(self) -> None:
        """Ends both directions at once: whoever waits in `send` or `receive` gets `Unavailable`. Safe from any thread."""
        with self._ending, contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Gives the socket back."""
        with self._ending:
            self._socket.close()

    def _bound_wait(self) -> None:
        assert self._left_ms is not None, "bound() comes before the first wait"
        left_ms = self._left_ms()
        if not left_ms <= self._timeout_ms <= left_ms + WAIT_SLACK_MS:
            bound_waits(self._socket, left_ms)
            self._timeout_ms = left_ms

    def _send(self, message: bytes, sent: int) -> None:
        view = memoryview(message)
        try:
            while sent < len(view):
                self._bound_wait()
                sent += self._socket.send(view[sent:])
        except OSError as error:
            raise lost(error) from None

    def _receive(self, size_bytes: int, ancillary_bytes: int) -> tuple[bytes, int | None]:
        """Exactly `size_bytes`, and the descriptor that came with the first of them."""
        received = b""
        descriptor: int | None = None
        try:
            while len(received) < size_bytes:
                self._bound_wait()
                # The kernel closes what does not fit the ancillary buffer, so a peer can give us one descriptor or none.
                data, ancillary, _, _ = self._socket.recvmsg(size_bytes - len(received), ancillary_bytes, _RECEIVE_FLAGS)
                for level, kind, content in ancillary:
                    if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                        descriptor = array.array("i", content)[0]
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
