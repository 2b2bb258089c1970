"""`python -m experiments.bandwidth.before TREE`: the transports of this checkout beside those of another one, in one run.

TREE is the checkout to compare with, such as `git worktree add --detach ../before COMMIT` makes. Both run under this interpreter,
each with a node and a client of its own, and take turns within each cell: whatever else the machine does hits both alike. A ratio
is the median of the rounds' ratios, after / before.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import geometric_mean, median

from attnstore.command_line import CommandParser
from attnstore.testing import StoreProcess
from experiments.bandwidth.field import node_options
from experiments.bandwidth.lane import Sample, Start
from experiments.bandwidth.pages import Shape
from experiments.bandwidth.processes import ROOT, Child
from experiments.bandwidth.report import aligned
from experiments.bandwidth.results import PAGE_BYTES_LARGE, PAGE_BYTES_SMALL
from experiments.options import COUNT

_CELL_S = 0.04
_SHAPES = ((Shape(PAGE_BYTES_SMALL, 256), (1, 8, 32, 256)), (Shape(PAGE_BYTES_LARGE, 32), (1, 32)))

Pair = tuple[Sample, Sample]
"""Before and after, of one round."""


def compare(before: Path, shape: Shape, batches: Sequence[int], rounds: int, seconds: float) -> dict[tuple[str, int], list[Pair]]:
    """The rounds of each verb and batch."""
    found: dict[tuple[str, int], list[Pair]] = {}
    with _lane(before, shape) as old, _lane(ROOT, shape) as new:
        known = json.loads(old.first_line())
        verbs = [verb for verb in json.loads(new.first_line()) if verb in known]
        for number in range(rounds):
            for verb in verbs:
                for batch in batches:
                    question = json.dumps({"verb": verb, "batch": batch, "seconds": seconds})
                    turns = (old, new) if number % 2 == 0 else (new, old)
                    samples = {lane: Sample(**json.loads(lane.ask(question))) for lane in turns}
                    found.setdefault((verb, batch), []).append((samples[old], samples[new]))
    return found


@contextmanager
def _lane(tree: Path, shape: Shape) -> Iterator[Child]:
    """The client of a node, both as they are in that checkout: Python looks for modules where it is started."""
    there = ("env", "-C", str(tree))
    with ExitStack() as stack:
        node = stack.enter_context(StoreProcess(*node_options(shape), under=there))
        start = Start(shape.page_bytes, shape.pages, node.url, (node.process.pid,))
        command = [*there, sys.executable, "-m", "experiments.bandwidth.lanes.store", start.to_argument()]
        yield stack.enter_context(Child(command))


def _cpu_ns(sample: Sample) -> float:
    return (sample.client_ns + sample.server_ns) / sample.bytes


def _ratios(pairs: list[Pair]) -> tuple[float, float]:
    """Of throughput and of processor time a byte."""
    return (
        median(new.gb_per_s / old.gb_per_s for old, new in pairs),
        median(_cpu_ns(new) / _cpu_ns(old) for old, new in pairs),
    )


def main() -> int:
    """Measures, and prints a line for each cell and one for each transport."""
    parser = CommandParser("python -m experiments.bandwidth.before", description="This checkout beside another one.")
    parser.add_argument("tree", type=Path, metavar="TREE", help="the checkout to compare with")
    parser.add_argument("--rounds", type=COUNT, default=20, metavar="N", help="of each cell (%(default)s)")
    options = parser.parse_args()
    lines = [("page B", "transport", "batch", "before GB/s", "after GB/s", "after / before", "CPU after / before")]
    of_verb: dict[str, list[tuple[float, float]]] = {}
    for shape, batches in _SHAPES:
        found = compare(options.tree.resolve(), shape, batches, options.rounds, _CELL_S)
        for (verb, batch), pairs in sorted(found.items()):
            ratios = _ratios(pairs)
            of_verb.setdefault(verb, []).append(ratios)
            speeds = [median(pair[side].gb_per_s for pair in pairs) for side in (0, 1)]
            lines.append((f"{shape.page_bytes:,}", verb, str(batch), *(f"{figure:.2f}" for figure in (*speeds, *ratios))))
    means = [(verb, *(f"{geometric_mean(side):.3f}" for side in zip(*ratios, strict=True))) for verb, ratios in of_verb.items()]
    print(aligned(lines, left=("transport",)))
    print(aligned([("transport", "after / before", "CPU after / before"), *means], left=("transport",)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
