"""The demonstration: a second worker answers from KV pages that a first worker computed, fetched over gRPC from a store node.

    python -m experiments.demo [--document FILE] [--json PATH] [--dtype bf16]

Starts a store node and, one after another, three worker processes on the same long prompt: cold (the store is empty), warm (the
store has the pages) and a control without a store. Each is a process of its own, so nothing but pages passes between them.
"""

from __future__ import annotations

import argparse
import json
import pydoc_data.topics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file

from attnstore.command_line import CommandParser
from attnstore.option_types import file_to_write
from attnstore.testing import StoreProcess
from experiments.options import COUNT

_WORKER_S_MAX: Final = 900.0
"""Time limit of one worker: a first conversion of the model, and the prompt on a slow machine."""


@dataclass(frozen=True, slots=True)
class DemoFigures:
    """The content of `--json`. TTFT is measured inside the worker, with the model loaded; `speedup` is cold over warm."""

    prompt_tokens: int
    hit_tokens: int
    ttft_cold_ms: float
    ttft_warm_ms: float
    ttft_control_ms: float
    speedup: float
    bytes_read: int
    tokens_equal: bool
    kv_bytes_used: int
    kv_bytes_contiguous: int


@dataclass(frozen=True, slots=True)
class WorkerRun:
    """The report of one worker process (see `attnstore_worker.report`), and the file with its logits."""

    report: dict[str, Any]
    logits: Path


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the demonstration. Returns 0 if the tokens of all runs are equal, as they must be in fp32."""
    arguments = _parser().parse_args(argv)
    console = Console()
    with tempfile.TemporaryDirectory(prefix="attnstore-demo-") as scratch:
        folder = Path(scratch)
        prompt = folder / "prompt.txt"
        prompt.write_text(_document(arguments.document), encoding="utf-8")
        with StoreProcess("--capacity", arguments.capacity) as node:
            console.print(f"A store node listens on {node.address}.")
            cold = _run_worker("cold", prompt, folder, arguments, node.url)
            console.print(f"A first worker has computed the prompt and written {_mb(cold.report['bytes_written'])} of pages.")
            warm = _run_worker("warm", prompt, folder, arguments, node.url)
            console.print(f"A second worker has read {_mb(warm.report['bytes_read'])} of them.")
        console.print("The control computes everything itself.")
        control = _run_worker("control", prompt, folder, arguments, None)
        difference, compared = _logit_difference(cold, warm)
    figures = _figures(cold.report, warm.report, control.report)
    console.print(_table(figures, cold.report, warm.report, difference, compared, arguments.transport))
    console.print(_memory_line(figures))
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(asdict(figures), indent=2) + "\n")
    return 0 if figures.tokens_equal or arguments.dtype != "fp32" else 1


def _parser() -> argparse.ArgumentParser:
    parser = CommandParser(prog="experiments.demo", description="A second worker answers from a first worker's pages.")
    add = parser.add_argument
    add("--document", type=Path, metavar="FILE", help="text of the prompt (default: Python's own manual)")
    add("--prompt-tokens", type=COUNT, default=4096, metavar="N", help="use its first N tokens (default 4096)")
    add("--max-tokens", type=COUNT, default=64, metavar="N", help="tokens to generate (default 64)")
    add("--model", type=Path, metavar="PATH", help="GGUF file or Hugging Face folder (default: SmolLM2-135M-Instruct)")
    add("--dtype", choices=("fp32", "bf16"), default="fp32", help="of weights and KV (default fp32)")
    add("--transport", default="grpc", metavar="NAME", help="how pages travel: grpc (default), tcp, shm or auto")
    add("--capacity", default="1GiB", metavar="SIZE", help="of the store node (default 1GiB)")
    add("--json", type=file_to_write, metavar="PATH", help="also write the figures to this file")
    return parser


def _document(path: Path | None) -> str:
    """Returns the text of the prompt: the named file, or English text that comes with every Python."""
    if path is not None:
        return path.read_text(encoding="utf-8")
    topics = pydoc_data.topics.topics
    return "\n\n".join(topics[name] for name in sorted(topics))


def _run_worker(name: str, prompt: Path, folder: Path, arguments: argparse.Namespace, store: str | None) -> WorkerRun:
    logits = folder / f"{name}.safetensors"
    command = [sys.executable, "-m", "attnstore_worker.cli", "generate", "--json", "--ignore-stop"]
    command += ["--prompt-file", str(prompt), "--prompt-tokens", str(arguments.prompt_tokens)]
    command += ["--max-tokens", str(arguments.max_tokens), "--dtype", arguments.dtype, "--logits", str(logits)]
    command += ["--model", str(arguments.model)] if arguments.model else []
    command += ["--store", store, "--transport", arguments.transport] if store else []
    # It inherits our standard error: progress on a terminal, and the reason of a failure.
    finished = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=_WORKER_S_MAX, check=False)
    if finished.returncode != 0:
        raise SystemExit(f"the {name} worker failed with status {finished.returncode}")
    return WorkerRun(json.loads(finished.stdout), logits)


def _figures(cold: dict[str, Any], warm: dict[str, Any], control: dict[str, Any]) -> DemoFigures:
    return DemoFigures(
        prompt_tokens=warm["prompt_tokens"],
        hit_tokens=warm["hit_tokens"],
        ttft_cold_ms=cold["ttft_ms"],
        ttft_warm_ms=warm["ttft_ms"],
        ttft_control_ms=control["ttft_ms"],
        speedup=cold["ttft_ms"] / warm["ttft_ms"],
        bytes_read=warm["bytes_read"],
        tokens_equal=cold["tokens"] == warm["tokens"] == control["tokens"],
        kv_bytes_used=warm["kv_bytes_used"],
        kv_bytes_contiguous=warm["kv_bytes_contiguous"],
    )


def _logit_difference(cold: WorkerRun, warm: WorkerRun) -> tuple[float, int]:
    """Returns the largest difference between the runs' logits, over the tokens drawn after equal texts, and their number."""
    pairs = zip(cold.report["tokens"], warm.report["tokens"], strict=True)
    equal = next((index for index, (left, right) in enumerate(pairs) if left != right), len(cold.report["tokens"]))
    compared = min(equal + 1, len(cold.report["tokens"]))
    left, right = (load_file(run.logits)["logits"][:compared] for run in (cold, warm))
    return float((left - right).abs().max()), compared


