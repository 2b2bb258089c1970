"""Idle bulk connections to one node, each used by one exchange at a time.

Owns: which connections are idle and which are in use.
Invariant: a connection returns to the pool only after a complete exchange; otherwise it is closed before `exchange` ends, so late
bytes on it reach nobody.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import ExitStack
from typing import Generic, Protocol, TypeVar

from attnstore.client.calls import Transfer
from attnstore.clock import Deadline
from attnstore.errors import ClientClosed, Unavailable

_IDLE_MAX = 8


class Channel(Protocol):
    """One open connection."""

    @property
    def answered(self) -> bool:
        """True if the running exchange has had effects, so that it must not be repeated."""
        ...

    def begin(self, deadline: Deadline) -> None:
        """Called before each exchange, with its deadline."""
        ...

    def shutdown(self) -> None:
        """Breaks the connection, so that its user gets `Unavailable`. Safe from any thread."""
        ...

    def close(self) -> None:
        """Closes the socket."""
        ...


C = TypeVar("C", bound=Channel)
R = TypeVar("R")


class ChannelPool(Generic[C]):
    """`connect` opens a connection within a deadline. Methods may be called from several threads at once."""

    def __init__(self, connect: Callable[[Deadline], C]) -> None:
        self._connect = connect
        self._lock = threading.Lock()
        self._idle: list[C] = []
        self._in_use: set[C] = set()
        self._closed = False

    def close(self) -> None:
        """Breaks running exchanges and closes every connection."""
        with self._lock:
            self._closed = True
            in_use = list(self._in_use)
        with ExitStack() as closing:
            closing.callback(self._drop_idle)
            for channel in in_use:
                closing.callback(channel.shutdown)

    def exchange(self, deadline: Deadline, transfer: Transfer, run: Callable[[C], R]) -> R:
        """Runs `run` on an idle connection, and once more on a new one if the idle one turns out to be dead."""
        with self._lock:
            pooled = self._idle.pop() if self._idle else None
        while True:
            channel = pooled or self._connect(deadline)
            reusable = False
            try:
                with self._lock:
                    self._in_use.add(channel)
                    self._require_open()
                with transfer.breakable(channel.shutdown):
                    channel.begin(deadline)
                    result = run(channel)
                # An abort that came too late for this exchange has still broken its connection.
                reusable = not transfer.is_aborted
                return result
            except Unavailable:
                self._require_open()
                if pooled is None or channel.answered or transfer.is_aborted:
                    raise
                self._drop_idle()  # they led to a node that has gone
            finally:
                self._put_back(channel, reusable)
            pooled = None

    def _put_back(self, channel: C, reusable: bool) -> None:
        with self._lock:
            self._in_use.discard(channel)
            reusable = reusable and not self._closed and len(self._idle) < _IDLE_MAX
            if reusable:
                self._idle.append(channel)
        if not reusable:
            channel.close()

    def _require_open(self) -> None:
        if self._closed:
            raise ClientClosed("the client is closed")

    def _drop_idle(self) -> None:
        with self._lock:
            idle, self._idle = self._idle, []
        with ExitStack() as closing:
            for channel in idle:
                closing.callback(channel.close)
