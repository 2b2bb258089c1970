"""`python -m experiments.shaped`: does the store fill a cable of 1 or 10 Gb/s, in both directions, with one client and with four?

Owns: the measurement over network namespaces (root, `ip` and `tc` needed). A node runs on one host and client processes on the
other; all clients move pages at once, 32 per call. The figure is the payload delivered divided by the time from the first request
to the last answer, so that a client that starves lowers it; the bound is the shaped rate, headers included.
"""

from __future__ import annotations

import json
import sys
import time
from contextlib import ExitStack
from dataclasses import asdict, dataclass

from attnstore.command_line import CommandParser
from attnstore.option_types import file_to_write
from attnstore.testing import StoreProcess
from attnstore.testing.netns import ShapedLink
from experiments.bandwidth.lane import Start
from experiments.bandwidth.lanes.store import KEEPS
from experiments.bandwidth.processes import Child
from experiments.bandwidth.report import aligned
from experiments.options import COUNT, POSITIVE

_PAGE_BYTES = 368_640
_PAGES = 64
_BATCH = 32
_CAPACITY = "1GiB"
_SHARE_MIN = 0.95


@dataclass(frozen=True, slots=True)
class Row:
    """One cell: `share` is `gb_per_s` (10^9 bytes of payload) over the cable's rate."""

    transport: str
    op: str
    gbit_per_s: float
    clients: int
    gb_per_s: float
    share: float


def measure(gbit_per_s: float, clients: int, transports: list[str], seconds: float) -> list[Row]:
    """Measures raw TCP and every transport, in both directions, over one cable."""
    rows = []
    with ShapedLink(f"{gbit_per_s:f}g") as link, ExitStack() as stack:
        with link.node.entered():
            node = stack.enter_context(
                StoreProcess("--listen", f"{link.node.address}:0", "--insecure", "--capacity", _CAPACITY, "--log-level", "error")
            )
            limit = _lanes(stack, "raw_tcp", Start(_PAGE_BYTES, _PAGES, link.node.address, variant="server"), 1)[0]
        with link.client.entered():
            lanes = {
                "raw_tcp": _lanes(stack, "raw_tcp", Start(_PAGE_BYTES, _PAGES, limit.first_line()), clients),
                "store": _lanes(stack, "store", Start(_PAGE_BYTES, _PAGES, node.url, (node.process.pid,), KEEPS), clients),
            }
        for lane in [*lanes["raw_tcp"], *lanes["store"]]:
            lane.first_line()
        for transport in ["raw_tcp", *transports]:
            for op in ("read", "write"):
                achieved = _gb_per_s(lanes.get(transport, lanes["store"]), f"{transport} {op}", seconds)
                rows.append(Row(transport, op, gbit_per_s, clients, achieved, achieved * 8 / gbit_per_s))
    return rows


def _lanes(stack: ExitStack, name: str, start: Start, count: int) -> list[Child]:
    """Starts processes of one kind, on the host of this thread."""
    return [stack.enter_context(Child.of_module(f"experiments.bandwidth.lanes.{name}", start.to_argument())) for _ in range(count)]


def _gb_per_s(lanes: list[Child], verb: str, seconds: float) -> float:
    """Runs all lanes at once."""
    began = time.perf_counter()
    for lane in lanes:
        lane.tell(json.dumps({"verb": verb, "batch": _BATCH, "seconds": seconds}))
    moved_bytes = sum(json.loads(lane.answer())["bytes"] for lane in lanes)
    return float(moved_bytes / (time.perf_counter() - began) / 1e9)


def main() -> int:
    """Measures, prints, writes. Always returns 0."""
    parser = CommandParser("python -m experiments.shaped", description="Share of a shaped link that the store fills.")
    parser.add_argument("--gbit", type=POSITIVE, nargs="+", default=[1.0, 10.0], help="rates of the cable in Gb/s")
    parser.add_argument("--clients", type=COUNT, nargs="+", default=[1, 4], help="client processes at once")
    parser.add_argument("--transports", nargs="+", default=["tcp", "grpc"])
    parser.add_argument("--seconds", type=POSITIVE, default=5.0, help="for each cell")
    parser.add_argument("--json", type=file_to_write, metavar="PATH", help="write the rows")
    options = parser.parse_args()
    rows = [
        row
        for gbit_per_s in options.gbit
        for clients in options.clients
        for row in measure(gbit_per_s, clients, options.transports, options.seconds)
    ]
    print(table(rows))
    if options.json:
        options.json.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")
    return 0


def table(rows: list[Row]) -> str:
    """Returns one line per cell."""
    lines = [("transport", "op", "Gb/s", "clients", "GB/s", "share", f">= {_SHARE_MIN:.0%}")]
    lines += [
        (
            row.transport,
            row.op,
            f"{row.gbit_per_s:g}",
            str(row.clients),
            f"{row.gb_per_s:.3f}",
            f"{row.share:.1%}",
            "met" if row.share >= _SHARE_MIN else "MISSED",
        )
        for row in rows
    ]
    return aligned(lines, left=("transport", "op"))


if __name__ == "__main__":
    sys.exit(main())
