"""CPU attention compared with the speed at which its keys can be read.

    python -m experiments.attention [--json PATH] [--quick] [--threads N]

Every row times three actions in turns, so that other load on the machine affects all of them: attention over scattered blocks, a
plain read of the slices that it needs (the limit), and a read of as many contiguous bytes. All use the same number of threads (one
by default) and rotate through layers and block tables so that no call finds its slices in a private cache. A time is the lower
quartile of its calls, because other work on the machine lengthens a call and never shortens it. Decode is one query row per
sequence, verify five (a speculative step), prefill the last 512 tokens of the context. `gather_sdpa` is the way of a worker without
a paged kernel: index the pool, then torch's scaled_dot_product_attention.

Geometry: SmolLM2-135M (9 query heads on 3 KV heads of 64) and Llama-3-8B (32 on 8 of 128), bf16, 16 tokens per block; the pool has
the order of pages. GB/s counts the bytes of keys and values once per call, 1e9 bytes per second.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch
from numba import njit
from rich.console import Console
from rich.table import Table
from torch import Tensor

from attnstore.attention import AttentionBackend, create_attention
from attnstore.command_line import CommandParser
from attnstore.limits import THREADS_MAX
from attnstore.option_types import Whole, file_to_write

BLOCK_TOKENS: Final = 16
LAYERS: Final = 8
POOL_BYTES: Final = 1_500_000_000
ROWS: Final = {"decode": 1, "verify": 5, "prefill": 512}
_SECONDS_PER_ROW: Final = {False: 2.0, True: 0.7}
_CALLS_MIN: Final = 7
_WARM_UP_CALLS: Final = 2

Words = npt.NDArray[np.uint64]


@dataclass(frozen=True, slots=True)
class Geometry:
    """A model's attention."""

    model: str
    q_heads: int
    kv_heads: int
    head_dim: int

    @property
    def layer_bytes(self) -> int:
        """Bytes of keys and values of one layer of one block, bf16."""
        return 2 * self.kv_heads * BLOCK_TOKENS * self.head_dim * 2


SMOLLM2: Final = Geometry("SmolLM2-135M", 9, 3, 64)
LLAMA3: Final = Geometry("Llama-3-8B", 32, 8, 128)


@dataclass(frozen=True, slots=True)
class Point:
    """The parameters of one row."""

    geometry: Geometry
    backend: str
    phase: str
    context_tokens: int
    batch: int

    @property
    def blocks(self) -> int:
        """Blocks that one call reads."""
        return self.batch * self.context_tokens // BLOCK_TOKENS


@dataclass(frozen=True, slots=True)
class Row:
    """One result; rates in GB/s, `ms` is one call, `of_limit` is `gb_per_s / read_limit_gb_per_s`."""

    model: str
    backend: str
    phase: str
    context_tokens: int
    batch: int
    threads: int
    ms: float
    gb_per_s: float
    read_limit_gb_per_s: float
    contiguous_read_gb_per_s: float
    of_limit: float


def main(argv: Sequence[str] | None = None) -> int:
    """Measures, prints a table and writes `--json`."""
    arguments = _parser().parse_args(argv)
    torch.set_num_threads(arguments.threads)
    rows = []
    for geometry in (SMOLLM2,) if arguments.quick else (SMOLLM2, LLAMA3):
        pool = _pool(geometry)
        rows += [
            _measure(point, pool, arguments.threads, _SECONDS_PER_ROW[arguments.quick])
            for point in _points(geometry, arguments.quick)
            if point.blocks <= len(pool)
        ]
    Console().print(_table(rows))
    if arguments.json is not None:
        arguments.json.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = CommandParser(prog="python -m experiments.attention", description=__doc__.partition("\n")[0])
    parser.add_argument("--json", type=file_to_write, metavar="PATH", help="write the rows as a list of objects")
    parser.add_argument("--quick", action="store_true", help="one model and fewer points, within half a minute")
    parser.add_argument(
        "--threads", type=Whole(1, THREADS_MAX), default=1, metavar="N", help="threads for attention and reads alike (default 1)"
    )
    return parser


def _points(geometry: Geometry, quick: bool) -> Iterator[Point]:
    contexts = (1024, 8192) if quick else (1024, 4096, 8192, 32768)
    for context_tokens in contexts:
        yield Point(geometry, "cpu", "decode", context_tokens, 1)
        yield Point(geometry, "gather_sdpa", "decode", context_tokens, 1)
        yield Point(geometry, "cpu", "verify", context_tokens, 1)
        yield Point(geometry, "cpu", "prefill", context_tokens, 1)
    for context_tokens in (1024,) if quick else (1024, 8192):
        yield Point(geometry, "cpu", "decode", context_tokens, 8)


def _pool(geometry: Geometry) -> Tensor:
    """Returns a pool of about `POOL_BYTES`, every block with the same random content (which does not affect the time)."""
    blocks = POOL_BYTES // (LAYERS * geometry.layer_bytes)
    pool = torch.empty(blocks, LAYERS, 2, geometry.kv_heads, BLOCK_TOKENS, geometry.head_dim, dtype=torch.bfloat16)
    return pool.copy_(torch.randn(pool.shape[1:]))


@dataclass(frozen=True, slots=True)
class _Call:
    """One layer of one set of block tables."""

    layer: int
    tables: Tensor


