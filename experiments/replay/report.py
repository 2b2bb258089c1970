"""The replays as a table: a row per policy, a column per capacity, the upper bound below.

Owns: the display of figures. Invariant: every figure shown is one of a `Replay`.
"""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.table import Table

from experiments.replay.hash_only import UNLIMITED, Capacity, Replay
from experiments.replay.trace import Trace

LOOK_AHEAD = "look-ahead"


def label(replay: Replay) -> str:
    """Returns the policy, with its queue if that matters."""
    return f"{replay.policy}, {replay.queue_depth} waiting" if replay.policy == LOOK_AHEAD else replay.policy


def capacity_label(capacity: Capacity) -> str:
    """Returns `3M` for three million tokens."""
    if capacity == UNLIMITED:
        return "unlimited"
    return f"{capacity / 1e6:g}M" if capacity >= 100_000 else f"{capacity:,}"


def summary(trace: Trace) -> str:
    """Returns one line on what was replayed."""
    return f"{len(trace.requests):,} requests, {trace.blocks:,} prompt blocks, {trace.requests_per_s:.2f} requests/s"


def table(replays: Sequence[Replay]) -> Table:
    """Returns block hits in percent of all prompt blocks; the last row is the bound."""
    capacities = list(dict.fromkeys(replay.capacity_tokens for replay in replays))
    rendered = Table(box=box.SIMPLE_HEAD, title="Block hits, % (capacity in tokens)")
    rendered.add_column("policy")
    for capacity in capacities:
        rendered.add_column(capacity_label(capacity), justify="right")
    rates = {(label(replay), replay.capacity_tokens): replay.hit_rate_blocks for replay in replays}
    for name in dict.fromkeys(map(label, replays)):
        rendered.add_row(name, *(f"{100 * rates[name, capacity]:.1f}" for capacity in capacities))
    bounds = {replay.capacity_tokens: replay.bound_hit_rate_blocks for replay in replays}
    rendered.add_section()
    rendered.add_row("ceiling (Belady, offline)", *(f"{100 * bounds[capacity]:.1f}" for capacity in capacities))
    return rendered
