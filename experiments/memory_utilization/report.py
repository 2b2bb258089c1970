"""The results of a run as JSON and as tables.

Owns: `as_json`, `summary_table`, `sweep_table` and `sustained_rate`. Invariant: every figure shown was measured in this run.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import Any

from rich import box
from rich.table import Table

from experiments.memory_utilization.measure import POLICIES, Figures


def as_json(overload: Iterable[Figures], sweep: Sequence[Figures], setting: dict[str, Any]) -> dict[str, Any]:
    """Returns an object for each policy, the parameters, and the sweep."""
    figures = {each.policy: asdict(each) for each in overload}
    return {**figures, "setting": setting, "sweep": [asdict(each) for each in sweep]}


def summary_table(overload: Sequence[Figures]) -> Table:
    """Returns the figures of every policy with more requests than it can serve."""
    rendered = Table(box=box.SIMPLE_HEAD, title="Requests always waiting; slots that hold tokens, of those reserved and of all")
    for heading in ("", "of reserved", "of memory", "batch", "tokens/s", "against max"):
        rendered.add_column(heading, justify="right" if heading else "left")
    slowest = overload[0].tokens_per_s
    for each in overload:
        rendered.add_row(
            each.policy,
            f"{each.utilization:.1%}",
            f"{each.memory_utilization:.1%}",
            f"{each.mean_batch:.1f}",
            f"{each.tokens_per_s:.0f}",
            f"{each.tokens_per_s / slowest:.2f}x",
        )
    return rendered


def sweep_table(sweep: Sequence[Figures]) -> Table:
    """Returns normalized latency over the rate of requests; `>` marks a lower bound."""
    rendered = Table(box=box.SIMPLE_HEAD, title="Normalized latency, ms per output token")
    rendered.add_column("requests/s")
    for policy in POLICIES:
        rendered.add_column(policy, justify="right")
    cells = {(each.policy, each.rate_per_s): f"{'> ' if each.unfinished else ''}{each.normalized_latency_ms:.0f}" for each in sweep}
    for rate_per_s in dict.fromkeys(each.rate_per_s for each in sweep):
        rendered.add_row(f"{rate_per_s:g}", *(cells[policy, rate_per_s] for policy in POLICIES))
    return rendered


def sustained_rate(sweep: Iterable[Figures], policy: str, latency_ms: float) -> float | None:
    """Returns the highest rate at which, as at all lower rates, every request finished and the normalized latency stayed within the
    limit.
    """
    sustained = None
    for each in sorted((each for each in sweep if each.policy == policy), key=lambda each: each.rate_per_s):
        if each.unfinished or each.normalized_latency_ms > latency_ms:
            break
        sustained = each.rate_per_s
    return sustained
