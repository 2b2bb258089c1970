"""The command line of the measurement; see the package."""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import asdict
from pathlib import Path

from attnstore.command_line import CommandParser
from attnstore.option_types import file_to_write
from experiments.bandwidth.claims import Claim, claims
from experiments.bandwidth.field import Plan, run_rounds
from experiments.bandwidth.match import MatchFigures, in_the_table, over_the_wire
from experiments.bandwidth.pages import Shape
from experiments.bandwidth.plot import save_plot
from experiments.bandwidth.report import claims_table, match_table, pivot, table
from experiments.bandwidth.results import PAGE_BYTES_LARGE, PAGE_BYTES_SMALL, Results

_PAGES = 256
_MATCH_P50_US_MAX = 1000.0


def main() -> int:
    """Runs everything and prints it. Always returns 0, because slow figures on a busy machine are not an error."""
    options = _options()
    began = time.monotonic()
    results, notes = Results(), set[str]()
    for plan in _quick_plans(options) if options.quick else _full_plans(options):
        found, missing = run_rounds(plan, _say)
        results.merge(found)
        notes.update(missing)
    _say("look-ups")
    match = _match_quick() if options.quick else _match_full()
    rows = results.rows()
    judged = claims_table([*claims(results), *_match_claims(match)])
    print(table(rows), pivot(rows), match_table(match), judged, sep="\n\n")
    for note in sorted(notes):
        print(f"\n{note}", end="")
    print(f"\nThe run took {time.monotonic() - began:.0f} s.")
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")
    if options.match_json:
        options.match_json.write_text(json.dumps([asdict(figure) for figure in match], indent=1) + "\n")
    if options.plot:
        save_plot(rows, options.plot)
    return 0


def _options() -> argparse.Namespace:
    parser = CommandParser("python -m experiments.bandwidth", description="How fast pages move over each transport.")
    parser.add_argument("--quick", action="store_true", help="fewer rounds and cells: ends within 50 s")
    parser.add_argument("--json", type=file_to_write, metavar="PATH", help="write the rows")
    parser.add_argument("--match-json", type=file_to_write, metavar="PATH", help="write the figures of Match")
    parser.add_argument("--plot", type=file_to_write, metavar="PATH", help="write a PNG")
    parser.add_argument("--mooncake-python", type=Path, metavar="PATH", help="interpreter that has mooncake: adds its rows")
    options: argparse.Namespace = parser.parse_args()
    return options


def _quick_plans(options: argparse.Namespace) -> list[Plan]:
    return [
        Plan(Shape(PAGE_BYTES_SMALL, _PAGES), (1, 8, 32, 256), 5, 0.04, 22.0, options.mooncake_python),
        Plan(Shape(PAGE_BYTES_LARGE, 32), (1, 32), 3, 0.04, 10.0, options.mooncake_python),
    ]


def _full_plans(options: argparse.Namespace) -> list[Plan]:
    return [
        Plan(Shape(page_bytes, _PAGES), (1, 8, 32, 256), 9, 0.25, 300.0, options.mooncake_python)
        for page_bytes in (PAGE_BYTES_SMALL, PAGE_BYTES_LARGE)
    ]


def _match_quick() -> list[MatchFigures]:
    return [*over_the_wire(0.5), *in_the_table((10, 10_000), (1, 512, 100_000), 0.05)]


def _match_full() -> list[MatchFigures]:
    return [*over_the_wire(5.0), *in_the_table((10, 10_000, 1_000_000), (1, 10, 100, 512, 1_000, 10_000, 100_000), 0.5)]


def _match_claims(match: list[MatchFigures]) -> list[Claim]:
    return [
        Claim(f"p50 of Match of {figure.hashes} hashes, {figure.where}", figure.p50_us, _MATCH_P50_US_MAX, at_most=True, unit=" us")
        for figure in match
        if figure.where.startswith("wire")
    ]


def _say(line: str) -> None:
    """Shows progress, on a terminal only."""
    if sys.stderr.isatty():
        print(f"\r\x1b[K{line}", end="", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