def _calls(point: Point, pool: Tensor) -> Iterator[_Call]:
    """Rotates through layers, then through tables of scattered blocks; a table is used again only after the whole pool."""
    shuffled = torch.randperm(len(pool), generator=torch.Generator().manual_seed(0), dtype=torch.int32)
    whole = len(shuffled) // point.blocks * point.blocks
    sets = shuffled[:whole].view(-1, point.batch, point.blocks // point.batch).unbind()
    while True:
        for tables in sets:
            yield from (_Call(layer, tables) for layer in range(LAYERS))


def _measure(point: Point, pool: Tensor, threads: int, seconds: float) -> Row:
    attention = _attention(point, pool)
    words = pool.view(len(pool), LAYERS, -1).view(torch.int64).numpy().view(np.uint64)
    line = words.reshape(-1)
    line_words = point.blocks * words.shape[2]
    places = len(line) // line_words
    with ThreadPoolExecutor(threads) as executor:

        def on_all_threads(read: Callable[[Any], object], shares: list[Any]) -> None:
            others = [executor.submit(read, share) for share in shares[1:]]
            read(shares[0])
            for other in others:
                other.result()

        def scattered(call: _Call) -> None:
            shares = np.array_split(call.tables.reshape(-1).numpy(), threads)
            on_all_threads(lambda share: _sum_slices(words, share, call.layer), shares)

        def contiguous(call: _Call) -> None:
            begin = int(call.tables[0, 0]) % places * line_words
            on_all_threads(_sum_words, np.array_split(line[begin : begin + line_words], threads))

        times = _interleaved((attention, scattered, contiguous), _calls(point, pool), seconds)
    kv_bytes = point.blocks * point.geometry.layer_bytes
    rates = [kv_bytes / taken / 1e9 for taken in times]
    return Row(
        model=point.geometry.model,
        backend=point.backend,
        phase=point.phase,
        context_tokens=point.context_tokens,
        batch=point.batch,
        threads=threads,
        ms=times[0] * 1e3,
        gb_per_s=rates[0],
        read_limit_gb_per_s=rates[1],
        contiguous_read_gb_per_s=rates[2],
        of_limit=rates[0] / rates[1],
    )


def _interleaved(actions: Sequence[Callable[[_Call], None]], calls: Iterator[_Call], seconds: float) -> list[float]:
    """Returns the seconds of each action (lower quartile). The actions take turns on different slices until the time is over."""
    samples: list[list[float]] = [[] for _ in actions]
    end = time.perf_counter() + seconds
    while len(samples[0]) < _WARM_UP_CALLS + _CALLS_MIN or time.perf_counter() < end:
        for action, taken in zip(actions, samples, strict=True):
            call = next(calls)
            begin = time.perf_counter()
            action(call)
            taken.append(time.perf_counter() - begin)
    return [statistics.quantiles(taken[_WARM_UP_CALLS:])[0] for taken in samples]


def _attention(point: Point, pool: Tensor) -> Callable[[_Call], None]:
    geometry = point.geometry
    rows = min(ROWS[point.phase], point.context_tokens)
    query = torch.randn(point.batch * rows, geometry.q_heads, geometry.head_dim).bfloat16()
    context_lens = torch.full((point.batch,), point.context_tokens, dtype=torch.int32)
    query_starts = torch.arange(point.batch + 1, dtype=torch.int32) * rows
    scale = geometry.head_dim**-0.5
    if point.backend == "gather_sdpa":
        return lambda call: _gather_sdpa(query, pool, call, scale)
    backend: AttentionBackend = create_attention("cpu")

    def attend(call: _Call) -> None:
        backend.paged_attention(query, pool, call.tables, context_lens, query_starts, layer=call.layer, scale=scale)

    return attend


def _gather_sdpa(query: Tensor, pool: Tensor, call: _Call, scale: float) -> None:
    """Decode of one sequence without a paged kernel."""
    keys, values = pool[call.tables[0].long(), call.layer].permute(1, 2, 0, 3, 4).flatten(2, 3).unsqueeze(1)
    torch.nn.functional.scaled_dot_product_attention(query.transpose(0, 1).unsqueeze(0), keys, values, scale=scale, enable_gqa=True)


@njit(nogil=True, cache=True)  # type: ignore[untyped-decorator]
def _sum_slices(words: Any, blocks: Any, layer: int) -> Any:
    """Reads one layer's slice of each block."""
    total = np.uint64(0)
    for at in range(blocks.shape[0]):
        slice_words = words[blocks[at], layer]
        for word in range(slice_words.shape[0]):
            total += slice_words[word]
    return total


@njit(nogil=True, cache=True)  # type: ignore[untyped-decorator]
def _sum_words(words: Any) -> Any:
    total = np.uint64(0)
    for at in range(words.shape[0]):
        total += words[at]
    return total


def _table(rows: Sequence[Row]) -> Table:
    table = Table(title=f"Attention on {rows[0].threads} CPU thread(s): GB/s of keys and values", title_justify="left")
    for heading in ("model", "backend", "phase"):
        table.add_column(heading)
    for heading in ("context", "batch", "ms", "attention", "scattered read", "contiguous read", "of the limit"):
        table.add_column(heading, justify="right")
    for row in rows:
        table.add_row(
            row.model,
            row.backend,
            row.phase,
            f"{row.context_tokens:,}",
            str(row.batch),
            f"{row.ms:.2f}",
            f"{row.gb_per_s:.2f}",
            f"{row.read_limit_gb_per_s:.2f}",
            f"{row.contiguous_read_gb_per_s:.2f}",
            f"{row.of_limit:.2f}",
        )
    return table


if __name__ == "__main__":
    raise SystemExit(main())
