"""Tables of the report, as text that the page escapes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from experiments.report.rows import Fault
from experiments.report.style import duration, rate


@dataclass(frozen=True, slots=True)
class Table:
    """The first cell of each line is its name."""

    title: str
    caption: str
    header: tuple[str, ...]
    lines: tuple[tuple[str, ...], ...]


def faults(rows: Sequence[Fault]) -> Table:
    """Returns the cost of a link that fails during a fetch."""
    return Table(
        "A link that fails in the middle of a fetch",
        "The planner notices, gives the fetch up and computes; the last column is that time over computing everything at once.",
        ("fault", "link", "context", "recompute", "planner", "planner / recompute"),
        tuple(
            (
                row.fault,
                f"{rate(row.gbit_per_s)}, {row.rtt_ms:g} ms",
                f"{row.context_tokens:,}",
                duration(row.recompute_ttft_ms),
                duration(row.planner_ttft_ms),
                f"{row.over_recompute:.2f}",
            )
            for row in rows
        ),
    )
