"""The command line of the replay; see the package."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from rich.console import Console

from attnstore.core.eviction import EVICTION_POLICIES
from attnstore.errors import AttnStoreError
from experiments.replay.bound import bound_hits
from experiments.replay.hash_only import UNLIMITED, Capacity, Replay, capacity_blocks, replay
from experiments.replay.plot import save_plot
from experiments.replay.report import LOOK_AHEAD, summary, table
from experiments.replay.trace import Trace, read_trace

_EXIT_USAGE: Final = 2
_CAPACITIES: Final[tuple[Capacity, ...]] = (500_000, 1_000_000, 3_000_000, 10_000_000, 30_000_000, UNLIMITED)
_QUEUE_DEPTHS: Final = (8, 32, 128)
_QUEUE_DEPTH: Final = 32


def main(argv: Sequence[str] | None = None) -> int:
    """Replays and prints; 0, or 2 after one line on standard error that says what is wrong with the input."""
    arguments = _parser().parse_args(argv)
    try:
        trace = read_trace(arguments.trace)
        print(summary(trace))
        replays = _replays(trace, arguments)
        Console().print(table(replays))
        if arguments.json is not None:
            rows = [each.as_json() for each in replays]
            arguments.json.write_text(json.dumps(rows if arguments.policy is None else rows[0], indent=1) + "\n")
        if arguments.plot is not None:
            save_plot(replays, arguments.plot)
    except (AttnStoreError, OSError) as error:
        print(f"experiments.replay: {error}", file=sys.stderr)
        return _EXIT_USAGE
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.replay",
        description="Block hits of a trace under each eviction policy. Without --policy: all of them at several capacities.",
    )
    add = parser.add_argument
    add("--trace", type=Path, required=True, metavar="FILE", help="in Mooncake's JSONL format, blocks of 512 tokens")
    add("--hash-only", action="store_true", help="decide by block hashes, without a model (the only way there is, and the default)")
    add("--capacity-tokens", type=_capacity, metavar="N", help="size of the cache, or inf (default with --policy: inf)")
    add("--policy", choices=EVICTION_POLICIES, help="replay this one only")
    add("--queue-depth", type=_depth, metavar="D", help=f"requests that wait behind the running one (default {_QUEUE_DEPTH})")
    add("--json", type=Path, metavar="PATH", help="write the figures: one object with --policy, else a list of them")
    add("--plot", type=Path, metavar="PATH", help="write a PNG")
    return parser


def _replays(trace: Trace, arguments: argparse.Namespace) -> list[Replay]:
    everything = arguments.policy is None
    policies = EVICTION_POLICIES if everything else (arguments.policy,)
    capacities = _CAPACITIES if everything else (UNLIMITED,)
    depths = _QUEUE_DEPTHS if everything else (_QUEUE_DEPTH,)
    if arguments.capacity_tokens is not None:
        capacities = (arguments.capacity_tokens,)
    if arguments.queue_depth is not None:
        depths = (arguments.queue_depth,)
    bounds = {capacity: bound_hits(trace, capacity_blocks(trace, capacity)) for capacity in capacities}
    return [
        replay(trace, policy, capacity, depth, bounds[capacity])
        for policy in policies
        for depth in (depths if policy == LOOK_AHEAD else depths[:1])
        for capacity in capacities
    ]


def _capacity(text: str) -> Capacity:
    return UNLIMITED if text == UNLIMITED else _whole(text, 1)


def _depth(text: str) -> int:
    return _whole(text, 0)


def _whole(text: str, least: int) -> int:
    if not text.isdecimal() or int(text) < least:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least {least}")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
