"""Curves of the sweep: times over bandwidth, the crossover, predictions against measurements, and the cost of decoding."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

from matplotlib import pyplot

from experiments.report.rows import RESIDENCES, Decode, FirstToken
from experiments.report.style import (
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    PURPLE,
    SKY,
    VERMILLION,
    Picture,
    duration,
    log_rates,
    log_times,
    rate,
    spell,
)
from experiments.report.surfaces import spread

_PANELS_MAX = 3
_WAYS = (
    ("recompute_ttft_ms", "recompute", VERMILLION, "--", "s"),
    ("fetch_ttft_ms", "fetch", BLUE, "-.", "^"),
    ("planner_ttft_ms", "planner", "black", "-", "o"),
)
_COLORS = (BLUE, VERMILLION, GREEN, PURPLE, ORANGE, SKY, GREY)
_MARKERS = "os^Dv<>P"
_RESIDENCE = dict(zip(RESIDENCES, ((GREEN, "o"), (SKY, "D"), (PURPLE, "s"), (VERMILLION, "^")), strict=True))
_BAND = 0.15


def _grid(lines: int, columns: int, *, panel_width: float) -> tuple[Any, Any]:
    """Returns a figure and its panels `[line, column]`, all with the same axes."""
    return pyplot.subplots(
        lines,
        columns,
        figsize=(panel_width * columns + 0.8, 2.5 * lines + 0.6),
        sharex=True,
        sharey=True,
        squeeze=False,
        layout="constrained",
    )


def first_token_curves(cells: Sequence[FirstToken]) -> Picture:
    """Draws TTFT over bandwidth, a panel for each context and round trip."""
    hit = max(cell.hit_rate for cell in cells)
    cells = [cell for cell in cells if cell.hit_rate == hit]
    contexts = spread([cell.context_tokens for cell in cells], _PANELS_MAX)
    round_trips = spread([cell.rtt_ms for cell in cells], _PANELS_MAX)
    figure, panels = _grid(len(round_trips), len(contexts), panel_width=3.6)
    for line, rtt_ms in zip(panels, round_trips, strict=True):
        for panel, context in zip(line, contexts, strict=True):
            own = [cell for cell in cells if (cell.rtt_ms, cell.context_tokens) == (rtt_ms, context)]
            own.sort(key=lambda cell: cell.gbit_per_s)
            for field, name, color, style, marker in _WAYS:
                x, y = [cell.gbit_per_s for cell in own], [getattr(cell, field) for cell in own]
                panel.plot(x, y, color=color, linestyle=style, marker=marker, label=name)
            log_rates(panel, sorted({cell.gbit_per_s for cell in cells}))
            log_times(panel, "TTFT")
            panel.set_title(f"{context:,.0f} tokens, {rtt_ms:g} ms round trip")
            panel.tick_params(axis="x", rotation=30)
            panel.label_outer()
    figure.legend(*panels[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=3)
    return Picture(
        "first_token",
        f"Time to first token over bandwidth (hit rate {hit:.0%})",
        "Where the dashed-dotted line falls below the dashed one, the network is the better memory. The planner should follow the "
        "lower of the two, and pass below both around their crossing.",
        figure,
    )


def crossover_lines(cells: Sequence[FirstToken]) -> Picture | None:
    """Draws break-even bandwidth over context, a line for each round trip. Returns None if nothing crosses."""
    hit = max(cell.hit_rate for cell in cells)
    cells = [cell for cell in cells if cell.hit_rate == hit]
    figure, axes = pyplot.subplots(figsize=(7.2, 4.2), layout="constrained")
    found = False
    for index, rtt_ms in enumerate(sorted({cell.rtt_ms for cell in cells})):
        points = []
        for context in sorted({cell.context_tokens for cell in cells}):
            crossing = break_even_gbit_per_s([cell for cell in cells if (cell.rtt_ms, cell.context_tokens) == (rtt_ms, context)])
            if crossing is not None:
                points.append((context, crossing))
        if points:
            found = True
            color, marker = _COLORS[index % len(_COLORS)], _MARKERS[index % len(_MARKERS)]
            axes.plot(*zip(*points, strict=True), color=color, marker=marker, label=f"{rtt_ms:g} ms")
    if not found:
        pyplot.close(figure)
        return None
    contexts = sorted({cell.context_tokens for cell in cells})
    axes.set_xscale("log")
    axes.set_xticks(contexts, [f"{context:,}" for context in contexts])
    axes.minorticks_off()
    axes.set_yscale("log")
    spell(axes.yaxis, rate)
    axes.set_xlabel("tokens of context")
    axes.set_ylabel("break-even bandwidth")
    axes.legend(title="round trip", loc="center left", bbox_to_anchor=(1.0, 0.5))
    return Picture(
        "crossover",
        f"Crossover: the bandwidth from which on fetching beats recomputing (hit rate {hit:.0%})",
        "Above its line a link with that round trip fetches the hits sooner than this machine computes them. Interpolated between "
        "the bandwidths measured on both sides; a context without a point does not cross within them.",
        figure,
    )


def break_even_gbit_per_s(cells: Sequence[FirstToken]) -> float | None:
    """Returns where fetch over recompute passes 1 among cells of one context and round trip, interpolated on logarithmic scales."""
    ordered = sorted(cells, key=lambda cell: cell.gbit_per_s)
    for slow, fast in itertools.pairwise(ordered):
        if slow.penalty >= 1 > fast.penalty:
            share = math.log(slow.penalty) / (math.log(slow.penalty) - math.log(fast.penalty))
            return math.exp(math.log(slow.gbit_per_s) * (1 - share) + math.log(fast.gbit_per_s) * share)
    return None


def predictions(cells: Sequence[FirstToken]) -> Picture:
    """Draws predicted against measured times, with a marker per choice."""
    figure, axes = pyplot.subplots(figsize=(6.2, 5.2), layout="constrained")
    times = [time for cell in cells for time in (cell.predicted_ttft_ms, cell.planner_ttft_ms)]
    ends = (min(times) * 0.8, max(times) * 1.25)
    axes.fill_between(
        ends, [end * (1 - _BAND) for end in ends], [end * (1 + _BAND) for end in ends], color="#e8e8e8", label="± 15%"
    )
    axes.plot(ends, ends, color=GREY, linewidth=1)
    for index, choice in enumerate(sorted({cell.choice for cell in cells})):
        own = [cell for cell in cells if cell.choice == choice]
        x, y = [cell.planner_ttft_ms for cell in own], [cell.predicted_ttft_ms for cell in own]
        axes.scatter(
            x, y, s=26, color=_COLORS[index % len(_COLORS)], marker=_MARKERS[index % len(_MARKERS)], label=choice, alpha=0.85
        )
    log_times(axes, "predicted TTFT")
    axes.set_xscale("log")
    spell(axes.xaxis, duration)
    axes.set_xlabel("measured TTFT")
    axes.set_xlim(ends)
    axes.set_ylim(ends)
    axes.set_aspect("equal")
    axes.legend(title="planner's choice", loc="upper left")
    error = sorted(cell.error for cell in cells)[len(cells) // 2]
    return Picture(
        "predictions",
        f"Predicted against measured time to first token: median error {error:.1%}",
        "Each point is one cell of the sweep. On the line the planner knew beforehand what would happen.",
        figure,
    )


def decode_costs(rows: Sequence[Decode]) -> Picture:
    """Draws the time between tokens over bandwidth, a line for each place of the KV."""
    rates = sorted({row.gbit_per_s for row in rows})
    contexts = spread([row.context_tokens for row in rows], _PANELS_MAX)
    round_trips = spread([row.rtt_ms for row in rows], _PANELS_MAX)
    figure, panels = _grid(len(round_trips), len(contexts), panel_width=3.8)
    for line, rtt_ms in zip(panels, round_trips, strict=True):
        for panel, context in zip(line, contexts, strict=True):
            for residence, (color, marker) in _RESIDENCE.items():
                cell = (rtt_ms, context, residence)
                own = [row for row in rows if (row.rtt_ms, row.context_tokens, row.residence) == cell]
                own.sort(key=lambda row: row.gbit_per_s)
                if own:
                    x, y = [row.gbit_per_s for row in own], [row.itl_ms for row in own]
                    panel.plot(x, y, color=color, marker=marker, label=residence)
                    if len(rates) == 1:
                        panel.annotate(duration(y[0]), (x[0], y[0]), (9, 0), textcoords="offset points", va="center")
            log_rates(panel, rates)
            log_times(panel, "between tokens")
            panel.set_title(f"{context:,.0f} tokens, {rtt_ms:g} ms round trip")
            panel.tick_params(axis="x", rotation=30)
            panel.label_outer()
    handles = {label: handle for panel in panels.flat for handle, label in zip(*panel.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="outside upper center", ncols=4)
    worst = max((row for row in rows if row.residence == "fetched"), key=lambda row: row.itl_ms, default=None)
    remark = f" At worst, fetching anew for each token takes {duration(worst.itl_ms)} a token." if worst is not None else ""
    return Picture(
        "decode",
        "Decoding from KV in the network: time between two tokens",
        "Resident KV is what HBM is for. Prefetched KV costs its transfer once; fetched KV costs it for every token; attended KV "
        "stays in the node, which answers the queries." + remark,
        figure,
    )
