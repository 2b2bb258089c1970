"""The never-slower gate: of a hit that part is claimed with which the first token is expected soonest.

Owns: what the scheduler's process knows of the link and of this engine's steps. The formula is `split.best_lead`.
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
from attnstore_worker.cache.planning.split import Costs, Work, best_lead
from attnstore_worker.cache.store.transfer import Transfer, TransferKind

PREFILL_UNMEASURED: Final = PrefillCost(chunk_ms=0.0, token_ms=1 / 20, pair_ms=0.0)
"""20,000 tokens/s. Prefill counts as fast until it is measured, so that only a fetch that beats even a fast GPU is made."""
PROBE_MS: Final = 10_000.0
"""The link may have changed after so long without a load."""
_CHUNK_TOKENS_MIN: Final = 64
"""A shorter chunk is decoding, with or without drafts, or the end of a prompt."""


class Gate(Unobserved):
    """Learns from observations, and decides. No load is expected to take longer than `load_ms_max`."""

    def __init__(self, clock: Clock, *, load_ms_max: float) -> None:
        self._load_ms_max = load_ms_max
        self._lock = threading.Lock()
        self._link = LinkEstimator(clock)
        self._prefill = PrefillEstimator()
        self._decode = PrefillEstimator()
        self._context_tokens_max = 0  # the longest context of a prompt that was learned from

    def transferred(self, transfer: Transfer) -> None:
        """Learns from loads and look-ups. Writes are ignored, because the two directions of a link may differ, and copies to a
        device do not use it.
        """
        if transfer.failed or transfer.kind not in (TransferKind.MATCH, TransferKind.READ):
            return
        with self._lock:
            self._link.observe(transfer.bytes, transfer.ended_ms - transfer.started_ms)

    def stepped(self, step: Step) -> None:
        """Learns from a step what prompts cost, or what decoding costs.

        The attention of decoding is bound by memory: a token costs many times more than one of a prompt with as long a context.
        Where a step does both, that part is subtracted; while it is unknown, the step teaches nothing.
        """
        prompts = [chunk for chunk in step.chunks if chunk[1] - chunk[0] >= _CHUNK_TOKENS_MIN]
        decodes = [chunk for chunk in step.chunks if chunk[1] - chunk[0] < _CHUNK_TOKENS_MIN]
        elapsed_ms = step.ended_ms - step.started_ms
        with self._lock:
            if not prompts:
                self._decode.observe_step(decodes, elapsed_ms)
                return
            if decodes:
                decoding = self._decode.estimate()
                if decoding is None:
                    return
                without_context = replace(decoding, chunk_ms=0.0, token_ms=0.0)
                elapsed_ms -= sum(without_context.chunk(begin, end) for begin, end in decodes)
            self._prefill.observe_step((*prompts, *((0, end - begin) for begin, end in decodes)), elapsed_ms)
            self._context_tokens_max = max(self._context_tokens_max, *(end for _, end in prompts))

    def blocks_to_fetch(self, work: Work) -> int:
        """Returns how many of the hits of a prompt to fetch, from the first one on, instead of computing them."""
        with self._lock:
            link, prefill = self._link.estimate(), self._prefill.estimate() or PREFILL_UNMEASURED
            seen = self._context_tokens_max // work.block_tokens
        if link is None:
            return 0
        costs = Costs(link, prefill, slowdown=1.0)
        leads = [best_lead(costs, replace(work, hit_end=min(work.hit_end, max(work.front, seen))), self._load_ms_max)]
        if work.hit_end > seen:  # attention grows with the square of a context: where none was seen, in doubt it costs nothing
            leads.append(best_lead(replace(costs, prefill=replace(prefill, pair_ms=0.0)), work, self._load_ms_max))
        best = max(leads, key=lambda lead: lead.recompute_ms - lead.slow_ms(link))
        return best.work.back - best.meet

    @property
    def is_stale(self) -> bool:
        """Returns whether the link was not measured for long, or never."""
        with self._lock:
            estimate = self._link.estimate()
        return estimate is None or estimate.age_ms > PROBE_MS
