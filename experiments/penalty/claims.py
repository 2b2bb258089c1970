"""The claims about the sweep, judged by its rows."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median
from typing import Any, Final

from rich import box
from rich.table import Table

_OVER_BETTER_MAX: Final = 1.10
_GAIN_MIN: Final = 1.3
_FAULT_MAX: Final = 1.25
_ERROR_MAX: Final = 0.15


def claims(rows: Sequence[dict[str, Any]]) -> Table:
    """Returns one line per claim that the rows can judge."""
    table = Table(box=box.SIMPLE_HEAD, title="What the sweep must show")
    for column in ("claim", "measured", "bound", "verdict"):
        table.add_column(column)
    for text, value, bound, met in _judged(rows):
        table.add_row(text, f"{value:.2f}", bound, "met" if met else "MISSED")
    return table


def cells(rows: Sequence[dict[str, Any]]) -> Table:
    """Returns the sweep, one line per cell."""
    table = Table(box=box.SIMPLE_HEAD, title="Time to the first token, ms (medians)")
    for column in ("RTT ms", "Gb/s", "tokens", "hits", "recompute", "fetch", "planner", "predicted", "choice", "/ better"):
        table.add_column(column, justify="right")
    for row in rows:
        if "fetch_ttft_ms" in row:
            times = [f"{row[name]:.0f}" for name in ("recompute_ttft_ms", "fetch_ttft_ms", "planner_ttft_ms", "predicted_ttft_ms")]
            cell = (f"{row['rtt_ms']:g}", f"{row['gbit_per_s']:g}", str(row["context_tokens"]), f"{row['hit_rate']:g}")
            table.add_row(*cell, *times, row["choice"], f"{_over_better(row):.2f}")
    return table


def _judged(rows: Sequence[dict[str, Any]]) -> list[tuple[str, float, str, bool]]:
    sweep = [row for row in rows if "fetch_ttft_ms" in row]
    faults = [row["planner_ttft_ms"] / row["recompute_ttft_ms"] for row in rows if "fault" in row]
    judged = []
    if sweep:
        worst, best = max(map(_over_better, sweep)), 1 / min(map(_over_better, sweep))
        error = median(abs(row["predicted_ttft_ms"] - row["planner_ttft_ms"]) / row["planner_ttft_ms"] for row in sweep)
        judged += [
            ("planner over the better way, worst cell", worst, f"<= {_OVER_BETTER_MAX}", worst <= _OVER_BETTER_MAX),
            ("times as fast as the better way, best cell", best, f">= {_GAIN_MIN}", best >= _GAIN_MIN),
            ("median error of predictions", error, f"<= {_ERROR_MAX}", error <= _ERROR_MAX),
        ]
    if faults:
        judged.append(("planner over recompute, worst failed link", max(faults), f"<= {_FAULT_MAX}", max(faults) <= _FAULT_MAX))
    return judged


def _over_better(row: dict[str, Any]) -> float:
    return float(row["planner_ttft_ms"] / min(row["recompute_ttft_ms"], row["fetch_ttft_ms"]))
