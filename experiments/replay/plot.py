"""The plot of a run: hit rate over capacity, a curve for each policy, and the upper bound.

Owns: the drawing. Invariant: it shows only the figures of the table.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot
from matplotlib.figure import Figure

from experiments.replay.hash_only import UNLIMITED, Replay
from experiments.replay.report import label


def save_plot(replays: Sequence[Replay], path: Path) -> None:
    """Writes a PNG."""
    figure = draw(replays)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def draw(replays: Sequence[Replay]) -> Figure:
    """Draws hit rate over capacity. An unlimited capacity has no place on the axis; it is the line at the top."""
    figure, axes = pyplot.subplots(figsize=(8, 5), layout="constrained")
    finite = [replay for replay in replays if replay.capacity_tokens != UNLIMITED]
    for name in dict.fromkeys(map(label, finite)):
        own = sorted((replay for replay in finite if label(replay) == name), key=lambda replay: replay.capacity_blocks)
        axes.plot([_tokens(replay) for replay in own], [replay.hit_rate_blocks * 100 for replay in own], marker="o", label=name)
    bounds = sorted({(_tokens(replay), replay.bound_hit_rate_blocks * 100) for replay in finite})
    axes.plot(*zip(*bounds, strict=True), color="0.3", linestyle="--", label="ceiling (Belady, offline)")
    for replay in (replay for replay in replays if replay.capacity_tokens == UNLIMITED):
        axes.axhline(replay.hit_rate_blocks * 100, color="0.7", linewidth=1)
    axes.set_xscale("log")
    axes.set_ylim(bottom=0)
    axes.set_xlabel("capacity, tokens")
    axes.set_ylabel("block hits, %")
    axes.grid(alpha=0.3)
    axes.legend()
    return figure


def _tokens(replay: Replay) -> float:
    return float(replay.capacity_tokens)
