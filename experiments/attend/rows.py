"""The rows that the experiment writes: one per context, link and mode, with the prediction of the formula."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from rich.table import Table

MODES: Final = ("resident", "fetch_each_step", "attend", "attend_speculative", "shared_in_place")


@dataclass(frozen=True, slots=True)
class Row:
    """`model` is the real model's name, or the geometry of synthetic pages, for which only attention and transfers are timed.

    `tpot_ms` is the median time of a decoding step divided by its tokens. `ttft_ms` is None if no prompt was run, and
    `tokens_equal` if there are no tokens. `nodes` is the number of store nodes that held the pages. `predicted_ms` is the formula's
    `tpot_ms` (docs/attend.md) with `measured_rtt_ms`, that of a small message through the link beside the step's memory traffic. It
    is None if a figure that it needs was not measured. `resident_share` is the share of the context in the worker's pool.
    """

    model: str
    context_tokens: int
    rtt_ms: float
    gbit_per_s: float
    mode: str
    nodes: int
    tpot_ms: float
    ttft_ms: float | None
    bytes_per_token: float
    round_trips_per_token: float
    tokens_equal: bool | None
    accepted_per_step: float | None
    predicted_ms: float | None
    resident_share: float = 0.0
    measured_rtt_ms: float | None = None


def attend_ms(resident_ms: float, layers: int, rtt_ms: float, bytes_per_token: float, gbit_per_s: float) -> float:
    """The formula: the time of a resident step, plus per layer a round trip and the transfer of a query and its answer."""
    return resident_ms + layers * rtt_ms + bytes_per_token * 8 / (gbit_per_s * 1e6)


def fetch_ms(resident_ms: float, context_bytes: float, rtt_ms: float, gbit_per_s: float) -> float:
    """The formula: the time of a resident step, plus the transfer of the whole context."""
    return resident_ms + rtt_ms + context_bytes * 8 / (gbit_per_s * 1e6)


def table(rows: Sequence[Row]) -> Table:
    """Returns the rows as a table."""
    shown = Table(title="Decoding with the KV here, fetched, or attended to")
    for name in ("model", "context", "RTT ms", "measured", "Gb/s", "mode", "nodes", "ms/token", "predicted"):
        shown.add_column(name, justify="left" if name in ("model", "mode") else "right")
    for name in ("TTFT ms", "KB/token", "trips/token", "tokens equal", "accepted/step"):
        shown.add_column(name, justify="right")
    for row in rows:
        shown.add_row(
            row.model,
            str(row.context_tokens),
            f"{row.rtt_ms:g}",
            "" if row.measured_rtt_ms is None else f"{row.measured_rtt_ms:.2f}",
            f"{row.gbit_per_s:g}",
            row.mode + (f" ({row.resident_share:.0%} here)" if row.resident_share else ""),
            str(row.nodes),
            f"{row.tpot_ms:.1f}",
            "" if row.predicted_ms is None else f"{row.predicted_ms:.1f}",
            "" if row.ttft_ms is None else f"{row.ttft_ms:.0f}",
            f"{row.bytes_per_token / 1e3:.1f}",
            f"{row.round_trips_per_token:.1f}",
            {None: "", True: "yes", False: "NO"}[row.tokens_equal],
            "" if row.accepted_per_step is None else f"{row.accepted_per_step:.2f}",
        )
    return shown
