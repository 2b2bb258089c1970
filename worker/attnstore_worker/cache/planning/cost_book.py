"""The measured costs of this worker, collected from all of its work.

Owns: `CostBook`, one estimator per cost behind one lock, and `CostReport`, a snapshot for people and metrics. Invariant: the cost
of computing is learned only from undisturbed steps; a step beside a load shows how much loads disturb.

SHARED and REMOTE are one store, and which of them a load reads from is known only afterwards: the next one is expected to read from
the tier of the last read. A question costs the same in both.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, field, replace

from attnstore.clock import Clock
from attnstore_worker.cache.planning.estimators import DurationEstimator, FactorEstimator, PrefillCost, PrefillEstimator
from attnstore_worker.cache.planning.link import LinkEstimate, LinkEstimator
from attnstore_worker.cache.planning.observation import Step
from attnstore_worker.cache.planning.split import Costs
from attnstore_worker.cache.pool.tier import Tier
from attnstore_worker.cache.store.transfer import Transfer, TransferKind

_SLOWDOWN_PRIOR = 1.1
_BEHIND_PRIOR = 1.1
_ATTENDING_PRIOR = 1.0
_ATTENDING_LEAST = 0.25
_ATTENDING_MOST = 64.0


@dataclass(frozen=True, slots=True)
class AttendCosts:
    """The cost of a step whose keys are partly at store nodes. `factor`: how many times longer than `step_ms` it takes, which
    includes slow or busy nodes. `resident_step_ms` is the time of a step without remote keys.
    """

    resident_step_ms: float
    round_trip_ms: float
    bytes_per_ms: float
    factor: float

    def step_ms(self, compute_ms: float, round_trips: int, size_bytes: int) -> float:
        """Returns the time of a step that computes for `compute_ms` and moves that many bytes in that many sequential exchanges."""
        return self.factor * (compute_ms + round_trips * self.round_trip_ms + size_bytes / self.bytes_per_ms)


@dataclass(frozen=True, slots=True)
class CostReport:
    """The known costs; None for unknown ones. `links` has the tiers that were read from, `copies` those whose pages were copied up
    to a device.
    """

    links: dict[Tier, LinkEstimate] = field(default_factory=dict)
    prefill: PrefillCost | None = None
    decode_ms: float | None = None
    slowdown: float = _SLOWDOWN_PRIOR
    behind: float = _BEHIND_PRIOR
    attend: AttendCosts | None = None
    copies: dict[Tier, LinkEstimate] = field(default_factory=dict)

    def prefill_tokens_per_s(self, tokens: int, chunk_tokens: int) -> float | None:
        """Returns the rate at which a prompt of that many tokens is computed."""
        span_ms = self.prefill.span(0, tokens, chunk_tokens) if self.prefill is not None else 0.0
        return tokens * 1e3 / span_ms if span_ms > 0 else None


class CostBook:
    """Thread-safe."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._links: dict[Tier, LinkEstimator] = {}
        self._copies: dict[Tier, LinkEstimator] = {}
        self._layer_copies: dict[Tier, LinkEstimator] = {}
        self._read_from = Tier.REMOTE
        self._prefill = PrefillEstimator()
        self._decode = DurationEstimator()
        self._slowdown = FactorEstimator(_SLOWDOWN_PRIOR)
        self._behind = FactorEstimator(_BEHIND_PRIOR)
        self._round_trip = DurationEstimator()
        self._attending = FactorEstimator(_ATTENDING_PRIOR, least=_ATTENDING_LEAST, most=_ATTENDING_MOST)

    def transferred(self, transfer: Transfer) -> None:
        """Learns from a call to a tier. Writes are ignored, because the two directions of a link may differ."""
        with self._lock:
            if transfer.kind is TransferKind.ATTEND:
                self._round_trip.observe(transfer.ended_ms - transfer.started_ms)
            elif transfer.kind is TransferKind.COPY:
                self._observe(self._copies, transfer.tier, transfer)
            elif transfer.kind is TransferKind.COPY_LAYERS:
                self._observe(self._layer_copies, transfer.tier, transfer)
            elif transfer.kind is TransferKind.MATCH:
                for tier in {*self._links, transfer.tier}:
                    self._observe(self._links, tier, transfer)
            elif transfer.kind is TransferKind.READ:
                if transfer.bytes:
                    self._read_from = transfer.tier
                self._observe(self._links, transfer.tier, transfer)

    def stepped(self, step: Step, *, disturbed: bool) -> None:
        """Learns from a step of one sequence. `disturbed`: a load ran beside it."""
        if len(step.chunks) != 1:
            return
        (begin, end), elapsed_ms = step.chunks[0], step.ended_ms - step.started_ms
        with self._lock:
            known = self._prefill.estimate()
            if step.round_trips:
                self._attended(step, decodes=end - begin == 1)
            elif end - begin == 1:
                self._decode.observe(elapsed_ms)
            elif disturbed and known is not None:
                self._slowdown.observe(elapsed_ms, known.chunk(begin, end))
            else:
                self._prefill.observe(begin, end, elapsed_ms)

    def computed_behind(self, measured_ms: float, expected_ms: float) -> None:
        """Learns from a prompt whose chunk was computed after arriving pages; `expected_ms` is the prediction of the formula."""
        with self._lock:
            self._behind.observe(measured_ms, expected_ms)

    def costs(self) -> Costs | None:
        """Returns the costs for a planner; None while the link or computing is unknown."""
        with self._lock:
            link = self._store_link()
            prefill = self._prefill.estimate()
            if link is None or prefill is None:
                return None
            costs = Costs(link, prefill, self._slowdown.estimate(), self._behind.estimate())
            if self._read_from is not Tier.REMOTE:  # reads from SHARED are copies
                return costs
            return replace(costs, copy=_estimate(self._copies, Tier.REMOTE), layer_copy=_estimate(self._layer_copies, Tier.REMOTE))

    def host_copy_ms(self, size_bytes: int) -> float:
        """Returns the time to copy that many bytes from HOST to a device; 0 if nothing is known of such copies."""
        with self._lock:
            copy = _estimate(self._copies, Tier.HOST)
            return copy.transfer_ms(size_bytes) if copy is not None and size_bytes else 0.0

    def report(self) -> CostReport:
        """A snapshot."""
        with self._lock:
            links, copies = _known(self._links), _known(self._copies)
            factors = self._slowdown.estimate(), self._behind.estimate()
            return CostReport(links, self._prefill.estimate(), self._decode.estimate(), *factors, self._attend_costs(), copies)

    def attend_costs(self) -> AttendCosts | None:
        """Returns the costs of attending at nodes; None while a link, a round trip or a step of this worker's own is unknown."""
        with self._lock:
            return self._attend_costs()

    def _observe(self, estimators: dict[Tier, LinkEstimator], tier: Tier, transfer: Transfer) -> None:
        estimator = estimators.setdefault(tier, LinkEstimator(self._clock))
        if transfer.bytes or not transfer.failed:
            estimator.observe(transfer.bytes, transfer.ended_ms - transfer.started_ms)
        else:
            estimator.forget()

    def _store_link(self) -> LinkEstimate | None:
        return _estimate(self._links, self._read_from)

    def _attend_costs(self) -> AttendCosts | None:
        link = self._store_link()
        round_trip_ms, decode_ms = self._round_trip.estimate(), self._decode.estimate()
        if link is None or round_trip_ms is None or decode_ms is None:
            return None
        return AttendCosts(decode_ms, round_trip_ms, link.bytes_per_ms, self._attending.estimate())

    def _attended(self, step: Step, *, decodes: bool) -> None:
        costs = self._attend_costs()
        if decodes and costs is not None:
            formula = replace(costs, factor=1.0)
            expected_ms = formula.step_ms(costs.resident_step_ms, step.round_trips, step.attend_bytes)
            self._attending.observe(step.ended_ms - step.started_ms, expected_ms)


def _estimate(estimators: dict[Tier, LinkEstimator], tier: Tier) -> LinkEstimate | None:
    return estimators[tier].estimate() if tier in estimators else None


def _known(estimators: dict[Tier, LinkEstimator]) -> dict[Tier, LinkEstimate]:
    return {tier: estimate for tier in estimators if (estimate := _estimate(estimators, tier)) is not None}
