"""How often a cluster's client may ask a second node for what the first is late with.

Owns: the budget for that, a token bucket. Invariants: pure; over any run of reads no more than `HEDGES_BURST_MAX` of them, and
`HEDGES_PERCENT_MAX` percent, are hedged: where all nodes are slow because they are busy, hedges would double their load (Dean and
Barroso, The Tail at Scale, 2013, hedge 5% of requests).
"""

from __future__ import annotations

from attnstore.limits import HEDGES_BURST_MAX, HEDGES_PERCENT_MAX


class HedgeBudget:
    """Belongs to one event loop, as the client does whose reads it counts."""

    def __init__(self) -> None:
        self._percents = 100 * HEDGES_BURST_MAX

    def read(self) -> None:
        """A node is asked for pages."""
        self._percents = min(self._percents + HEDGES_PERCENT_MAX, 100 * HEDGES_BURST_MAX)

    def take(self) -> bool:
        """Whether another node may be asked for them as well, which is paid for then."""
        if self._percents < 100:
            return False
        self._percents -= 100
        return True
