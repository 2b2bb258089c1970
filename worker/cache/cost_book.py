"""What this worker knows of its costs, gathered from everything that it does.

Owns: `CostBook`, one estimator for each cost behind one lock, and `CostReport`, a snapshot for people and metrics. Invariant: only
what ran undisturbed teaches the cost of computing; a step beside a load teaches how much loads disturb.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, field

from attnstore.client.link_estimator import LinkEstimate, LinkEstimator
from attnstore.clock import Clock
from worker.cache.estimators import DurationEstimator, FactorEstimator, PrefillCost, PrefillEstimator
from worker.cache.observation import Step, Transfer, TransferKind
from worker.cache.planner import Costs

REMOTE = "remote"
"""The tier at the other end of the network."""
_SLOWDOWN_PRIOR = 1.1
_BEHIND_PRIOR = 1.1


@dataclass(frozen=True, slots=True)
class CostReport:
    """What is known now; None where nothing is. `links` has the tiers that were read from, by name."""

    links: dict[str, LinkEstimate] = field(default_factory=dict)
    prefill: PrefillCost | None = None
    decode_ms: float | None = None
    slowdown: float = _SLOWDOWN_PRIOR
    behind: float = _BEHIND_PRIOR

    def prefill_tokens_per_s(self, tokens: int, chunk_tokens: int) -> float | None:
        """The rate at which a prompt of so many tokens is computed."""
        span_ms = self.prefill.span(0, tokens, chunk_tokens) if self.prefill is not None else 0.0
        return tokens * 1e3 / span_ms if span_ms > 0 else None


class CostBook:
    """Thread-safe."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._links: dict[str, LinkEstimator] = {}
        self._prefill = PrefillEstimator()
        self._decode = DurationEstimator()
        self._slowdown = FactorEstimator(_SLOWDOWN_PRIOR)
        self._behind = FactorEstimator(_BEHIND_PRIOR)

    def transferred(self, transfer: Transfer) -> None:
        """Learns from a call to a tier. Writes teach nothing: links need not be alike in both directions."""
        if transfer.kind is TransferKind.WRITE:
            return
        with self._lock:
            link = self._links.setdefault(transfer.tier, LinkEstimator(self._clock))
            if transfer.bytes or not transfer.failed:
                link.observe(transfer.bytes, transfer.ended_ms - transfer.started_ms)
            else:
                link.forget()

    def stepped(self, step: Step, *, loads: int) -> None:
        """Learns from a step of one sequence, beside so many loads."""
        if len(step.chunks) != 1:
            return
        (begin, end), elapsed_ms = step.chunks[0], step.ended_ms - step.started_ms
        with self._lock:
            known = self._prefill.estimate()
            if end - begin == 1:
                self._decode.observe(elapsed_ms)
            elif loads and known is not None:
                self._slowdown.observe(elapsed_ms, known.chunk(begin, end))
            else:
                self._prefill.observe(begin, end, elapsed_ms)

    def computed_behind(self, measured_ms: float, expected_ms: float) -> None:
        """A prompt whose chunk ran behind arriving pages took so long; `expected_ms` is what the formula says."""
        with self._lock:
            self._behind.observe(measured_ms, expected_ms)

    def costs(self) -> Costs | None:
        """What a planner reckons with; None as long as the link or computing is unknown."""
        with self._lock:
            link = self._links[REMOTE].estimate() if REMOTE in self._links else None
            prefill = self._prefill.estimate()
            if link is None or prefill is None:
                return None
            return Costs(link, prefill, self._slowdown.estimate(), self._behind.estimate())

    def report(self) -> CostReport:
        """A snapshot."""
        with self._lock:
            links = {tier: estimate for tier, link in self._links.items() if (estimate := link.estimate()) is not None}
            factors = self._slowdown.estimate(), self._behind.estimate()
            return CostReport(links, self._prefill.estimate(), self._decode.estimate(), *factors)
