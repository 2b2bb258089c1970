"""The plot of a run: throughput over batch size, our transports and the peers as curves, the machine's limits as lines."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.bandwidth.report import LIMITS, TRANSPORTS
from experiments.bandwidth.results import Row

_NOT_GREY = (0, 1, 2, 3, 4, 5, 6, 8, 9)
"""Of matplotlib's ten colours; grey is for the limits."""
_COLOR = {name: f"C{index}" for index, name in zip(_NOT_GREY, (name for name in TRANSPORTS if name not in LIMITS), strict=True)}
_LIMIT_STYLE = {"memcpy": "-", "raw_tcp": "--", "iperf3": "-.", "grpc_bare": ":"}


def save_plot(rows: Sequence[Row], path: Path) -> None:
    """Writes a PNG."""
    figure = draw(rows)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def draw(rows: Sequence[Row]) -> Figure:
    """Draws one panel for each operation and page size."""
    sizes = sorted({row["page_bytes"] for row in rows})
    figure, panels = pyplot.subplots(len(sizes), 2, figsize=(13, 5.2 * len(sizes)), squeeze=False, layout="constrained")
    for line, page_bytes in zip(panels, sizes, strict=True):
        for panel, op in zip(line, ("read", "write"), strict=True):
            own = [row for row in rows if (row["page_bytes"], row["op"]) == (page_bytes, op)]
            if own:
                _draw(panel, own)
                panel.set_title(f"{op}, pages of {page_bytes:,} B")
            else:
                panel.set_axis_off()
    figure.suptitle("Throughput on loopback, medians over rounds; grey: the machine's limits")
    return figure


def _draw(panel: Axes, rows: Sequence[Row]) -> None:
    for name in TRANSPORTS:
        own = sorted((row for row in rows if row["transport"] == name), key=lambda row: row["batch"])
        if not own or name == "shm_in_place":  # moves nothing, so there is no bandwidth to draw
            continue
        batches, speeds = [row["batch"] for row in own], [row["gb_per_s"] for row in own]
        if name in LIMITS:
            best = max(speeds)
            panel.axhline(best, color="0.45", linestyle=_LIMIT_STYLE[name], linewidth=1.3, label=f"{name} (limit) {best:.1f}")
        else:
            panel.plot(batches, speeds, marker="o", color=_COLOR[name], label=name)
    panel.set_xscale("log", base=2)
    panel.set_xticks(ticks := sorted({row["batch"] for row in rows}), [str(tick) for tick in ticks])
    panel.set_ylim(bottom=0)
    panel.set_xlabel("pages in one call")
    panel.set_ylabel("GB/s")
    panel.grid(alpha=0.3)
    panel.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
