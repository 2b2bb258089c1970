"""One policy under one stream of requests, in real time.

Owns: `Figures` and `measure`. Invariant: all policies get the same requests at the same times and the same memory for tokens;
figures are of the window after the warm-up, weighted by time.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from statistics import fmean
from typing import Final

from attnstore.clock import Clock
from attnstore.core.layout import PageLayout
from attnstore_worker.engine import Engine, EngineOptions, SamplingParams, Sequence
from attnstore_worker.model import LoadedModel
from experiments.memory_utilization.reservation import ContiguousReservation, PagedReservation, Reservation
from experiments.memory_utilization.workload import Request, Shape

POLICIES: Final = ("contiguous_max", "contiguous_known", "paged")
_SEQUENCES_MAX: Final = 64
_IDLE_S: Final = 0.002


@dataclass(frozen=True, slots=True)
class Window:
    """Figures are taken for `measured_s` after `warm_up_s`. Requests that arrived by then may finish for `drain_s` more."""

    warm_up_s: float
    measured_s: float
    drain_s: float

    @property
    def end_s(self) -> float:
        """When the last request may arrive."""
        return self.warm_up_s + self.measured_s


@dataclass(frozen=True, slots=True)
class Figures:
    """The figures of one policy.

    utilization: token slots that hold a token / slots reserved. memory_utilization: the same / all slots.
    normalized_latency_ms: mean of (end - arrival) / output tokens over the requests that arrived in the window. Unfinished requests
    count with their age, so it is a lower bound if there are any (`unfinished`).
    """

    policy: str
    rate_per_s: float
    utilization: float
    memory_utilization: float
    mean_batch: float
    tokens_per_s: float
    normalized_latency_ms: float
    arrived: int
    unfinished: int
    preemptions: int


@dataclass(slots=True)
class _Sums:
    """Integrals over the window, in slots, sequences and tokens times seconds."""

    seconds: float = 0.0
    held: float = 0.0
    reserved: float = 0.0
    running: float = 0.0
    tokens: int = 0


@dataclass(slots=True)
class _Stream:
    """The requests and their progress."""

    arriving: deque[Request]
    queue: deque[Request] = field(default_factory=deque)
    live: dict[Sequence, Request] = field(default_factory=dict)
    ends_s: dict[Request, float] = field(default_factory=dict)

    @property
    def idle(self) -> bool:
        """True if no request is running and none will arrive."""
        return not (self.arriving or self.queue or self.live)


def measure(
    model: LoadedModel,
    policy: str,
    shape: Shape,
    slots: int,
    requests: Iterable[Request],
    rate_per_s: float,
    window: Window,
    clock: Clock,
) -> Figures:
    """Runs the requests with `slots` token slots of KV memory under the policy of that name."""
    stream = _Stream(deque(requests))
    arrived = [request for request in stream.arriving if request.arrival_s >= window.warm_up_s]
    reservation = _reservation(policy, shape, slots)
    sums = _Sums()
    with Engine(model, _engine_options(model.layout(shape.block_tokens), policy, slots, len(stream.arriving))) as engine:
        engine.warm_up()
        began_ms = clock.now_ms()
        now_s = 0.0
        while not stream.idle and now_s < window.end_s + window.drain_s:
            _advance(engine, reservation, stream, now_s)
            tokens = engine.step()
            if not stream.live:
                time.sleep(_IDLE_S)
            end_s = (clock.now_ms() - began_ms) / 1e3
            _collect(reservation, stream, end_s)
            if window.warm_up_s <= now_s < window.end_s:
                _sample(sums, stream, reservation, end_s - now_s, len(tokens))
            now_s = end_s
        preemptions = engine.batching().preemptions
    assert preemptions == 0 or policy == "paged", "what is reserved is never taken away"
    ages_s = [stream.ends_s.get(request, now_s) - request.arrival_s for request in arrived]
    latencies_s = [age_s / request.output_tokens for age_s, request in zip(ages_s, arrived, strict=True)]
    return Figures(
        policy=policy,
        rate_per_s=rate_per_s,
        utilization=sums.held / max(sums.reserved, 1e-9),
        memory_utilization=sums.held / slots / max(sums.seconds, 1e-9),
        mean_batch=sums.running / max(sums.seconds, 1e-9),
        tokens_per_s=sums.tokens / max(sums.seconds, 1e-9),
        normalized_latency_ms=1e3 * fmean(latencies_s) if latencies_s else 0.0,
        arrived=len(arrived),
        unfinished=sum(request not in stream.ends_s for request in arrived),
        preemptions=preemptions,
    )


def _reservation(policy: str, shape: Shape, slots: int) -> Reservation:
    if policy == "contiguous_max":
        return ContiguousReservation(slots, lambda _: shape.total_max)
    if policy == "contiguous_known":
        return ContiguousReservation(slots, lambda request: request.total_tokens)
    return PagedReservation()


def _engine_options(layout: PageLayout, policy: str, slots: int, waiting_max: int) -> EngineOptions:
    blocks = slots // layout.block_tokens
    if policy != "paged":
        # A contiguous range need not consist of whole blocks; the engine's blocks do, and must not be the limit.
        blocks += _SEQUENCES_MAX
    return EngineOptions(
        pool_bytes=blocks * layout.page_bytes,
        block_tokens=layout.block_tokens,
        sequences_max=_SEQUENCES_MAX,
        waiting_max=max(waiting_max, 1),
    )


def _advance(engine: Engine, reservation: Reservation, stream: _Stream, now_s: float) -> None:
    """Starts requests that have arrived and get memory, first come, first served."""
    while stream.arriving and stream.arriving[0].arrival_s <= now_s:
        stream.queue.append(stream.arriving.popleft())
    while stream.queue and len(stream.live) < _SEQUENCES_MAX and reservation.reserve(stream.queue[0]):
        request = stream.queue.popleft()
        stream.live[engine.submit(request.prompt, SamplingParams(max_tokens=request.output_tokens))] = request


def _sample(sums: _Sums, stream: _Stream, reservation: Reservation, seconds: float, tokens: int) -> None:
    running = [sequence for sequence in stream.live if sequence.table is not None]
    sums.seconds += seconds
    sums.held += seconds * sum(sequence.computed_tokens for sequence in running)
    sums.reserved += seconds * reservation.reserved_slots(running)
    sums.running += seconds * len(running)
    sums.tokens += tokens


def _collect(reservation: Reservation, stream: _Stream, now_s: float) -> None:
    for sequence in [sequence for sequence in stream.live if sequence.finish_reason is not None]:
        request = stream.live.pop(sequence)
        reservation.release(request)
        stream.ends_s[request] = now_s
