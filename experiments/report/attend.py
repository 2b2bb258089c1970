"""Decoding with the KV in the worker, fetched for each token, or attended to in the store: its plot, and its bounds."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Final

from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.ticker import NullLocator

from experiments.attend.rows import MODES, Row
from experiments.bandwidth.claims import Claim
from experiments.report.style import BLUE, GREEN, GREY, ORANGE, PURPLE, VERMILLION, Picture, log_times, rate

_STYLES: Final = dict(zip(MODES, ((GREEN, "o"), (VERMILLION, "s"), (BLUE, "^"), (PURPLE, "v"), (ORANGE, "D")), strict=True))
_WITHOUT_LINK: Final = ("resident", "shared_in_place")
_LONG_TOKENS: Final = 8_000
_NEAR_MS: Final = 0.1
_FAR_MS: Final = 2.0
_GBIT: Final = 1.0


def attend_costs(rows: Sequence[Row]) -> Picture:
    """Draws the time between tokens over the context, a panel for each model and link with rows for both ends of a line."""
    rows = _left_whole(rows)
    panels = _panels(rows)
    figure, axes = pyplot.subplots(
        -(-len(panels) // 2),
        min(2, len(panels)),
        figsize=(9.2, 3.4 * -(-len(panels) // 2) + 0.5),
        squeeze=False,
        layout="constrained",
    )
    for panel, (model, rtt_ms, gbit_per_s) in zip(axes.flat, panels, strict=False):
        _draw(panel, [row for row in rows if row.model == model and _is_on(row, rtt_ms, gbit_per_s)])
        panel.set_title(f"{model}, {rate(gbit_per_s)}, {rtt_ms:g} ms round trip", fontsize=9)
    for panel in axes.flat[len(panels) :]:
        panel.set_axis_off()
    handles = {label: handle for panel in axes.flat for handle, label in zip(*panel.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="outside upper center", ncols=3)
    return Picture(
        "attend",
        "Contexts in the network: fetched for each token, or attended to where they lie",
        "Marks: measured time between tokens, medians. Thin lines: what the formula says (docs/attend.md). Dotted: by the formula "
        "attending beats fetching from this context on. Synthetic pages: attention and transfers alone, no whole model.",
        figure,
    )


def crossover_tokens(fetched: Row, attended: Row) -> float:
    """Returns the context from which on attending is faster than fetching for each token, by the formula and the measured bytes and
    round trips.

    Both rows are of one model and one link. Fetching moves the context, attending a query and its answer for each round trip.
    """
    bits_per_ms = attended.gbit_per_s * 1e6
    token_ms = fetched.bytes_per_token / fetched.context_tokens * 8 / bits_per_ms
    trips_ms = (attended.round_trips_per_token - fetched.round_trips_per_token) * attended.rtt_ms
    return max(0.0, (attended.bytes_per_token * 8 / bits_per_ms + trips_ms) / token_ms)


def attend_findings(rows: Sequence[Row]) -> list[Claim]:
    """Returns the bounds on attention at the store, by the real model's rows."""
    equal = _unequal([row for row in rows if row.tokens_equal is not None])
    rows = _left_whole(rows)
    real = [row for row in rows if row.tokens_equal is not None]
    far = [row for row in real if (row.rtt_ms, row.gbit_per_s) == (_FAR_MS, _GBIT)]
    near = [row for row in real if row.context_tokens >= _LONG_TOKENS and _is_on(row, _NEAR_MS, _GBIT)]
    direct = [row for row in real if _is_on(row, 0.0, math.inf)]
    attended = [row for row in rows if row.mode == "attend"]
    models = {row.model for row in attended}
    spreads = [_spread([row.bytes_per_token / row.nodes for row in attended if row.model == model]) for model in models]
    link = f"{rate(_GBIT)}, {_NEAR_MS:g} ms"
    return [
        Claim(f"fetching for each token over attending, {link}, 8k tokens", _ratio(near, "fetch_each_step", "attend"), 50),
        Claim(f"attending over resident, {link}, 8k tokens", _ratio(near, "attend", "resident", max), 1.4, at_most=True),
        Claim("attending over resident, loopback", _ratio(direct, "attend", "resident", max), 1.25, at_most=True),
        Claim("attending over attending with guesses, 2 ms, repetitive text", _ratio(far, "attend", "attend_speculative"), 1.8),
        Claim(
            "in place from shared memory over resident, 8k tokens",
            _ratio(near, "shared_in_place", "resident", max),
            1.2,
            at_most=True,
        ),
        Claim("bytes a token, longest context over shortest", max(spreads, default=None), 1.01, at_most=True),
        Claim("runs whose tokens differ from the resident run's", equal, 0, at_most=True, unit=""),
    ]


