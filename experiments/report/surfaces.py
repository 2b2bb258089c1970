"""Penalty surfaces over bandwidth and round trip: fetching against recomputing, and the result of the planner."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.image import AxesImage

from experiments.report.rows import FirstToken
from experiments.report.style import Picture, rate

_PANELS_MAX = 4
_RATIO_SHOWN_MAX = 16.0
"""The colour scale ends there; the numbers in the cells do not."""
_DARK = 0.55


def penalty_surface(cells: Sequence[FirstToken]) -> Picture:
    """Draws fetch over recompute, at the highest measured hit rate."""
    hit = max(cell.hit_rate for cell in cells)
    figure = _figure(
        [cell for cell in cells if cell.hit_rate == hit], lambda cell: cell.penalty, "fetch TTFT / recompute TTFT", border=True
    )
    return Picture(
        "penalty",
        f"What the network costs: fetching against recomputing (hit rate {hit:.0%})",
        "Time to first token when every hit is fetched, over the time when nothing is. Purple cells (below 1): the network is the "
        "better memory. Orange cells: fetching makes the request slower. The black line is the crossover.",
        figure,
    )


def planner_surface(cells: Sequence[FirstToken]) -> Picture:
    """Draws the planner over the faster of the two simple ways."""
    hit = max(cell.hit_rate for cell in cells)
    chosen = [cell for cell in cells if cell.hit_rate == hit]
    figure = _figure(chosen, lambda cell: cell.over_better, "planner TTFT / better of the two", border=False)
    return Picture(
        "planner",
        f"What the planner makes of it (hit rate {hit:.0%})",
        "The planner's time to first token over the better of fetching and recomputing, which it does not know beforehand. At 1 it "
        "chose as well as possible; below 1 it beat both, by computing from the front while fetching from the back.",
        figure,
    )


def spread(values: Sequence[float], count: int) -> list[float]:
    """Returns at most `count` of the sorted distinct values, evenly spread, including both ends."""
    distinct = sorted(set(values))
    if len(distinct) <= count:
        return distinct
    return [distinct[round(index * (len(distinct) - 1) / (count - 1))] for index in range(count)]


def _figure(cells: Sequence[FirstToken], value: Callable[[FirstToken], float], label: str, *, border: bool) -> Figure:
    contexts = spread([cell.context_tokens for cell in cells], _PANELS_MAX)
    rates = sorted({cell.gbit_per_s for cell in cells})
    round_trips = sorted({cell.rtt_ms for cell in cells})
    limit = min(_RATIO_SHOWN_MAX, max(1.25, *(max(value(cell), 1 / value(cell)) for cell in cells)))
    columns = min(2, len(contexts))
    lines = -(-len(contexts) // columns)
    size = (columns * max(3.6, 0.85 * len(rates) + 1.2) + 1.2, lines * max(2.4, 0.5 * len(round_trips) + 1.3) + 0.3)
    figure, panels = pyplot.subplots(lines, columns, figsize=size, squeeze=False, layout="constrained")
    image = None
    for panel, context in zip(panels.flat, contexts, strict=False):
        grid = np.full((len(round_trips), len(rates)), np.nan)
        for cell in cells:
            if cell.context_tokens == context:
                grid[round_trips.index(cell.rtt_ms), rates.index(cell.gbit_per_s)] = value(cell)
        image = _draw(panel, grid, LogNorm(1 / limit, limit))
        if border:
            _crossover(panel, grid)
        panel.set_title(f"{context:,.0f} tokens of context")
        panel.set_xticks(range(len(rates)), [rate(each) for each in rates], rotation=30, ha="right", rotation_mode="anchor")
        panel.set_yticks(range(len(round_trips)), [f"{each:g} ms" for each in round_trips])
        panel.set_ylabel("round trip")
    for panel in panels.flat[len(contexts) :]:
        panel.set_axis_off()
    assert image is not None
    bar = figure.colorbar(image, ax=panels, label=label, shrink=0.8)
    wide, narrow = (1 / 16, 1 / 8, 1 / 4, 1 / 2, 1, 2, 4, 8, 16), (0.5, 0.6, 0.7, 0.8, 0.9, 1, 1.1, 1.25, 1.5, 1.75, 2)
    ticks = [tick for tick in (wide if limit > max(narrow) else narrow) if 1 / limit <= tick <= limit]
    bar.set_ticks(ticks, labels=[f"{tick:.3g}" for tick in ticks])
    bar.ax.minorticks_off()
    return figure


def _draw(panel: Axes, grid: np.ndarray, norm: LogNorm) -> AxesImage:
    image = panel.imshow(grid, cmap="PuOr_r", norm=norm, aspect="auto", origin="lower")
    panel.grid(visible=False)
    for (line, column), number in np.ndenumerate(grid):
        if np.isnan(number):
            panel.text(column, line, "-", ha="center", va="center")
            continue
        red, green, blue, _ = image.cmap(norm(number))
        ink = "white" if 0.299 * red + 0.587 * green + 0.114 * blue < _DARK else "black"
        panel.text(
            column, line, f"{number:.2f}" if number < 10 else f"{number:,.0f}", ha="center", va="center", color=ink, fontsize=9
        )
    return image


def _crossover(panel: Axes, grid: np.ndarray) -> None:
    """Draws a line between neighbours of which one fetches faster and the other does not."""
    faster = grid < 1
    known = ~np.isnan(grid)
    for line, column in np.ndindex(grid.shape):
        for down, right in ((0, 1), (1, 0)):
            other = (line + down, column + right)
            inside = other[0] < grid.shape[0] and other[1] < grid.shape[1]
            if inside and known[line, column] and known[other] and faster[line, column] != faster[other]:
                x, y = column + right / 2, line + down / 2
                ends = ([x, x], [y - 0.5, y + 0.5]) if right else ([x - 0.5, x + 0.5], [y, y])
                panel.plot(*ends, color="black", linewidth=2.5, solid_capstyle="projecting")
