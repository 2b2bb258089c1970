"""The never-slower gate: a hit is claimed only where fetching its pages is expected to beat recomputing their tokens.

Owns: what is known of the link and of this engine's prefill. Invariant: in doubt a hit is not claimed. Not thread-safe.
"""

from __future__ import annotations

from collections import deque
from statistics import median
from typing import Final

from attnstore.clock import Clock
from attnstore_worker.cache.planning.link import LinkEstimator
from attnstore_worker.vllm.plan import Costs

PREFILL_TOKENS_PER_S_UNMEASURED: Final = 20_000.0
"""Until prefill has been measured it is taken to be fast, so that only a fetch that beats even a fast GPU is made."""
PROBE_MS: Final = 10_000.0
"""After so long without a load the link may have changed."""
_STEP_TOKENS_MIN: Final = 64
"""Smaller steps are decoding."""
_STEPS: Final = 32


class Gate:
    """Learns from what workers measured, and decides."""

    def __init__(self, clock: Clock) -> None:
        self._link = LinkEstimator(clock)
        self._ms_per_token: deque[float] = deque(maxlen=_STEPS)

    def learn(self, costs: Costs) -> None:
        """Takes measurements in."""
        for size_bytes, elapsed_ms in costs.loads:
            self._link.observe(size_bytes, elapsed_ms)
        for tokens, elapsed_ms in costs.steps:
            if tokens >= _STEP_TOKENS_MIN and elapsed_ms > 0:
                self._ms_per_token.append(elapsed_ms / tokens)

    def answered(self, elapsed_ms: float) -> None:
        """A look-up, which moves no page, took so long."""
        self._link.observe(0, elapsed_ms)

    def fetch_pays(self, tokens: int, size_bytes: int) -> bool:
        """Whether `size_bytes` are expected sooner than their `tokens` would be computed, even if the link is at its slowest."""
        estimate = self._link.estimate()
        return estimate is not None and estimate.transfer_ms_high(size_bytes) < self.prefill_ms(tokens)

    @property
    def is_stale(self) -> bool:
        """The link was never measured, or long ago."""
        estimate = self._link.estimate()
        return estimate is None or estimate.age_ms > PROBE_MS

    def prefill_ms(self, tokens: int) -> float:
        """How long this engine computes so many tokens."""
        ms_per_token = median(self._ms_per_token) if self._ms_per_token else 1000 / PREFILL_TOKENS_PER_S_UNMEASURED
        return tokens * ms_per_token
