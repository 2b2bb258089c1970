"""The command line of the experiment; see the package and docs/attend.md."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

import torch
from rich.console import Console

from attnstore.command_line import CommandParser
from attnstore.option_types import file_to_write
from attnstore_worker.model import LoadedModel, load_model
from experiments.attend import predicate, timeline
from experiments.attend.real_model import Cell, documents, measure
from experiments.attend.rows import MODES, Row, table
from experiments.attend.synthetic import LLAMA_3_8B, SMOLLM2, measure_geometry

_THREADS: Final = 1
_TABLE_WIDTH: Final = 160
_TRACED_TOKENS: Final = 512
_REMOTE: Final = ("fetch_each_step", "attend", "shared_in_place")
_GUESSING: Final = ("attend", "attend_speculative")
_LINKS: Final = ((0.1, 0.1), (0.1, 1.0), (0.1, 10.0), (2.0, 1.0), (10.0, 1.0))


def main(argv: Sequence[str] | None = None) -> int:
    """Measures and prints. Returns 0 if every mode gave the tokens of the resident run."""
    arguments = _parser().parse_args(argv)
    torch.set_num_threads(_THREADS)
    console = Console()
    console.width = max(console.width, _TABLE_WIDTH)
    rows: list[Row] = []

    def add(more: list[Row]) -> None:
        rows.extend(more)
        if arguments.json is not None:
            arguments.json.write_text(json.dumps([_as_json(row) for row in rows], indent=1) + "\n")

    model = load_model()
    if arguments.trace is not None:
        [prose] = documents(model, _TRACED_TOKENS, 1, repeating=False)
        timelines = timeline.trace(model, prose, [_direct(0), Cell(0.1, 1.0, (), 0, 0)], threads=_THREADS)
        timeline.write(timelines, arguments.trace)
        console.print(timeline.table(timelines))
        return 0
    if arguments.predicate is not None:
        return _predicate(model, arguments.predicate, console)
    (_quick if arguments.quick else _full)(model, add)
    console.print(table(rows))
    return 0 if all(row.tokens_equal is not False for row in rows) else 1


def _quick(model: LoadedModel, add: Any) -> None:
    for context, tokens in ((512, 24), (8128, 12)):
        [prose] = documents(model, context, 1, repeating=False)
        add(measure(model, prose, [_direct(tokens), Cell(0.1, 1.0, ("attend",), tokens, 2)], capacity="1GiB", threads=_THREADS))
    [listing] = documents(model, 256, 1, repeating=True)
    add(measure(model, listing, [Cell(2.0, 1.0, _GUESSING, 16, 2)], capacity="256MiB", threads=_THREADS))
    add(measure_geometry(SMOLLM2, 8_192, [(0.1, 1.0)], 1, threads=_THREADS, repeats=8))


def _full(model: LoadedModel, add: Any) -> None:
    for context in (512, 2048, 8128):
        [prose] = documents(model, context, 1, repeating=False)
        cells = [
            _direct(32),
            Cell(0.1, 1.0, _REMOTE, 32, 3),
            Cell(0.1, 10.0, ("attend",), 16, 2),
            Cell(2.0, 1.0, ("attend",), 16, 2),
        ]
        cells += [Cell(10.0, 1.0, ("attend",), 8, 2), Cell(0.1, 0.1, ("attend",), 16, 2)] if context == 8128 else []
        add(measure(model, prose, cells, capacity="1GiB", threads=_THREADS))
    for prose in documents(model, 500, 5, repeating=False):
        cell = Cell(0.0, 10.0, (*MODES[1:],), 64, 64)
        add(measure(model, prose, [cell], capacity="256MiB", threads=_THREADS))
    [listing] = documents(model, 1024, 1, repeating=True)
    add(measure(model, listing, [Cell(2.0, 1.0, _GUESSING, 64, 2)], capacity="512MiB", threads=_THREADS))
    [prose] = documents(model, 1024, 1, repeating=False)
    far = [Cell(rtt_ms, 1.0, _GUESSING, 48, 2, resident_share=0.5) for rtt_ms in (2.0, 10.0)]
    add(measure(model, prose, far, capacity="1GiB", threads=_THREADS))
    for geometry in (SMOLLM2, LLAMA_3_8B):
        for context in (8_192, 32_768, 131_072):
            add(measure_geometry(geometry, context, _LINKS, 1, threads=_THREADS, repeats=12))
        add(measure_geometry(geometry, 131_072, [(0.1, 1.0)], 2, threads=_THREADS, repeats=12))


def _predicate(model: LoadedModel, path: Path, console: Console) -> int:
    """Writes and prints the forecasts against what was measured. Returns 0."""
    rows: list[predicate.Predicted] = []
    for context in (512, 2048):
        known, asked = documents(model, context, 2, repeating=False)
        cells = [_direct(32), *[Cell(rtt_ms, gbit_per_s, (), 32, 0) for rtt_ms, gbit_per_s in _LINKS]]
        rows += predicate.predict(model, known, asked, cells, threads=_THREADS)
        path.write_text(json.dumps([_as_json(row) for row in rows], indent=1) + "\n")
    console.print(predicate.table(rows))
    return 0


def _direct(tokens: int) -> Cell:
    return Cell(0.0, math.inf, ("attend",), tokens, 2)


def _as_json(row: Row | predicate.Predicted) -> dict[str, Any]:
    """JSON has no infinity: an unlimited link has None for its rate."""
    return {name: None if isinstance(value, float) and math.isinf(value) else value for name, value in asdict(row).items()}


def _parser() -> argparse.ArgumentParser:
    parser = CommandParser(
        prog="python -m experiments.attend",
        description="Decoding with the KV in the worker's memory, fetched for each step, or attended to at the store.",
    )
    parser.add_argument("--json", type=file_to_write, metavar="PATH", help="write the rows as a list")
    parser.add_argument(
        "--trace",
        type=file_to_write,
        metavar="PATH",
        help="measure no rows; write the timelines of some attended steps as a Chrome trace, and print where a layer's time goes",
    )
    parser.add_argument(
        "--predicate",
        type=file_to_write,
        metavar="PATH",
        help="measure no rows; write what the planner forecasts for attending, fetching and recomputing, and what was measured",
    )
    parser.add_argument("--quick", action="store_true", help="short contexts and few tokens")
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
