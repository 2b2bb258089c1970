"""The style of every figure: colours that colour-blind readers can distinguish, axes with units.

Owns: the palette (Okabe and Ito, 2008), the fonts, and the conversion of a figure to a file. Invariant: colour alone never carries
information; markers differ, or lines are labelled.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter, NullLocator

BLUE, ORANGE, GREEN, VERMILLION, PURPLE, SKY, GREY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#6b6b6b"

pyplot.rcParams.update(
    {
        "font.family": "DejaVu Sans",
        "font.size": 10,
        "axes.titlesize": 10.5,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "grid.color": "#dddddd",
        "grid.linewidth": 0.6,
        "axes.axisbelow": True,
        "lines.linewidth": 1.8,
        "lines.markersize": 5,
        "legend.frameon": False,
        "svg.fonttype": "path",
        # Equal figures give equal files, so that a committed report changes only where its figures do.
        "svg.hashsalt": "attnstore",
    }
)


@dataclass(frozen=True, slots=True)
class Picture:
    """One figure of the report. `name` is the stem of its file; `caption` says what it shows."""

    name: str
    title: str
    caption: str
    figure: Figure


def rate(gbit_per_s: float) -> str:
    """Returns `10 Gb/s`, `250 Mb/s`."""
    return f"{gbit_per_s:g} Gb/s" if gbit_per_s >= 1 else f"{gbit_per_s * 1000:g} Mb/s"


def duration(milliseconds: float) -> str:
    """Returns at most three digits: `1.2 s`, `340 ms`."""
    return f"{milliseconds / 1000:.3g} s" if milliseconds >= 1000 else f"{milliseconds:.3g} ms"


def log_rates(axes: Axes, gbit_per_s: list[float]) -> None:
    """Makes a logarithmic axis of bandwidths with a tick at each measured one."""
    axes.set_xscale("log")
    axes.set_xticks(gbit_per_s, [rate(each) for each in gbit_per_s])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("bandwidth")


def log_times(axes: Axes, label: str) -> None:
    """Makes a logarithmic axis of times in milliseconds."""
    axes.set_yscale("log")
    spell(axes.yaxis, duration)
    axes.set_ylabel(label)


def spell(axis: Axis, words: Callable[[float], str]) -> None:
    """Labels a logarithmic axis in words. Labels values between powers of ten only if there are few powers."""
    axis.set_major_formatter(_Spelled(words, labelOnlyBase=False, minor_thresholds=(1.5, 0.5)))
    axis.set_minor_formatter(_Spelled(words, labelOnlyBase=False, minor_thresholds=(1.5, 0.5)))


class _Spelled(LogFormatter):
    """Replaces the non-empty labels of `LogFormatter` by words."""

    def __init__(self, words: Callable[[float], str], **options: Any) -> None:
        super().__init__(**options)
        self._words = words

    def __call__(self, x: float, pos: int | None = None) -> str:
        # Ticks are computed as powers of ten and have rounding errors.
        return self._words(float(f"{x:.3g}")) if super().__call__(x, pos) else ""
