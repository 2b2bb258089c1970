"""Listening sockets, one thread for each connection, and the end of both.

Owns: the accepting threads, the set of live connections, who has a place and how they drain. What a connection says is its own
affair.
Invariants: after `stop` no socket of these listeners is open and no thread of theirs waits for a peer; a peer that has not shown
whose it is takes no place of one that has.

A peer is a newcomer until it is admitted. There are few places for newcomers, and the one that has waited longest makes room for
the next. Admitted peers share the places by tenant; where a tenant's are all taken, an idle connection is closed, so that many
workers that are mostly idle share fewer places. A client replaces an idle connection that it finds closed.
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
from attnstore.limits import CHANNEL_CONNECTIONS_MAX, CHANNEL_NEWCOMERS_MAX, STOP_MS_MAX
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
    """One peer, served by one thread. `serve` holds `busy` while it answers a request, and takes none once `is_ending`."""

    def __init__(self, stream: Stream) -> None:
        self._ending = stream
        self.busy = threading.Lock()
        self.is_ending = False
        self.used_ms = 0.0
        """When the last request was answered, which `serve` notes."""

    @abstractmethod
    def serve(self, admit: Callable[[str], None]) -> None:
        """Runs until the peer leaves, breaks the protocol, stalls, or the node drains.

        Calls `admit(tenant)` once the peer has shown whose it is; that raises `Overloaded` where the tenant has its share of
        connections, and `Unavailable` where the peer took too long.
        """

    @property
    def keeps_state(self) -> bool:
        """Its peer would lose more than the connection if it were closed between two requests."""
        return False

    def shutdown(self) -> None:
        """Breaks the connection, so that `serve` returns soon. Safe from any thread."""
        self.is_ending = True
        self._ending.shutdown()

    def shutdown_when_idle(self) -> bool:
        """Breaks it now if no request is running; otherwise `serve` may return after that one. Whether it was broken."""
        if not self.busy.acquire(blocking=False):
            return False
        self.shutdown()
        self.busy.release()
        return True

    def close(self) -> None:
        """Gives the socket back, after `serve`."""
        self._ending.close()


class ConnectionThreads:
    """Serves what `connect` makes of each accepted socket, from `start` to `stop`. `name` is that of the threads and log lines.

    `tenants`: how many the node serves. See the module for who gets a place.
    """

    def __init__(self, name: str, connect: Callable[[socket.socket], Connection], clock: Clock, tenants: int = 1) -> None:
        self._name = name
        self._connect = connect
        self._clock = clock
        self._lock = threading.Lock()
        self._adopting = threading.Lock()
        self._threads: dict[Connection, threading.Thread] = {}
        self._newcomers: dict[Connection, None] = {}  # the oldest first
        self._tenants: dict[Connection, str] = {}  # of those admitted
        self._places = FairShares(CHANNEL_CONNECTIONS_MAX, f"{name} connections", "close some, or go over gRPC", tenants=tenants)
        self._stopping = threading.Event()
        self._acceptors: dict[socket.socket, threading.Thread] = {}

    def start(self, *listeners: socket.socket) -> None:
        """Serves listening sockets, which this object owns from now on."""
        for listener in listeners:
            self._acceptors[listener] = tasks.supervised_thread(f"{self._name}-accept", functools.partial(self._accept, listener))

    def stop(self, drain_ms: float) -> None:
        """Takes no new connection, gives running requests up to `drain_ms`, then breaks the connections and joins their threads.

        A thread that computes goes on, and ends when it has done: it is waited for no longer than half of `STOP_MS_MAX`.
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
                # Out of descriptors, a peer that left in the queue, or `stop`: none but the last may end the service.
                self._stopping.wait(_ACCEPT_RETRY_S)
                continue
            self._adopt(peer)

    def _adopt(self, peer: socket.socket) -> None:
        with self._adopting:  # or two acceptors would both take the last place
            self._make_room_for_newcomer()
            self._begin(peer)

    def _begin(self, peer: socket.socket) -> None:
        try:
            with self._lock:
                connection = self._connect(peer)
                thread = threading.Thread(target=self._run, args=(connection,), name=self._name, daemon=True)
                thread.start()
                self._threads[connection] = thread
                self._newcomers[connection] = None
        except (OSError, RuntimeError) as error:  # the peer has left, or the system gives no more threads
            peer.close()
            _log.warning("connection refused", listener=self._name, reason=str(error))

    def _make_room_for_newcomer(self) -> None:
        """The newcomer that has been silent longest gives way: an honest one says who it is at once."""
        with self._lock:
            if len(self._newcomers) < CHANNEL_NEWCOMERS_MAX:
                return
            oldest = next(iter(self._newcomers))
            del self._newcomers[oldest]
            thread = self._threads[oldest]
        oldest.shutdown()
        thread.join()  # no more threads than places, however fast peers come

    def _admit(self, connection: Connection, tenant: str) -> None:
        with self._lock:
            if connection not in self._newcomers:
                raise Unavailable("the connection took too long to say whose it is")
            if not self._places.fits(tenant):
                self._reclaim(tenant)
            self._places.take(tenant)
            del self._newcomers[connection]
            self._tenants[connection] = tenant

    def _reclaim(self, newcomer: str) -> None:
        """Closes an idle connection, if there is one: of the tenant that holds the most, the one that was unused longest."""
        held = self._places.held
        idle = [connection for connection in self._tenants if not connection.keeps_state]
        idle.sort(key=lambda connection: (-held[self._tenants[connection]], connection.used_ms))
        for connection in idle:
            tenant = self._tenants[connection]
            if tenant != newcomer and held[tenant] <= held.get(newcomer, 0) + 1:
                continue
            if connection.shutdown_when_idle():
                self._leave(connection)
                return

    def _leave(self, connection: Connection) -> None:
        self._newcomers.pop(connection, None)
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
