"""`python -m experiments.bandwidth.before TREE`: the transports of this checkout compared with those of another one, in one run.

TREE is the other checkout, for example made by `git worktree add --detach ../before COMMIT`. Both run under this interpreter, each
with a node and a client of its own, and take turns within each cell, so that other load on the machine affects both alike. A ratio
is the median of the rounds' ratios, after / before.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from itertools import product
from operator import attrgetter
from pathlib import Path
from statistics import geometric_mean

from attnstore.command_line import CommandParser
from attnstore.testing import StoreProcess
from experiments.bandwidth.field import measured, node_options
from experiments.bandwidth.lane import Start
from experiments.bandwidth.pages import Shape
from experiments.bandwidth.processes import ROOT, Child
from experiments.bandwidth.report import aligned
from experiments.bandwidth.results import PAGE_BYTES_LARGE, PAGE_BYTES_SMALL, Cell, Results
from experiments.options import COUNT

_CELL_S = 0.04
_SHAPES = ((Shape(PAGE_BYTES_SMALL, 256), (1, 8, 32, 256)), (Shape(PAGE_BYTES_LARGE, 32), (1, 32)))


def compare(before: Path, shape: Shape, batches: Sequence[int], rounds: int, seconds: float) -> Results:
    """Returns the rounds of this checkout, and in cells of their own (`_before`) those of the other."""
    found = Results()
    with _lane(before, shape) as old, _lane(ROOT, shape) as new:
        known = json.loads(old.first_line())
        verbs = [verb for verb in json.loads(new.first_line()) if verb in known]
        for number in range(rounds):
            for verb, batch in product(verbs, batches):
                transport, op = verb.split()
                cell = Cell(transport, op, shape.page_bytes, batch)
                sides = ((old, _before(cell)), (new, cell))
                for lane, of_lane in sides if number % 2 == 0 else reversed(sides):
                    found.add(of_lane, measured(lane, verb, batch, seconds))
    return found


def _before(cell: Cell) -> Cell:
    return replace(cell, transport=f"before:{cell.transport}")


@contextmanager
def _lane(tree: Path, shape: Shape) -> Iterator[Child]:
    """Starts a node's client from that checkout: Python imports modules from the folder in which it is started."""
    there = ("env", "-C", str(tree))
    with ExitStack() as stack:
        node = stack.enter_context(StoreProcess(*node_options(shape), under=there))
        start = Start(shape.page_bytes, shape.pages, node.url, (node.process.pid,))
        command = [*there, sys.executable, "-m", "experiments.bandwidth.lanes.store", start.to_argument()]
        yield stack.enter_context(Child(command))


def main() -> int:
    """Measures, and prints one line per cell and one per transport."""
    parser = CommandParser("python -m experiments.bandwidth.before", description="This checkout beside another one.")
    parser.add_argument("tree", type=Path, metavar="TREE", help="the checkout to compare with")
    parser.add_argument("--rounds", type=COUNT, default=20, metavar="N", help="of each cell (%(default)s)")
    options = parser.parse_args()
    lines: list[tuple[str, ...]] = [
        ("page B", "transport", "batch", "before GB/s", "after GB/s", "after / before", "CPU after / before")
    ]
    of_verb: dict[str, list[tuple[float, float]]] = {}
    for shape, batches in _SHAPES:
        found = compare(options.tree.resolve(), shape, batches, options.rounds, _CELL_S)
        for cell in sorted(cell for cell in found.samples if _before(cell) in found.samples):
            ratios = (found.ratio(cell, _before(cell)), found.ratio(cell, _before(cell), of=attrgetter("cpu_s_per_gb")))
            of_verb.setdefault(cell.verb, []).append(ratios)
            figures = (found.gb_per_s(_before(cell)), found.gb_per_s(cell), *ratios)
            lines.append((f"{cell.page_bytes:,}", cell.verb, str(cell.batch), *(f"{figure:.2f}" for figure in figures)))
    means = [(verb, *(f"{geometric_mean(side):.3f}" for side in zip(*ratios, strict=True))) for verb, ratios in of_verb.items()]
    print(aligned(lines, left=("transport",)))
    print(aligned([("transport", "after / before", "CPU after / before"), *means], left=("transport",)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
