"""Transports of a client as tests choose them: fakes, and real ones instead of those that a node offers."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from attnstore.client.base import AttendPlan, MatchPlan, ReadPlan, Transport, WritePlan
from attnstore.client.calls import Call, Runner, ThreadCall, Transfer
from attnstore.client.facade import LoopThread
from attnstore.client.options import ConnectOptions
from attnstore.client.transports.connection import NodeConnection
from attnstore.clock import Clock
from attnstore.errors import AttnStoreError
from attnstore.types import MatchResult, PageStatus, WriteResult

T = TypeVar("T")


class FakeTransport:
    """A transport that counts its calls; `failure` is raised by each, and `carries` says which verbs it has."""

    def __init__(self, name: str, *carries: str) -> None:
        self.name = name
        self.calls = 0
        self.failure: AttnStoreError | None = None
        self._carries = carries or ("read", "write", "match")

    def read(self, plan: ReadPlan) -> Call[None] | None:
        return self._call("read", plan.transfer, lambda: self.land(plan))

    def write(self, plan: WritePlan) -> Call[WriteResult] | None:
        return self._call("write", plan.transfer, lambda: plan.result((PageStatus.STORED,) * len(plan.hashes)))

    def match(self, plan: MatchPlan) -> Call[MatchResult] | None:
        return self._call("match", plan.transfer, lambda: plan.result([0] * len(plan.prefixes), None, 0))

    def attend(self, _plan: AttendPlan, _run: Runner) -> None: ...

    def land(self, plan: ReadPlan) -> None:
        """What a read does."""

    def _call(self, verb: str, transfer: Transfer, run: Callable[[], T]) -> Call[T] | None:
        def called() -> T:
            self.calls += 1
            if self.failure is not None:
                raise self.failure
            return run()

        return ThreadCall(called, transfer) if verb in self._carries else None


def connection_to(url: str, transport: str = "auto", clock: Clock | None = None) -> NodeConnection:
    """What a client of the node is made of."""
    options = ConnectOptions.create(url, deadline_ms=20_000, token=None, tls_ca=None, transport=transport, channels=1)
    return NodeConnection(options, clock)


def offer(connection: NodeConnection, *bulk: Transport) -> None:
    """Has the connection of a blocking client that is open use these transports, as if the node had offered them."""

    async def take() -> None:
        connection.choice.offer([*bulk, connection.grpc])

    thread = LoopThread.acquire()
    try:
        thread.run(take())
    finally:
        LoopThread.release()
