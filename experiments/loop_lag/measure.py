"""The measurement: each call several times beside bulk traffic, taking the minimum, because a busy machine only adds time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import grpc

from experiments.loop_lag.calls import Call
from experiments.loop_lag.node import WatchedNode, bulk_traffic


@dataclass(frozen=True, slots=True)
class Lag:
    """Milliseconds. `lag`: how late the event loop was; `busy`: its longest computation without a pause; `lock`: the
    store's lock.
    """

    rpc: str
    size: str
    lag_ms: float
    busy_ms: float
    lock_ms: float


def measure(*, attend_threads: int, tries: int, calls: Sequence[Call]) -> Iterator[Lag]:
    """Yields a row for each call, as soon as it is known."""
    with (
        WatchedNode(attend_threads=attend_threads) as node,
        grpc.insecure_channel(node.address, options=[("grpc.max_receive_message_length", -1)]) as channel,
        bulk_traffic(node.address),
    ):
        for call in calls:
            yield best([_once(node, channel, call) for _ in range(tries)])


def best(tries: list[Lag]) -> Lag:
    """Returns the minimum of each column."""
    first = tries[0]
    columns = zip(*((each.lag_ms, each.busy_ms, each.lock_ms) for each in tries), strict=True)
    return Lag(first.rpc, first.size, *map(min, columns))


def _once(node: WatchedNode, channel: grpc.Channel, call: Call) -> Lag:
    run = call.prepare(node, channel)
    node.settle()
    run()
    lag_ms, busy_ms = node.probe.take()
    return Lag(call.rpc, call.size, lag_ms, busy_ms, node.lock.take())
