"""The command line of the measurement; see the package."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict
from statistics import median
from typing import Any, Final

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from attnstore.command_line import CommandParser
from attnstore.limits import THREADS_MAX
from attnstore.option_types import Whole, file_to_write
from attnstore.testing import StoreProcess
from attnstore.testing.link import Link
from experiments.bandwidth.processes import Child
from experiments.options import SEED
from experiments.penalty.claims import cells, claims
from experiments.penalty.grid import FULL, QUICK, Cell, Grid, LinkCell
from experiments.penalty.results import Results, machine
from experiments.penalty.worker import Start

_CAPACITY: Final = "1GiB"
_FAULT_SHARE: Final = 0.3
"""A link fails after this share of the time that fetching everything would take."""
_SETTLE_S: Final = 1.5
"""After a failure the worker does not use the store for a second."""
_RETRIES: Final = 3
_FAULTS: Final = ("rate/100", "stall")


class Sweep:
    """One run over a grid, in an order in which compared cells are measured one right after the other."""

    def __init__(self, grid: Grid, results: Results, link: Link, worker: Child, progress: Progress) -> None:
        self._grid = grid
        self._results = results
        self._link = link
        self._worker = worker
        self._progress = progress
        self._page_bytes = 0
        lines = sum(len(grid.cells(each)) for each in grid.links()) + len(_FAULTS) * len(grid.faults) + len(grid.decodes)
        self._task = progress.add_task("filling the store", total=lines)

    def run(self) -> None:
        """Runs all cells that the results do not have yet."""
        contexts = {*self._grid.contexts_tokens, *(context for _, context in (*self._grid.faults, *self._grid.decodes))}
        self._page_bytes = self._ask("fill", contexts=sorted(contexts))["page_bytes"]
        for link in self._grid.links():
            missing = [cell for cell in self._grid.cells(link) if not self._results.has(**_names(cell))]
            self._progress.advance(self._task, len(self._grid.cells(link)) - len(missing))
            if missing:
                self._enter(link)
            for cell in missing:
                self._say(link, f"{cell.context_tokens} tokens, hits {cell.hit_rate:g}")
                self._results.add(**self._row(cell))
                self._progress.advance(self._task)
        for link, context in self._grid.faults:
            for fault in _FAULTS:
                if not self._results.has(fault=fault, rtt_ms=link.rtt_ms, gbit_per_s=link.gbit_per_s, context_tokens=context):
                    self._say(link, f"{context} tokens, {fault}")
                    self._fault(link, context, fault)
                self._progress.advance(self._task)
        for link, context in self._grid.decodes:
            self._say(link, f"{context} tokens, decoding")
            self._decode(link, context)
            self._progress.advance(self._task)

    def _row(self, cell: Cell) -> dict[str, Any]:
        """Returns a cell's medians. Rounds take turns, so that a slow moment of the machine affects all ways alike."""
        samples: dict[str, list[float]] = {"recompute": [], "fetch": [], "planner": []}
        decisions = []
        for _ in range(self._grid.rounds):
            for way in ("recompute", "planner", "fetch"):
                if self._is_long(samples[way]):
                    continue
                answer = self._ask("measure", way=way, context=cell.context_tokens, hit_rate=cell.hit_rate)
                samples[way].append(answer["ttft_ms"])
                if way == "planner":
                    decisions.append(answer["decision"])
        for _ in range(_RETRIES):
            if any(decision["predicted_ttft_ms"] for decision in decisions):
                break
            # After its failure, the link's estimates are unknown.
            self._enter(cell.link)
            answer = self._ask("measure", way="planner", context=cell.context_tokens, hit_rate=cell.hit_rate)
            samples["planner"].append(answer["ttft_ms"])
            decisions.append(answer["decision"])
        predictions = [decision["predicted_ttft_ms"] for decision in decisions if decision["predicted_ttft_ms"]]
        return {
            **_names(cell),
            **{f"{way}_ttft_ms": round(median(times), 2) for way, times in samples.items()},
            "choice": Counter(decision["choice"] for decision in decisions).most_common(1)[0][0],
            "predicted_ttft_ms": round(median(predictions), 2),
            "samples_ms": {way: [round(value, 1) for value in times] for way, times in samples.items()},
            "decisions": decisions,
        }

    def _fault(self, link: LinkCell, context: int, fault: str) -> None:
        recomputed: list[float] = []
        planned: list[float] = []
        for _ in range(self._grid.rounds):
            if self._is_long(recomputed):
                break
            self._enter(link)
            recomputed.append(self._ask("measure", way="recompute", context=context, hit_rate=1.0)["ttft_ms"])
            self._worker.tell(json.dumps({"verb": "measure", "way": "planner", "context": context, "hit_rate": 1.0}))
            time.sleep(_FAULT_SHARE * link.transfer_s(self._bytes(context)))
            if fault == "stall":
                self._link.stall()
            else:
                self._link.change(LinkCell(link.rtt_ms, link.gbit_per_s / 100).spec)
            planned.append(json.loads(self._worker.answer())["ttft_ms"])
            self._link.restore()
            time.sleep(_SETTLE_S)
        self._results.add(
            fault=fault,
            rtt_ms=link.rtt_ms,
            gbit_per_s=link.gbit_per_s,
            context_tokens=context,
            recompute_ttft_ms=round(median(recomputed), 2),
            planner_ttft_ms=round(median(planned), 2),
            samples_ms={"recompute": recomputed, "planner": planned},
        )

    def _is_long(self, times_ms: Sequence[float]) -> bool:
        return bool(times_ms) and times_ms[0] > self._grid.once_s * 1000

    def _decode(self, link: LinkCell, context: int) -> None:
        row = {"rtt_ms": link.rtt_ms, "gbit_per_s": link.gbit_per_s, "context_tokens": context}
        if self._results.has(**row, residence="resident"):
            return
        self._link.change(link.spec)
        for residence, itl_ms in reversed(self._ask("decode", context=context).items()):
            self._results.add(**row, residence=residence, itl_ms=round(itl_ms, 3))

    def _enter(self, link: LinkCell) -> None:
        self._link.change(link.spec)
        self._ask("calibrate")

    def _bytes(self, context: int) -> int:
        return context // 16 * self._page_bytes

    def _ask(self, verb: str, **arguments: Any) -> dict[str, Any]:
        answer: dict[str, Any] = json.loads(self._worker.ask(json.dumps({"verb": verb, **arguments})))
        return answer

    def _say(self, link: LinkCell, what: str) -> None:
        self._progress.update(self._task, description=f"{link.gbit_per_s:g} Gb/s, {link.rtt_ms:g} ms: {what}")


