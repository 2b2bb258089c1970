"""The rows of a run: checks and figures, each in its phase's file as soon as it is known.

Owns: `Check`, `Figure`, `Rows` and the document of a whole run. Invariant: a row that was printed is on disk, so a run that is
killed keeps what it had measured.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

AT_LEAST: Final = ">="
AT_MOST: Final = "<="


@dataclass(frozen=True, slots=True)
class Target:
    """What a ratio is held against: `sense` is `AT_LEAST` or `AT_MOST`."""

    sense: str
    ratio: float

    def is_met(self, ratio: float) -> bool:
        """Returns whether the ratio is on the right side."""
        return ratio >= self.ratio if self.sense == AT_LEAST else ratio <= self.ratio


@dataclass(frozen=True, slots=True)
class Check:
    """Something that is right or wrong; `detail` says what was compared, or what differed."""

    name: str
    ok: bool
    detail: str = ""


@dataclass(frozen=True, slots=True)
class Figure:
    """A measurement, and its ratio to something measured in the same run (`against`). Without a target it is only reported."""

    name: str
    value: float
    unit: str
    against: str | None = None
    ratio: float | None = None
    target: Target | None = None

    @property
    def is_met(self) -> bool | None:
        """Whether the target is met; None without one."""
        return None if self.target is None or self.ratio is None else self.target.is_met(self.ratio)


class Rows:
    """Appends the rows of one phase to `<folder>/<phase>.jsonl`, and prints them."""

    def __init__(self, folder: Path, phase: str) -> None:
        self._path = folder / f"{phase}.jsonl"
        self._path.unlink(missing_ok=True)
        self.failed = 0

    def check(self, name: str, ok: bool, detail: str = "") -> None:
        """Records a check."""
        self.failed += not ok
        self._append({"kind": "check", **asdict(Check(name, ok, detail))}, f"{'ok   ' if ok else 'WRONG'} {name} {detail}")

    def figure(self, figure: Figure) -> None:
        """Records a figure."""
        row = {"kind": "figure", **asdict(figure), "met": figure.is_met}
        ratio = f"{figure.ratio:.3f} of {figure.against}" if figure.ratio is not None else ""
        self._append(row, f"      {figure.name}: {figure.value:.4g} {figure.unit} {ratio}")

    def fact(self, name: str, value: object) -> None:
        """Records a fact about the machine."""
        self._append({"kind": "fact", "name": name, "value": value}, f"      {name}: {value}")

    def _append(self, row: dict[str, Any], line: str) -> None:
        with self._path.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(line.rstrip(), flush=True)


def read_rows(folder: Path, phase: str) -> list[dict[str, Any]]:
    """Returns the rows that a phase has recorded so far; a row that was cut off is left out."""
    path = folder / f"{phase}.jsonl"
    rows: list[dict[str, Any]] = []
    if path.exists():
        for line in path.read_text().splitlines():
            try:
                rows.append(json.loads(line))
            except ValueError:
                break
    return rows


def ceiling(folder: Path, name: str) -> float | None:
    """Returns a figure of the phase `ceilings` of this run; None if it was not measured."""
    return next((row["value"] for row in read_rows(folder, "ceilings") if row["name"] == name), None)
