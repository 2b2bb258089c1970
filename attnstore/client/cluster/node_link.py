"""One node of a cluster, as a client sees it: its connection, its circuit breaker, and its past speed.

Owns: the `AsyncClient` of one incarnation of a node. Invariants: only the probe is sent through an open circuit; a namespace is
registered with the node before the first call that needs it. A call whose deadline was too short to blame the node triggers a probe
with enough time, so that a hung node is detected even if every caller's deadline is short.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Final, TypeVar

from attnstore import tasks
from attnstore.client.async_client import AsyncClient
from attnstore.client.base import AttendPlan, AttendStream
from attnstore.client.calls import Runner
from attnstore.client.cluster.breaker import CircuitBreaker, CircuitState, had_fair_time
from attnstore.client.options import ConnectOptions
from attnstore.client.planning import Planning
from attnstore.client.transports.connection import NodeConnection
from attnstore.clock import Clock, Deadline
from attnstore.core.layout import PageLayout
from attnstore.directory import Member
from attnstore.errors import AttnStoreError, ClientClosed, DeadlineExceeded, Unavailable
from attnstore.limits import NODE_FAIR_MS
from attnstore.logs import get_logger

T = TypeVar("T")

_log = get_logger(__name__)
_PROBE_DEADLINE_MS: Final = 1_000
_SMOOTHING: Final = 0.2

assert _PROBE_DEADLINE_MS >= NODE_FAIR_MS, "a probe gives the node a fair time"


class NodeLink:
    """Calls to one node. Belongs to one event loop."""

    def __init__(self, member: Member, options: ConnectOptions, clock: Clock) -> None:
        self.member = member
        self.connection = NodeConnection(options, clock)
        self.client = AsyncClient(self.connection)
        self.planning = Planning(self.connection.layouts)
        self._clock = clock
        self._breaker = CircuitBreaker(clock)
        self._registered: set[bytes] = set()
        self._probing: asyncio.Task[None] | None = None
        self._page_ms: float | None = None
        self._closed = False

    @property
    def is_usable(self) -> bool:
        """True if calls are made."""
        return self._breaker.state is CircuitState.CLOSED

    def expected_ms(self, pages: int) -> float | None:
        """Returns how long a read of that many pages is likely to take; None if nothing was read yet."""
        return None if self._page_ms is None else self._page_ms * pages

    def took(self, pages: int, took_ms: float) -> None:
        """Records the time of a read, exponentially smoothed, for `expected_ms`."""
        now = took_ms / pages
        self._page_ms = now if self._page_ms is None else self._page_ms + _SMOOTHING * (now - self._page_ms)

    async def call(self, call: Callable[[AsyncClient], Awaitable[T]], size_bytes: int = 0) -> T:
        """Makes a call that moves up to `size_bytes`, and counts its result.

        Raises `Unavailable` at once if the circuit is open.
        """
        if not self.is_usable:
            raise Unavailable(f"node {self.member.node_id} has failed and is left alone until a probe of it succeeds")
        began_ms = self._clock.now_ms()
        try:
            answer = await call(self.client)
        except DeadlineExceeded:
            # Only the time given to this node counts, not the time that the caller had before others were asked.
            if had_fair_time(self._clock.now_ms() - began_ms, size_bytes):
                self._failed()
            else:
                self._begin_probe()
            raise
        except Unavailable:
            self._failed()
            raise
        except asyncio.CancelledError:
            self._begin_probe()  # nobody waits any more: was it for the node?
            raise
        except ClientClosed:
            raise Unavailable(f"node {self.member.node_id} left the cluster during the call") from None
        except AttnStoreError:
            self._breaker.succeeded()  # a refusal is an answer
            raise
        self._breaker.succeeded()
        return answer

    async def register(self, namespace: bytes, layout: PageLayout, deadline: Deadline) -> None:
        """Registers the namespace with the node, unless this link has done so."""
        if namespace not in self._registered:
            await self.client.register_layout(namespace, layout, deadline_ms=deadline.left_ms())
            self._registered.add(namespace)

    async def attend(self, plan: AttendPlan, run: Runner) -> AttendStream:
        """A stream to the node; see `AttendNode.attend`. Counted as `call`."""
        return await self.call(lambda _: self.connection.attend(plan, run))

    async def close(self) -> None:
        """Ends the connection."""
        self._closed = True
        try:
            if self._probing is not None:
                await tasks.end(self._probing)
        finally:
            await self.client.close()

    def _failed(self) -> None:
        was_usable = self.is_usable
        self._breaker.failed()
        if was_usable and not self.is_usable:
            _log.warning("node left alone", node=self.member.node_id, url=self.member.url)
            self._begin_probe()

    def _begin_probe(self) -> None:
        if not self._closed and (self._probing is None or self._probing.done()):
            self._probing = tasks.supervised("probe", self._probe)

    async def _probe(self) -> None:
        """Pings the node until it answers; if that takes too long, the circuit opens meanwhile."""
        while not await self._answers():
            if self.is_usable:
                self._failed()
            else:
                self._breaker.probe_failed()
        if not self.is_usable:
            _log.info("node is back", node=self.member.node_id, url=self.member.url)
        self._breaker.succeeded()

    async def _answers(self) -> bool:
        await asyncio.sleep(self._breaker.probe_in_ms() / 1000)
        try:
            await self.client.describe(deadline_ms=_PROBE_DEADLINE_MS)
        except (Unavailable, DeadlineExceeded):
            return False
        except AttnStoreError:
            pass  # a refusal is an answer
        return True
