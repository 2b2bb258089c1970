"""The command line of the report; see the package."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final, cast

from matplotlib import pyplot

from attnstore.command_line import CommandParser
from attnstore.errors import AttnStoreError, InvalidArgument
from experiments.bandwidth.plot import draw as draw_bandwidth
from experiments.bandwidth.results import Row as BandwidthRow
from experiments.replay.plot import draw as draw_replays
from experiments.report.attend import attend_costs, attend_findings
from experiments.report.attention import attention_rates
from experiments.report.curves import crossover_lines, decode_costs, first_token_curves, predictions
from experiments.report.findings import findings, summary
from experiments.report.memory import hierarchy, measured, ratios, real_machines
from experiments.report.page import page
from experiments.report.rows import Results, read_results
from experiments.report.style import Picture
from experiments.report.surfaces import penalty_surface, planner_surface
from experiments.report.tables import faults

_EXIT_USAGE: Final = 2
_DOTS_PER_INCH: Final = 130
_PAGE: Final = "report.html"


def main(argv: Sequence[str] | None = None) -> int:
    """Reads, draws, writes. Returns 0, or 2 after a one-line message if the input is wrong."""
    arguments = _parser().parse_args(argv)
    try:
        results = read_results(arguments.results)
        if results.is_empty:
            raise InvalidArgument("the files hold no results")
        arguments.out.mkdir(parents=True, exist_ok=True)
        pictures = list(_pictures(results))
        for picture in pictures:
            picture.figure.savefig(arguments.out / f"{picture.name}.png", dpi=_DOTS_PER_INCH, metadata={"Software": None})
        here = measured(results.bandwidth)
        tables = [*([faults(results.faults)] if results.faults else []), ratios(here), real_machines()]
        claims = [*findings(results), *(attend_findings(results.attends) if results.attends else [])]
        html = page(results.runs, summary(results), claims, pictures, tables)
        (arguments.out / _PAGE).write_text(html)
        for picture in pictures:
            pyplot.close(picture.figure)
    except (AttnStoreError, OSError) as error:
        print(f"experiments.report: {error}", file=sys.stderr)
        return _EXIT_USAGE
    print(f"{arguments.out / _PAGE} and {len(pictures)} pictures")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = CommandParser(prog="python -m experiments.report", description="Results of experiments as one page.")
    parser.add_argument("results", type=Path, nargs="+", metavar="FILE", help="JSON lines or a JSON list, of any experiment")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help=f"where {_PAGE} and the PNGs go")
    return parser


def _pictures(results: Results) -> Iterator[Picture]:
    if results.first_tokens:
        yield penalty_surface(results.first_tokens)
        yield planner_surface(results.first_tokens)
        yield first_token_curves(results.first_tokens)
        crossing = crossover_lines(results.first_tokens)
        if crossing is not None:
            yield crossing
        yield predictions(results.first_tokens)
    if results.decodes:
        yield decode_costs(results.decodes)
    if results.attends:
        yield attend_costs(results.attends)
    yield hierarchy(measured(results.bandwidth))
    if results.bandwidth:
        figure = draw_bandwidth(cast(list[BandwidthRow], results.bandwidth))
        caption = (
            "Pages moved by each transport and by peers, medians over rounds (experiments.bandwidth). Grey: the machine's limits."
        )
        yield Picture("bandwidth", "What the transports reach", caption, figure)
    if results.attention:
        yield attention_rates(results.attention)
    if results.replays:
        caption = "Share of a trace's prompt blocks found, by capacity and eviction policy (experiments.replay)."
        yield Picture("replay", "How much there is to hit", caption, draw_replays(results.replays))


if __name__ == "__main__":
    sys.exit(main())
