"""The command line; see the package and docs/performance.md."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from experiments.loop_lag.measure import measure


def main(argv: Sequence[str] | None = None) -> int:
    """Measures and prints."""
    parser = argparse.ArgumentParser(prog="python -m experiments.loop_lag", description=__doc__)
    parser.add_argument("--tries", type=int, default=3, help="runs of each call, of which the best counts (default 3)")
    parser.add_argument("--attend-threads", type=int, default=1, help="cores that answer queries; 0: none (default 1)")
    arguments = parser.parse_args(argv)
    table = Table("RPC", "size", "loop lag ms", "loop busy ms", "lock held ms")
    for row in measure(attend_threads=arguments.attend_threads, tries=arguments.tries):
        table.add_row(row.rpc, row.size, *(f"{value:.1f}" for value in (row.lag_ms, row.busy_ms, row.lock_ms)))
    Console().print(table)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
