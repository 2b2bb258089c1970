"""The bounds on the sweep, each judged by the rows.

Owns: the bounds. Invariant: a bound without rows is reported as not measured, never as met.
"""

from __future__ import annotations

from statistics import median

from experiments.bandwidth.claims import Claim
from experiments.report.rows import FirstToken, Results
from experiments.report.style import duration, rate

_OVER_BETTER_MAX = 1.10
_BEATS_BOTH_MIN = 1.3
_ERROR_MAX = 0.15
_FAULT_MAX = 1.25


def findings(results: Results) -> list[Claim]:
    """Returns the bounds on planner, predictions and faults."""
    cells = results.first_tokens
    collapses = [fault.over_recompute for fault in results.faults]
    return [
        Claim(
            "planner's TTFT over the better of fetch and recompute, in the worst cell",
            max((cell.over_better for cell in cells), default=None),
            _OVER_BETTER_MAX,
            at_most=True,
        ),
        Claim(
            "the better of the two over the planner's TTFT, in the best cell",
            max((1 / cell.over_better for cell in cells), default=None),
            _BEATS_BOTH_MIN,
        ),
        Claim(
            "median error of predictions",
            median(cell.error for cell in cells) * 100 if cells else None,
            _ERROR_MAX * 100,
            at_most=True,
            unit="%",
        ),
        Claim("link fails in mid-fetch: TTFT over recomputing, at worst", max(collapses, default=None), _FAULT_MAX, at_most=True),
    ]


def summary(results: Results) -> list[str]:
    """Returns sentences on what was measured."""
    cells = results.first_tokens
    if not cells:
        return []
    faster = sum(cell.penalty < 1 for cell in cells)
    best, worst = min(cells, key=lambda cell: cell.penalty), max(cells, key=lambda cell: cell.penalty)
    slower = sum(cell.over_better > _OVER_BETTER_MAX for cell in cells)
    both = sum(cell.over_better < 1 for cell in cells)
    near = f"{len(cells) - slower} of {len(cells)}"
    return [
        f"Fetching beats recomputing in {faster} of {len(cells)} cells.",
        f"At best it takes {_told(best)}; at worst {_told(worst)}.",
        f"The planner is within {_OVER_BETTER_MAX - 1:.0%} of the better way in {near} cells, and faster than both in {both}.",
    ]


def _told(cell: FirstToken) -> str:
    where = f"{rate(cell.gbit_per_s)}, {cell.rtt_ms:g} ms round trip, {cell.context_tokens:,} tokens, hit rate {cell.hit_rate:.0%}"
    return f"{duration(cell.fetch_ttft_ms)} for {duration(cell.recompute_ttft_ms)} ({where})"
