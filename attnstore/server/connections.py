"""Listening sockets, one thread per connection, and their shutdown.

Owns: the accepting threads, the set of live connections, which connections are admitted, and draining. The protocol of a connection
is its own.
Invariants: after `stop` no socket of these listeners is open and none of their threads waits for a peer; a peer that has not
authenticated never takes the place of one that has.

A peer is admitted when it has authenticated. Few connections may be unauthenticated: the oldest of them is closed for the next one.
Admitted peers share the connections by tenant. If a tenant's share is used up, an idle connection is closed, so that many mostly
idle workers share fewer connections. A client replaces an idle connection that it finds closed.
"""

from __future__ import annotations

import functools
import socket
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Protocol

from attnstore import tasks
from attnstore.clock import Clock
from attnstore.core.fair_share import FairShares
from attnstore.errors import Unavailable
from attnstore.limits import CHANNEL_CONNECTIONS_MAX, CHANNEL_UNAUTHENTICATED_MAX, STOP_MS_MAX
from attnstore.logs import get_logger

_ACCEPT_RETRY_S = 0.01

_log = get_logger(__name__)


class Stream(Protocol):
    """The transport of a connection, as far as shutdown needs it."""

    def shutdown(self) -> None:
        """Breaks it: a thread that waits for the peer returns soon. Safe from any thread."""
        ...

    def close(self) -> None:
        """Closes the socket."""
        ...


class Connection(ABC):
    """One peer, served by one thread. `serve` holds `busy` while it answers a request, and accepts none once `is_ending`."""

    def __init__(self, stream: Stream) -> None:
        self._ending = stream
        self.busy = threading.Lock()
        self.is_ending = False
        self.used_ms = 0.0
        """The time of the last answered request, set by `serve`."""

    @abstractmethod
    def serve(self, admit: Callable[[str], None]) -> None:
        """Serves until the peer leaves, breaks the protocol, stalls, or the node drains.

        Calls `admit(tenant)` once the peer has authenticated. That raises `Overloaded` if the tenant's share of connections is used
        up, and `Unavailable` if the peer took too long.
        """

    @property
    def keeps_state(self) -> bool:
        """True if closing it between two requests would cost the peer more than the connection."""
        return False

    def shutdown(self) -> None:
        """Breaks the connection, so that `serve` returns soon. Safe from any thread."""
        self.is_ending = True
        self._ending.shutdown()

    def shutdown_when_idle(self) -> bool:
        """Breaks the connection now if no request is running, and returns whether it did. Otherwise `serve` may return after that
        request.
        """
        if not self.busy.acquire(blocking=False):
            return False
        self.shutdown()
        self.busy.release()
        return True

    def close(self) -> None:
        """Closes the socket, after `serve` has returned."""
        self._ending.close()