def _left_whole(rows: Sequence[Row]) -> list[Row]:
    """Returns rows whose modes differ only in where the whole context is."""
    return [row for row in rows if not row.resident_share]


def _panels(rows: Sequence[Row]) -> list[tuple[str, float, float]]:
    """Returns for each model the link with the most measured modes and contexts."""
    measured = {(row.model, row.rtt_ms, row.gbit_per_s, row.mode, row.context_tokens) for row in rows}
    counts = Counter((model, rtt_ms, gbit) for model, rtt_ms, gbit, _, _ in measured if math.isfinite(gbit))

    def rank(panel: tuple[str, float, float]) -> tuple[int, float, float]:
        _, rtt_ms, gbit = panel
        return counts[panel], -rtt_ms, -abs(math.log(gbit / _GBIT))

    return sorted(max((panel for panel in counts if panel[0] == model), key=rank) for model in {model for model, _, _ in counts})


def _draw(panel: Axes, rows: Sequence[Row]) -> None:
    for mode, (color, marker) in _STYLES.items():
        own = sorted((row for row in rows if row.mode == mode and row.nodes <= 1), key=lambda row: row.context_tokens)
        if own:
            contexts = [row.context_tokens for row in own]
            panel.plot(
                contexts, [row.tpot_ms for row in own], color=color, marker=marker, linestyle="", label=mode.replace("_", " ")
            )
            predicted = {row.context_tokens: row.predicted_ms for row in own if row.predicted_ms is not None}
            panel.plot([*predicted], [*predicted.values()], color=color, linewidth=1)
    fetched, attended = ([row for row in rows if row.mode == mode] for mode in ("fetch_each_step", "attend"))
    if fetched and attended:
        tokens = crossover_tokens(fetched[-1], attended[-1])
        if tokens >= 1:
            panel.axvline(tokens, color=GREY, linestyle=":", linewidth=1.2)
            panel.annotate(
                f"{tokens:,.0f} tokens", (tokens, 0.02), (4, 0), xycoords=("data", "axes fraction"), textcoords="offset points"
            )
    panel.set_xscale("log")
    contexts = sorted({row.context_tokens for row in rows})
    panel.set_xticks(contexts, [f"{tokens:,}" for tokens in contexts], rotation=30)
    panel.xaxis.set_minor_locator(NullLocator())
    panel.set_xlabel("tokens of context")
    log_times(panel, "between tokens")


def _is_on(row: Row, rtt_ms: float, gbit_per_s: float) -> bool:
    """True for rows measured on that link, or on none, because a resident or shared context crosses no link."""
    return row.mode in _WITHOUT_LINK or (row.rtt_ms, row.gbit_per_s) == (rtt_ms, gbit_per_s)


def _ratio(rows: Sequence[Row], slow: str, fast: str, worst: Callable[[list[float]], float] = min) -> float | None:
    """Returns the worst ratio of the two modes' times among contexts that have both, or None."""
    times: dict[str, dict[int, float]] = {slow: {}, fast: {}}
    for row in rows:
        if row.mode in times:
            times[row.mode][row.context_tokens] = row.tpot_ms
    ratios = [times[slow][context] / times[fast][context] for context in times[slow].keys() & times[fast].keys()]
    return worst(ratios) if ratios else None


def _spread(values: Sequence[float]) -> float:
    return max(values) / min(values)


def _unequal(rows: Sequence[Row]) -> float | None:
    return float(sum(row.tokens_equal is False for row in rows)) if rows else None
