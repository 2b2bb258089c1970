"""A listening socket, one thread for each connection, and the end of both.

Owns: the accepting thread, the set of live connections and how they drain. What a connection says is its own affair.
Invariant: after `stop` no thread of this listener runs and no socket of it is open.
"""

from __future__ import annotations

import socket
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Protocol

from attnstore.clock import Clock
from attnstore.errors import Overloaded
from attnstore.limits import CHANNEL_CONNECTIONS_MAX
from attnstore.logs import get_logger

_ACCEPT_RETRY_S = 0.01

_log = get_logger(__name__)


class Stream(Protocol):
    """What a connection speaks over, as far as its end goes."""

    def shutdown(self) -> None:
        """Breaks it: whoever waits for the peer returns soon. Safe from any thread."""
        ...

    def close(self) -> None:
        """Gives the socket back."""
        ...


class Connection(ABC):
    """One peer, served by one thread. `serve` holds `busy` while it answers a request."""

    def __init__(self, stream: Stream) -> None:
        self._ending = stream
        self.busy = threading.Lock()

    @abstractmethod
    def serve(self) -> None:
        """Runs until the peer leaves, breaks the protocol, stalls, or the node drains."""

    def shutdown(self) -> None:
        """Breaks the connection, so that `serve` returns soon. Safe from any thread."""
        self._ending.shutdown()

    def shutdown_when_idle(self) -> None:
        """Breaks it now if no request is running; otherwise `serve` returns after that one."""
        if self.busy.acquire(blocking=False):
            self._ending.shutdown()
            self.busy.release()

    def close(self) -> None:
        """Gives the socket back, after `serve`."""
        self._ending.close()


class ConnectionThreads:
    """Serves what `connect` makes of each accepted socket, from `start` to `stop`. `name` is that of the threads and log lines."""

    def __init__(self, name: str, connect: Callable[[socket.socket], Connection], clock: Clock) -> None:
        self._name = name
        self._connect = connect
        self._clock = clock
        self._lock = threading.Lock()
        self._threads: dict[Connection, threading.Thread] = {}
        self._stopping = threading.Event()
        self._listener: socket.socket | None = None
        self._acceptor: threading.Thread | None = None

    def start(self, listener: socket.socket) -> None:
        """Serves a listening socket, which this object owns from now on."""
        self._listener = listener
        self._acceptor = threading.Thread(target=self._accept, args=(listener,), name=f"{self._name}-accept", daemon=True)
        self._acceptor.start()

    def stop(self, drain_ms: float) -> None:
        """Takes no new connection, gives running requests up to `drain_ms`, then breaks the connections and joins their threads."""
        self._stopping.set()
        if self._listener is not None and self._acceptor is not None:
            self._listener.shutdown(socket.SHUT_RDWR)
            self._acceptor.join()
            self._listener.close()
        with self._lock:
            threads = dict(self._threads)
        for connection in threads:
            connection.shutdown_when_idle()
        deadline_ms = self._clock.now_ms() + drain_ms
        for connection, thread in threads.items():
            thread.join(max(0.0, deadline_ms - self._clock.now_ms()) / 1000)
            connection.shutdown()
            thread.join()

    def _accept(self, listener: socket.socket) -> None:
        while not self._stopping.is_set():
            try:
                peer, _ = listener.accept()
            except OSError:
                # Out of descriptors, a peer that left in the queue, or `stop`: none but the last may end the service.
                self._stopping.wait(_ACCEPT_RETRY_S)
                continue
            self._adopt(peer)

    def _adopt(self, peer: socket.socket) -> None:
        try:
            with self._lock:
                if len(self._threads) >= CHANNEL_CONNECTIONS_MAX:
                    raise Overloaded(f"{CHANNEL_CONNECTIONS_MAX} connections are open")
                connection = self._connect(peer)
                thread = threading.Thread(target=self._run, args=(connection,), name=self._name, daemon=True)
                thread.start()
                self._threads[connection] = thread
        except (Overloaded, OSError, RuntimeError) as error:  # also: the peer has left, or the system gives no more threads
            peer.close()
            _log.warning("connection refused", listener=self._name, reason=str(error))

    def _run(self, connection: Connection) -> None:
        try:
            connection.serve()
        except Exception:
            _log.exception("connection failed", listener=self._name)
        finally:
            with self._lock:
                del self._threads[connection]
            connection.close()
