"""The command line; see the package and docs/performance.md."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from attnstore.command_line import CommandParser
from attnstore.limits import THREADS_MAX
from attnstore.option_types import Whole
from experiments.loop_lag.calls import calls
from experiments.loop_lag.measure import measure
from experiments.options import COUNT


def main(argv: Sequence[str] | None = None) -> int:
    """Measures and prints."""
    parser = CommandParser(prog="python -m experiments.loop_lag", description=__doc__)
    parser.add_argument("--tries", type=COUNT, default=3, help="runs of each call, of which the best counts (default 3)")
    parser.add_argument(
        "--attend-threads", type=Whole(0, THREADS_MAX), default=1, help="cores that answer queries; 0: none (default 1)"
    )
    arguments = parser.parse_args(argv)
    table = Table("RPC", "size", "loop lag ms", "loop busy ms", "lock held ms")
    for row in measure(attend_threads=arguments.attend_threads, tries=arguments.tries, calls=calls()):
        table.add_row(row.rpc, row.size, *(f"{value:.1f}" for value in (row.lag_ms, row.busy_ms, row.lock_ms)))
    Console().print(table)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
