"""The limit of the network stack: pages over a bare TCP connection, blocking sockets on both sides, no protocol, no checksum.

A request is 16 bytes: operation, first page, end. The server sends each page in place with one `sendall`, or receives each page
into an existing slot and answers one byte; the client does the reverse.
"""

from __future__ import annotations

import socket
import struct

from attnstore.address import Address
from experiments.bandwidth.lane import Start, serve_lane
from experiments.bandwidth.pages import PageBuffers
from experiments.bandwidth.processes import say_and_wait, serve_connections

_REQUEST = struct.Struct("<QII")
_READ, _WRITE = 1, 2
_CONNECT_S_MAX = 10.0


class RawTcpLane:
    """The client."""

    def __init__(self, start: Start) -> None:
        self._socket = Address.parse(start.address).connect(_CONNECT_S_MAX)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._source = PageBuffers.filled(start.shape)
        self._answer = memoryview(bytearray(1))
        self._destination = PageBuffers(start.shape)
        self.verbs = {"raw_tcp read": self._read, "raw_tcp write": self._write}
        self.landing = {"raw_tcp read": self._destination}

    def begin_pass(self) -> None:
        """No-op: the server overwrites."""

    def _read(self, begin: int, end: int) -> None:
        self._socket.sendall(_REQUEST.pack(_READ, begin, end))
        for index in range(begin, end):
            _receive(self._socket, self._destination.views[index])

    def _write(self, begin: int, end: int) -> None:
        self._socket.sendall(_REQUEST.pack(_WRITE, begin, end))
        for index in range(begin, end):
            self._socket.sendall(self._source.views[index])
        _receive(self._socket, self._answer)


def serve(start: Start) -> None:
    """Runs the server, on the host in the start parameters."""
    source, slots = PageBuffers.filled(start.shape), PageBuffers(start.shape)

    def answer(peer: socket.socket) -> None:
        peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        request = memoryview(bytearray(_REQUEST.size))
        while _receive(peer, request):
            op, begin, end = _REQUEST.unpack(request)
            for index in range(begin, end):
                if op == _READ:
                    peer.sendall(source.views[index])
                else:
                    _receive(peer, slots.views[index])
            if op == _WRITE:
                peer.sendall(b"\0")

    say_and_wait(serve_connections(start.address or "127.0.0.1", answer))


def _receive(peer: socket.socket, view: memoryview) -> bool:
    """Fills `view`, in one system call if possible. Returns False if the peer closed the connection instead."""
    at = 0
    while at < len(view):
        count = peer.recv_into(view[at:], len(view) - at, socket.MSG_WAITALL)
        if count == 0:
            return False
        at += count
    return True


if __name__ == "__main__":
    START = Start.from_arguments()
    if START.variant == "server":
        serve(START)
    else:
        serve_lane(RawTcpLane(START), START)
