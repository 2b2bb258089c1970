"""The Prometheus endpoint of a node, with a bounded number of threads and descriptors, because it requires no token.

Owns: its listening sockets and threads, until `stop`. Invariant: at most `CHANNEL_UNAUTHENTICATED_MAX` requests are open, and the
oldest is closed for the next. (The server of `prometheus_client` keeps a thread for every connection, as long as the peer likes.)
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Sequence
from contextlib import suppress

from prometheus_client import CollectorRegistry, MetricsHandler

from attnstore.clock import Clock
from attnstore.limits import CHANNEL_HELLO_MS_MAX
from attnstore.server.connections import Connection, ConnectionThreads


class MetricsEndpoint:
    """Serves the registry on `listeners`, which it then owns."""

    def __init__(self, registry: CollectorRegistry, listeners: Sequence[socket.socket], clock: Clock) -> None:
        handler = MetricsHandler.factory(registry)
        self._connections = ConnectionThreads("metrics", lambda peer: _Request(_Peer(peer), handler), clock)
        self._connections.start(*listeners)

    def stop(self) -> None:
        """Accepts no more requests and breaks running ones."""
        self._connections.stop(0)


class _Peer:
    """Adapts a socket to `Stream`."""

    def __init__(self, connection: socket.socket) -> None:
        connection.settimeout(CHANNEL_HELLO_MS_MAX / 1000)
        self.socket = connection

    def shutdown(self) -> None:
        with suppress(OSError):  # the peer has left
            self.socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self.socket.close()


class _Request(Connection):
    """One request. Its peer never authenticates, so it counts as unauthenticated."""

    def __init__(self, peer: _Peer, handler: type) -> None:
        super().__init__(peer)
        self._peer = peer
        self._handler = handler

    def serve(self, admit: Callable[[str], None]) -> None:
        del admit
        with suppress(OSError):  # the peer has left, or does not read
            self._handler(self._peer.socket, self._peer.socket.getpeername(), None)