def _table(
    figures: DemoFigures, cold: dict[str, Any], warm: dict[str, Any], difference: float, compared: int, transport: str
) -> Table:
    table = Table(title=f"{warm['model']}, {warm['dtype']}", show_header=False)
    table.add_column(justify="left")
    table.add_column(justify="right")
    read_s = warm["read_ms"] / 1e3
    rows = {
        "prompt tokens": f"{figures.prompt_tokens:,}",
        "hit tokens": f"{figures.hit_tokens:,}",
        "TTFT cold": f"{figures.ttft_cold_ms:,.0f} ms",
        "TTFT warm": f"{figures.ttft_warm_ms:,.0f} ms",
        "TTFT control, no store": f"{figures.ttft_control_ms:,.0f} ms",
        "speed-up, cold / warm": f"{figures.speedup:.1f} x",
        f"bytes over the network ({transport})": f"{_mb(cold['bytes_written'])} out, {_mb(figures.bytes_read)} in",
        "effective read rate": f"{figures.bytes_read / 1e9 / read_s:.2f} GB/s" if figures.bytes_read else "nothing was read",
        "tokens equal": "yes" if figures.tokens_equal else "no",
        f"largest logit difference, {compared} tokens": f"{difference:.2g}",
    }
    for name, value in rows.items():
        table.add_row(name, value)
    return table


def _memory_line(figures: DemoFigures) -> str:
    share = figures.kv_bytes_used / figures.kv_bytes_contiguous
    return (
        f"KV memory: the page pool used {_mb(figures.kv_bytes_used)}; a contiguous reservation of the maximum length would have "
        f"held {_mb(figures.kv_bytes_contiguous)} ({share:.0%} of it used)."
    )


def _mb(size_bytes: int) -> str:
    return f"{size_bytes / 1e6:.1f} MB"


if __name__ == "__main__":
    sys.exit(main())
