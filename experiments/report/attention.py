"""Attention over scattered pages: how close it comes to the memory's speed when reading KV (experiments.attention)."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib import pyplot

from experiments.attention import Row
from experiments.report.style import BLUE, GREEN, PURPLE, VERMILLION, Picture

_COLORS = {"decode": BLUE, "verify": GREEN, "prefill": VERMILLION}


def attention_rates(rows: Sequence[Row]) -> Picture:
    """Draws KV read per second over context, batch 1, a panel for each model."""
    models = list(dict.fromkeys(row.model for row in rows))
    figure, panels = pyplot.subplots(1, len(models), figsize=(4.6 * len(models) + 0.6, 4.2), squeeze=False, layout="constrained")
    for panel, model in zip(panels.flat, models, strict=True):
        own = sorted((row for row in rows if (row.model, row.batch) == (model, 1)), key=lambda row: row.context_tokens)
        for backend, phase in dict.fromkeys((row.backend, row.phase) for row in own):
            line = [row for row in own if (row.backend, row.phase) == (backend, phase)]
            color = _COLORS.get(phase, PURPLE)
            style, marker = ("-", "o") if backend == "cpu" else ("--", "s")
            x, y = [row.context_tokens for row in line], [row.gb_per_s for row in line]
            panel.plot(x, y, style, color=color, marker=marker, label=f"{phase}, {backend}")
        decode = [row for row in own if row.phase == "decode"]
        limits = {row.context_tokens: row.read_limit_gb_per_s for row in decode}
        panel.plot(list(limits), list(limits.values()), ":", color="0.4", label="reading the same slices")
        panel.set_xscale("log", base=2)
        panel.set_xticks(ticks := sorted({row.context_tokens for row in own}), [f"{tick:,}" for tick in ticks])
        panel.set_ylim(bottom=0)
        panel.set_title(model)
        panel.set_xlabel("tokens of context")
        panel.set_ylabel("KV, GB/s")
        panel.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=2)
    caption = "KV bytes attended over in a second, batch 1, beside reading the same scattered slices (experiments.attention)."
    return Picture("attention", "What attending in place costs a processor", caption, figure)
