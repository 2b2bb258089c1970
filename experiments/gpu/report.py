"""The document, the table and the picture of a run.

Owns: their forms. Invariant: a figure that was not measured is absent; nothing is filled in.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from experiments.gpu.results import read_rows


def document(folder: Path, states: Mapping[str, Mapping[str, object]]) -> dict[str, Any]:
    """Returns `{"phases": {name: {"state", "seconds", "rows"}}}`, with each phase's rows so far."""
    return {"phases": {name: {**state, "rows": read_rows(folder, name)} for name, state in states.items()}}


def table(found: Mapping[str, Any]) -> str:
    """Returns the figures as a Markdown table, with the machine and the number of right checks before it."""
    facts = {row["name"]: row["value"] for row in _rows(found, "fact")}
    checks = _rows(found, "check")
    lines = [
        "; ".join([str(facts.get("device")), *(f"{name} {facts.get(name)}" for name in ("torch", "triton", "cuda"))]),
        f"{sum(row['ok'] for row in checks)} of {len(checks)} checks were right.",
        "",
        "| figure | value | ratio | target | |",
        "|---|---|---|---|---|",
    ]
    for row in _rows(found, "figure"):
        target = row["target"]
        ratio = f"{row['ratio']:.3f} of {row['against']}" if row["ratio"] is not None else ""
        wanted = f"{target['sense']} {target['ratio']:g}" if target else ""
        met = {True: "met", False: "not met", None: ""}[row["met"]]
        lines.append(f"| {row['name']} | {row['value']:.4g} {row['unit']} | {ratio} | {wanted} | {met} |")
    wrong = [f"- wrong: {row['name']}: {row['detail']}" for row in checks if not row["ok"]]
    return "\n".join([*lines, *(["", *wrong] if wrong else [])]) + "\n"


def picture(found: Mapping[str, Any], path: Path) -> None:
    """Draws each ratio with its target as SVG; nothing without a ratio, or without matplotlib."""
    rows = [row for row in _rows(found, "figure") if row["ratio"] is not None]
    if not rows:
        return
    try:
        from matplotlib import pyplot

        from experiments.report.style import BLUE, ORANGE
    except ImportError:
        print("no picture: matplotlib is not installed")
        return
    figure, axes = pyplot.subplots(figsize=(8.2, 0.29 * len(rows) + 0.9), layout="constrained")
    names = [row["name"] for row in rows]
    axes.barh(names, [row["ratio"] for row in rows], color=BLUE)
    wanted = [row for row in rows if row["target"]]
    axes.scatter(
        [row["target"]["ratio"] for row in wanted], [row["name"] for row in wanted], marker="|", s=160, color=ORANGE, zorder=3
    )
    axes.invert_yaxis()
    axes.set_xlabel("ratio to what was measured in the same run; marks are targets")
    figure.savefig(path)


def _rows(found: Mapping[str, Any], kind: str) -> list[dict[str, Any]]:
    return [row for phase in found["phases"].values() for row in phase["rows"] if row["kind"] == kind]
