"""The never-slower gate: a hit is claimed only if its pages are expected sooner than its tokens would be computed.

Owns: what the scheduler's process knows of the link and of this engine's prefill. The formula is `split.fetch_is_faster`.
Invariant: a hit is not claimed while the link is unknown. Thread-safe.
"""

from __future__ import annotations

import threading
from dataclasses import replace
from typing import Final

from attnstore.clock import Clock
from attnstore_worker.cache.planning.estimators import PrefillCost, PrefillEstimator
from attnstore_worker.cache.planning.link import LinkEstimator
from attnstore_worker.cache.planning.observation import Step, Unobserved
from attnstore_worker.cache.planning.split import Costs, Work, fetch_is_faster
from attnstore_worker.cache.store.transfer import Transfer, TransferKind

PREFILL_UNMEASURED: Final = PrefillCost(chunk_ms=0.0, token_ms=1 / 20, pair_ms=0.0)
"""20,000 tokens/s. Prefill counts as fast until it is measured, so that only a fetch that beats even a fast GPU is made."""
PROBE_MS: Final = 10_000.0
"""The link may have changed after so long without a load."""
_CHUNK_TOKENS_MIN: Final = 64
"""A step whose longest chunk is shorter is decoding."""


class Gate(Unobserved):
    """Learns from observations, and decides."""

    def __init__(self, clock: Clock) -> None:
        self._lock = threading.Lock()
        self._link = LinkEstimator(clock)
        self._prefill = PrefillEstimator()
        self._context_tokens_max = 0  # the longest context of a step that was learned from

    def transferred(self, transfer: Transfer) -> None:
        """Learns from loads and look-ups. Writes are ignored, because the two directions of a link may differ."""
        if transfer.failed or transfer.kind is TransferKind.WRITE:
            return
        with self._lock:
            self._link.observe(transfer.bytes, transfer.ended_ms - transfer.started_ms)

    def stepped(self, step: Step) -> None:
        """Learns from a step that computes prompts."""
        if max((end - begin for begin, end in step.chunks), default=0) >= _CHUNK_TOKENS_MIN:
            with self._lock:
                self._prefill.observe_step(step.chunks, step.ended_ms - step.started_ms)
                self._context_tokens_max = max(self._context_tokens_max, *(end for _, end in step.chunks))

    def fetch_pays(self, work: Work) -> bool:
        """Returns whether to fetch all hits of a prompt instead of computing them."""
        with self._lock:
            link, prefill = self._link.estimate(), self._prefill.estimate() or PREFILL_UNMEASURED
            if work.hit_end * work.block_tokens > self._context_tokens_max:
                prefill = replace(prefill, pair_ms=0.0)  # it grows with the square of a context: in doubt it costs nothing
        return link is not None and fetch_is_faster(Costs(link, prefill, slowdown=1.0), work)

    @property
    def is_stale(self) -> bool:
        """Returns whether the link was not measured for long, or never."""
        with self._lock:
            estimate = self._link.estimate()
        return estimate is None or estimate.age_ms > PROBE_MS
