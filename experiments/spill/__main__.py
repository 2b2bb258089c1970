"""Measures the disk tier against the bare disk; see docs/spill.md."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.table import Table

from attnstore.command_line import CommandParser
from attnstore.option_types import file_to_write
from experiments.spill.measure import GB, LAYOUT, READERS, Bench, restart

_HUNDRED_GB_PAGES = int(100 * GB) // LAYOUT.page_bytes


def main(argv: Sequence[str] | None = None) -> int:
    """Measures and prints."""
    parser = CommandParser(prog="python -m experiments.spill", description=__doc__)
    parser.add_argument("--json", type=file_to_write, metavar="FILE", help="write the figures to this file")
    parser.add_argument("--quick", action="store_true", help="fewer rounds and pages: under a minute")
    parser.add_argument("--directory", type=Path, default=Path("."), metavar="DIR", help="where the disk to measure is (default .)")
    arguments = parser.parse_args(argv)
    pages, rounds = (1_600, 8) if arguments.quick else (5_600, 12)
    with tempfile.TemporaryDirectory(prefix="attnstore-spill-", dir=arguments.directory) as made:
        bench = Bench(Path(made), pages)
        written = bench.write(rounds)
        read = bench.read(rounds)
        restarted = restart(Path(made) / "restart", _HUNDRED_GB_PAGES)
    figures = {
        "read_ratio": read.ratio,
        "write_ratio": written.ratio,
        "restart_s_per_100gb": restarted.seconds * _HUNDRED_GB_PAGES / restarted.pages,
        "index_bytes_per_page": restarted.index_bytes_per_page,
        "write_cpu_s_per_gb": written.ours.cpu_s_per_gb,
        "read_cpu_s_per_gb": read.ours.cpu_s_per_gb,
        "read": asdict(read),
        "write": asdict(written),
        "restart": asdict(restarted),
    }
    table = Table("of 368,640 B pages", "bare GB/s", "ours GB/s", "ratio", "bare CPU s/GB", "ours CPU s/GB")
    for name, compared in ((f"read, one a call, {READERS} threads", read), ("write, 8 a call", written)):
        bare, ours = compared.bare, compared.ours
        row = (bare.gb_per_s, ours.gb_per_s, compared.ratio, bare.cpu_s_per_gb, ours.cpu_s_per_gb)
        table.add_row(name, *(f"{value:.3g}" for value in row))
    Console(width=132).print(table)
    Console(width=132).print(
        f"restart of {restarted.pages} pages: {restarted.seconds:.2f} s; index: {restarted.index_bytes_per_page:.0f} B a page"
    )
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(figures, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
