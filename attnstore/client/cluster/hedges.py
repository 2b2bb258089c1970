"""The budget of hedged reads: how often a cluster's client may also ask a second node because the first is late.

Owns: a token bucket. Invariants: pure; in any run of reads at most `HEDGES_BURST_MAX` plus `HEDGES_PERCENT_MAX` percent are hedged:
if all nodes are slow because they are busy, hedges would double their load (Dean and Barroso, The Tail at Scale, 2013, hedge 5% of
requests).
"""

from __future__ import annotations

from attnstore.limits import HEDGES_BURST_MAX, HEDGES_PERCENT_MAX


class HedgeBudget:
    """Belongs to the event loop of the client whose reads it counts."""

    def __init__(self) -> None:
        self._percents = 100 * HEDGES_BURST_MAX

    def read(self) -> None:
        """Counts a request for pages to a node."""
        self._percents = min(self._percents + HEDGES_PERCENT_MAX, 100 * HEDGES_BURST_MAX)

    def take(self) -> bool:
        """Returns whether another node may be asked too, and if so takes it from the budget."""
        if self._percents < 100:
            return False
        self._percents -= 100
        return True