class ConnectionThreads:
    """Serves each accepted socket with the connection that `connect` creates for it, from `start` to `stop`.

    `name` is the name of the threads and in log lines. `tenants` is the number of tenants that the node serves. See the module for
    who is admitted.
    """

    def __init__(self, name: str, connect: Callable[[socket.socket], Connection], clock: Clock, tenants: int = 1) -> None:
        self._name = name
        self._connect = connect
        self._clock = clock
        self._lock = threading.Lock()
        self._adopting = threading.Lock()
        self._threads: dict[Connection, threading.Thread] = {}
        self._unauthenticated: dict[Connection, None] = {}  # the oldest first
        self._tenants: dict[Connection, str] = {}  # of the admitted connections
        self._places = FairShares(CHANNEL_CONNECTIONS_MAX, f"{name} connections", "close some, or go over gRPC", tenants=tenants)
        self._stopping = threading.Event()
        self._acceptors: dict[socket.socket, threading.Thread] = {}

    def start(self, *listeners: socket.socket) -> None:
        """Serves listening sockets, which this object then owns."""
        for listener in listeners:
            self._acceptors[listener] = tasks.supervised_thread(f"{self._name}-accept", functools.partial(self._accept, listener))

    def stop(self, drain_ms: float) -> None:
        """Accepts no new connection, gives running requests up to `drain_ms`, then breaks the connections and joins their threads.

        A thread that computes continues until it is done; it is waited for no longer than half of `STOP_MS_MAX`.
        """
        self._stopping.set()
        for listener, acceptor in self._acceptors.items():
            with suppress(OSError):
                listener.shutdown(socket.SHUT_RDWR)
            acceptor.join(STOP_MS_MAX / 8 / 1000)
            listener.close()
        with self._lock:
            threads = dict(self._threads)
        for connection in threads:
            connection.shutdown_when_idle()
        self._join(threads, drain_ms)
        for connection in threads:
            connection.shutdown()
        self._join(threads, STOP_MS_MAX / 4)

    def _join(self, threads: Mapping[Connection, threading.Thread], within_ms: float) -> None:
        end_ms = self._clock.now_ms() + within_ms
        for thread in threads.values():
            thread.join(max(0.0, end_ms - self._clock.now_ms()) / 1000)

    def _accept(self, listener: socket.socket) -> None:
        while not self._stopping.is_set():
            try:
                peer, _ = listener.accept()
            except OSError:
                # Out of descriptors, a peer that left the queue, or `stop`: only the last may end the service.
                self._stopping.wait(_ACCEPT_RETRY_S)
                continue
            self._adopt(peer)

    def _adopt(self, peer: socket.socket) -> None:
        with self._adopting:  # otherwise two acceptors could both take the last place
            self._limit_unauthenticated()
            self._begin(peer)

    def _begin(self, peer: socket.socket) -> None:
        try:
            with self._lock:
                connection = self._connect(peer)
                thread = threading.Thread(target=self._run, args=(connection,), name=self._name, daemon=True)
                thread.start()
                self._threads[connection] = thread
                self._unauthenticated[connection] = None
        except (OSError, RuntimeError) as error:  # the peer has left, or the system has no more threads
            peer.close()
            _log.warning("connection refused", listener=self._name, reason=str(error))

    def _limit_unauthenticated(self) -> None:
        """Closes the oldest unauthenticated connection if there are too many: an honest peer authenticates at once."""
        with self._lock:
            if len(self._unauthenticated) < CHANNEL_UNAUTHENTICATED_MAX:
                return
            oldest = next(iter(self._unauthenticated))
            del self._unauthenticated[oldest]
            thread = self._threads[oldest]
        oldest.shutdown()
        thread.join()  # never more threads than places, however fast peers connect

    def _admit(self, connection: Connection, tenant: str) -> None:
        with self._lock:
            if connection not in self._unauthenticated:
                raise Unavailable("the connection took too long to authenticate")
            if not self._places.fits(tenant):
                self._reclaim(tenant)
            self._places.take(tenant)
            del self._unauthenticated[connection]
            self._tenants[connection] = tenant

    def _reclaim(self, admitted: str) -> None:
        """Makes room for a connection of the tenant `admitted`: closes an idle connection, if there is one: the least recently
        used one of the tenant that holds the most.
        """
        held = self._places.held
        idle = [connection for connection in self._tenants if not connection.keeps_state]
        idle.sort(key=lambda connection: (-held[self._tenants[connection]], connection.used_ms))
        for connection in idle:
            tenant = self._tenants[connection]
            if tenant != admitted and held[tenant] <= held.get(admitted, 0) + 1:
                continue
            if connection.shutdown_when_idle():
                self._leave(connection)
                return

    def _leave(self, connection: Connection) -> None:
        self._unauthenticated.pop(connection, None)
        tenant = self._tenants.pop(connection, None)
        if tenant is not None:
            self._places.give_back(tenant)

    def _run(self, connection: Connection) -> None:
        try:
            connection.serve(functools.partial(self._admit, connection))
        except Exception:
            _log.exception("connection failed", listener=self._name)
        finally:
            with self._lock:
                self._leave(connection)
                del self._threads[connection]
            connection.close()
