"""HBM compared with the network: real GPUs and links by their data sheets, and the measured machine."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from matplotlib import pyplot
from matplotlib.ticker import FuncFormatter, NullLocator

from attnstore.links import PROFILES
from attnstore.whatif import GPUS, Question, answer, load_model
from experiments.report.style import BLUE, GREEN, ORANGE, PURPLE, Picture
from experiments.report.tables import Table

_LINKS: Final = ("800g", "400g", "100g", "25g", "10g", "1g", "100m", "5g", "6g-vision")
_MODELS: Final = (("llama-3-8b", "h100", 1), ("llama-3-8b", "b200", 1), ("llama-3-70b", "h100", 8), ("llama-3-70b", "mi300x", 8))
_CONTEXT_TOKENS: Final = 32_768
_HIT: Final = 0.9


@dataclass(frozen=True, slots=True)
class Measured:
    """The results of the bandwidth experiment, in GB/s."""

    memory_gb_per_s: float
    store_gb_per_s: float


def measured(rows: Sequence[dict[str, Any]]) -> Measured | None:
    """Returns the best memcpy and the best read over tcp among bandwidth rows, or None if either is missing."""
    memory = max((row["gb_per_s"] for row in rows if row["transport"] == "memcpy"), default=None)
    store = max((row["gb_per_s"] for row in rows if (row["transport"], row["op"]) == ("tcp", "read")), default=None)
    return Measured(memory, store) if memory is not None and store is not None else None


def hierarchy(here: Measured | None) -> Picture:
    """Draws bandwidths of memories and links on one logarithmic axis."""
    bars = [(f"{gpu.name.upper()} HBM" if gpu.name != "l40s" else "L40S GDDR6", gpu.hbm_gb_per_s, BLUE) for gpu in GPUS.values()]
    bars = [bar for bar in bars if not bar[0].startswith(("A800", "H800"))]
    bars += [(f"link {name}", PROFILES[name].down_gb_per_s, ORANGE) for name in _LINKS]
    if here is not None:
        bars += [("this machine: memcpy, one core", here.memory_gb_per_s, GREEN)]
        bars += [("this machine: store over tcp, loopback", here.store_gb_per_s, PURPLE)]
    bars.sort(key=lambda bar: bar[1])
    figure, axes = pyplot.subplots(figsize=(8.2, 0.29 * len(bars) + 0.9), layout="constrained")
    names, speeds, colors = zip(*bars, strict=True)
    # Points, not bars, because a logarithmic axis has no zero.
    axes.hlines(range(len(bars)), min(speeds) / 3, speeds, color="#cccccc", linewidth=1)
    axes.scatter(speeds, names, color=colors, s=42, zorder=3)
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlim(min(speeds) / 3, max(speeds) * 8)
    for line, speed in enumerate(speeds):
        axes.text(speed * 1.25, line, f"{speed:,.4g} GB/s", va="center", fontsize=9)
    axes.grid(visible=False, axis="y")
    axes.set_xlabel("bandwidth, GB/s")
    return Picture(
        "hierarchy",
        "Memories and links",
        "Blue: GPU memory, from the vendors' data sheets. Orange: links, down to the worker, at their full rate."
        + (" Green and purple: measured by experiments.bandwidth on the machine of these results." if here is not None else ""),
        figure,
    )


def ratios(here: Measured | None) -> Table:
    """Returns how many times faster than each link a GPU reads its memory."""
    lines = [
        (
            f"{gpu.name.upper()}, {gpu.hbm_gb_per_s:,.0f} GB/s",
            *(_times(gpu.hbm_gb_per_s / PROFILES[name].down_gb_per_s) for name in _LINKS),
        )
        for gpu in GPUS.values()
    ]
    if here is not None:
        name = f"this machine, memcpy {here.memory_gb_per_s:.1f} GB/s"
        lines.append((name, *(_times(here.memory_gb_per_s / PROFILES[link].down_gb_per_s) for link in _LINKS)))
    beside = f" This machine reads from a store over tcp on loopback at {here.store_gb_per_s:.1f} GB/s." if here is not None else ""
    return Table(
        "HBM to network",
        "How many times as fast as the link the memory is. 270 (H100) to 640 (B200) at 100 Gb/s is why decoding cannot read its KV "
        "through a network." + beside,
        ("memory", *_LINKS),
        tuple(lines),
    )


def real_machines() -> Table:
    """Compares fetching with recomputing for real models, GPUs and links, from `attnstore plan`."""
    lines = []
    for model, gpu, gpus in _MODELS:
        plans = [
            answer(
                Question(load_model(model), GPUS[gpu], PROFILES[link], context_tokens=_CONTEXT_TOKENS, hit=_HIT, gpus=gpus, mfu=0.5)
            )
            for link in _LINKS
        ]
        penalties = (plan.first_token.fetch_ms / plan.first_token.recompute_ms for plan in plans)
        lines.append(
            (
                f"{model} on {gpus} x {gpu.upper()}",
                *(_share(penalty) for penalty in penalties),
                f"{plans[0].break_even_gb_per_s:.2g}",
            )
        )
    return Table(
        "Fetching against recomputing on real machines",
        f"TTFT when hits are fetched over TTFT when all is computed: {_CONTEXT_TOKENS:,} tokens, {_HIT:.0%} of them in the store, "
        "prefill at half of the peak. Estimated by attnstore plan, not measured. Below 1 the network is the better memory; the "
        "last column is the bandwidth, in GB/s, at which the two ways are equal.",
        ("model", *_LINKS, "break-even"),
        tuple(lines),
    )


def _times(ratio: float) -> str:
    digits = max(0, 1 - math.floor(math.log10(ratio)))
    return f"{ratio:,.{min(digits, 2)}f}x"


def _share(ratio: float) -> str:
    return f"{ratio:.2f}" if ratio < 10 else f"{ratio:,.0f}"