def _names(cell: Cell) -> dict[str, Any]:
    return {**asdict(cell.link), "context_tokens": cell.context_tokens, "hit_rate": cell.hit_rate}


def main(argv: Sequence[str] | None = None) -> int:
    """Measures, writes and prints. Always returns 0, because slow figures on a busy machine are not an error."""
    options = _parser().parse_args(argv)
    grid = QUICK if options.quick else FULL
    console = Console()
    common = {"machine": machine(), "seed": options.seed, "transport": options.transport, "threads": options.threads}
    results = Results(options.json, common, resume=options.resume)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    began_s = time.monotonic()
    with ExitStack() as stack:
        node = stack.enter_context(StoreProcess("--capacity", _CAPACITY, "--log-level", "error"))
        link = stack.enter_context(Link.to_node(node.url, "loopback", seed=options.seed))
        start = Start(node.url, link.url, options.transport, options.seed, options.threads)
        worker = stack.enter_context(Child.of_module("experiments.penalty.worker", json.dumps(asdict(start))))
        worker.first_line()
        progress = stack.enter_context(Progress(*columns, console=console, disable=not sys.stderr.isatty()))
        Sweep(grid, results, link, worker, progress).run()
    console.print(cells(results.rows), claims(results.rows))
    console.print(f"The run took {time.monotonic() - began_s:.0f} s.")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = CommandParser("python -m experiments.penalty", description="What the network costs as an LLM's memory.")
    add = parser.add_argument
    add("--json", type=file_to_write, required=True, metavar="PATH", help="write the rows to this file, one JSON object a line")
    add("--quick", action="store_true", help="a 3 x 3 grid of links: ends within 5 minutes")
    add("--resume", action="store_true", help="keep the rows that PATH has and measure the rest")
    add("--transport", default="tcp", choices=("tcp", "grpc"), help="how pages travel (default tcp)")
    add(
        "--threads",
        type=Whole(1, THREADS_MAX),
        default=1,
        metavar="N",
        help="compute threads (default 1: the other core moves pages)",
    )
    add("--seed", type=SEED, default=0, help="of prompts and jitter (default 0)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
