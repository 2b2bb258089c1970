"""The table of docs/models.md: every architecture, whether the worker computes it, and how precisely.

Owns: the rows and their text. Invariant: the table contains the result of a run; tests/worker/model/test_models.py compares them.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from attnstore.core.layout import DType
from attnstore_worker.errors import ModelUnavailable
from attnstore_worker.model import LoadedModel, load_model
from experiments.models.agreement import DIFFERENCE_MAX, check_agreement
from experiments.models.tiny import NotTiny, write_model

COMPUTED: Final = "computed"
REFUSED: Final = "refused"
NOT_TRIED: Final = "not tried"
_MARK: Final = "<!-- python -m experiments.models --write docs/models.md -->\n"
"""The table follows it, to the end of the page."""


@dataclass(frozen=True, slots=True)
class Row:
    """The result of one model: `result` is one of the three above, `detail` is the largest difference, the refusal, or empty."""

    name: str
    result: str
    detail: str


def make_row(name: str, folder: Path) -> Row:
    """Creates the model `name` in `folder` and runs it. Raises `AssertionError` if the worker computes it wrongly."""
    try:
        write_model(name, folder)
    except NotTiny:
        return Row(name, NOT_TRIED, "")
    try:
        return computed_row(name, load_model(folder, DType.FP32), folder)
    except ModelUnavailable as error:
        return refused_row(name, error, folder)


def computed_row(name: str, model: LoadedModel, folder: Path) -> Row:
    """Returns the row of a model that loads. Raises `AssertionError` if it is computed wrongly."""
    difference, run = check_agreement(model, folder)
    assert difference <= DIFFERENCE_MAX, f"{name} is computed wrongly: {difference:.1e} off ({run})"
    return Row(name, COMPUTED, f"{difference:.0e}")


def refused_row(name: str, error: ModelUnavailable, folder: Path) -> Row:
    """Returns the row of a model that does not load."""
    told = str(error).replace(f"the model in {folder}", "the model").replace(f"{folder}: ", "").replace(str(folder), "the model")
    return Row(name, REFUSED, told.replace("|", r"\|"))


def as_markdown(rows: Iterable[Row]) -> str:
    """Returns the generated part of docs/models.md."""
    rows = list(rows)
    lines = ["| computed | largest difference |", "|---|---:|"]
    lines += [f"| {row.name} | {row.detail} |" for row in rows if row.result == COMPUTED]
    lines += ["", "| refused | error of the loader |", "|---|---|"]
    lines += [f"| {row.name} | {row.detail} |" for row in rows if row.result == REFUSED]
    if not_tried := [row.name for row in rows if row.result == NOT_TRIED]:
        lines += ["", f"Not tried, because the sizes of the tiny models do not fit them: {'; '.join(not_tried)}."]
    return "\n".join(lines) + "\n"


def replaced(page: str, rows: Iterable[Row]) -> str:
    """Returns `page` with the table of `rows`."""
    return page.partition(_MARK)[0] + _MARK + "\n" + as_markdown(rows)


def parsed(page: str) -> dict[str, Row]:
    """Returns the rows of the table on `page`, by name."""
    table = page.partition(_MARK)[2]
    computed, _, rest = table.partition("| refused |")
    refused, _, not_tried = rest.partition("\nNot tried")
    rows = [Row(name, COMPUTED, detail) for name, detail in _cells(computed)]
    rows += [Row(name, REFUSED, detail) for name, detail in _cells(refused)]
    rows += [Row(name, NOT_TRIED, "") for name in not_tried.partition(": ")[2].rstrip(".\n").split("; ")]
    return {row.name: row for row in rows}


def _cells(table: str) -> list[tuple[str, str]]:
    lines = [line.strip("| ").split(" | ", 1) for line in table.splitlines() if line.startswith("| ")]
    return [(name, detail) for name, detail in lines if not detail.startswith("largest")]
