"""What the connector computes for one long prompt: `python -m experiments.vllm.long_prompt --json PATH`. Needs no vLLM.

The prompt is synthetic: only the hashes that vLLM would have computed, of as many blocks as `--tokens` has. A node on this host has
all its pages. Each part is repeated, and the median and the smallest CPU time of the calling process are reported, because other
work on the machine makes a duration longer, and a CPU time much less so. `match` is a call that waits for the node: its CPU time is
the client's, beside which the node's is reported. Names are hashed and matched on a thread beside vLLM's engine loop; the other
parts run in the loop.
"""

from __future__ import annotations

import argparse
import json
import pickle
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

import psutil
from rich.console import Console
from rich.table import Table

import attnstore
from attnstore.clock import MonotonicClock
from attnstore.command_line import CommandParser
from attnstore.option_types import Whole, file_to_write
from attnstore.testing import StoreProcess
from attnstore_worker.cache.planning.observation import Step
from attnstore_worker.cache.planning.split import Work
from attnstore_worker.cache.pool.tier import Tier
from attnstore_worker.cache.store.remote import RemoteTier
from attnstore_worker.cache.store.transfer import Transfer, TransferKind
from attnstore_worker.testing import single_group
from attnstore_worker.vllm.gate import Gate
from attnstore_worker.vllm.identity import page_hashes, page_layout, vllm_namespace
from attnstore_worker.vllm.lookups import StoredGroup, StoredSource
from attnstore_worker.vllm.scheduling import SchedulerSide

_BLOCK_TOKENS: Final = 16
_CHUNK_TOKENS: Final = 8_192
_TRANSPORTS: Final = ("grpc", "tcp")
_FILL_MS_MAX: Final = 60_000
_SUM: Final = "match, plan and hash"


@dataclass(frozen=True, slots=True)
class Row:
    """CPU times of one part, in ms. `node_ms`: those of the node, if it takes part."""

    part: str
    cpu_ms: float
    least_ms: float
    node_ms: float | None = None


def measure(tokens: int, repeats: int, transport: str) -> list[Row]:
    """Returns a row for each part, and their sum."""
    blocks = tokens // _BLOCK_TOKENS
    layout = page_layout(
        layers=1, layer_block_bytes=2 * 2 * _BLOCK_TOKENS, kv_heads=1, block_tokens=_BLOCK_TOKENS, tp_rank=0, tp_size=1
    )
    space = vllm_namespace(layout, {"model": "synthetic"}, tenant_salt="")
    foreign = [index.to_bytes(32, "big") for index in range(blocks)]
    names = page_hashes(space, foreign)
    rows = [_row("hash the names", lambda: page_hashes(space, foreign), repeats)]
    clock = MonotonicClock()
    with StoreProcess("--capacity", "64MiB") as node, attnstore.connect(node.url, transport=transport) as client:
        client.register_layout(space, layout)
        client.write(space, names, [memoryview(bytes(layout.page_bytes))] * blocks, deadline_ms=_FILL_MS_MAX)
        gate = _gate(clock)
        tier = RemoteTier(client, space, layout, deadline_ms=10_000, clock=clock, observer=gate)
        tier.look_up([names])
        rows.append(_row("match", lambda: tier.look_up([names]), repeats, psutil.Process(node.process.pid)))
        work = Work(tokens + 1, _BLOCK_TOKENS, _CHUNK_TOKENS, 1 << 20, 0, blocks, blocks, blocks, layers=32)
        step = Step(0.0, 500.0, ((0, _CHUNK_TOKENS),))

        def decide() -> None:
            gate.stepped(step)  # the costs are fitted again
            assert gate.blocks_to_fetch(work) == blocks

        rows.append(_row("decide", decide, repeats))
        group = single_group(layout, ("layer",))
        side = SchedulerSide(
            [StoredSource([StoredGroup(group, space, tier)])], gate, clock, lookup_ms_max=10_000, chunk_tokens=_CHUNK_TOKENS
        )
        asked: list[float] = []
        planned: list[float] = []
        for request in map(str, range(repeats)):
            while side.hit_tokens(request, foreign, tokens + 1, 0) is None:
                time.sleep(0.001)
            begun_s = time.thread_time()
            assert side.hit_tokens(request, foreign, tokens + 1, 0) == blocks * _BLOCK_TOKENS
            asked.append(time.thread_time() - begun_s)
            begun_s = time.thread_time()
            side.allocated(request, [range(blocks)], blocks * _BLOCK_TOKENS)
            plan = side.step([], ())
            planned.append(time.thread_time() - begun_s)
            side.finished(request)
        side.close()
    rows += [_row_of("ask again", asked), _row_of("plan the load", planned)]
    in_all = Row(_SUM, sum(row.cpu_ms for row in rows), sum(row.least_ms for row in rows))
    sent = _row("send the plan to another process", lambda: pickle.loads(pickle.dumps(plan)), repeats)
    return [*rows, in_all, sent]


def _gate(clock: MonotonicClock) -> Gate:
    gate = Gate(clock, load_ms_max=1e6)
    for size in (1 << 20, 1 << 24) * 32:
        gate.transferred(Transfer(Tier.REMOTE, TransferKind.READ, 0.0, size / 1e7, 1, 1, size, failed=False))
    for begin in range(0, 96 * _CHUNK_TOKENS, _CHUNK_TOKENS):
        gate.stepped(Step(0.0, 500.0 + begin / 1e3, ((begin, begin + _CHUNK_TOKENS),)))
    return gate


def _row(part: str, call: Callable[[], object], repeats: int, node: psutil.Process | None = None) -> Row:
    took_s = []
    before = node.cpu_times() if node is not None else None
    for _ in range(repeats):
        begun_s = time.process_time()
        call()
        took_s.append(time.process_time() - begun_s)
    if node is None or before is None:
        return _row_of(part, took_s)
    after = node.cpu_times()
    return _row_of(part, took_s, 1e3 * (after.user + after.system - before.user - before.system) / repeats)


def _row_of(part: str, took_s: Sequence[float], node_ms: float | None = None) -> Row:
    return Row(part, 1e3 * statistics.median(took_s), 1e3 * min(took_s), node_ms)


def main(argv: Sequence[str] | None = None) -> int:
    """Measures, prints and writes. Returns 0."""
    parser = CommandParser(
        prog="python -m experiments.vllm.long_prompt", description="What the connector computes for a long prompt."
    )
    parser.add_argument("--tokens", type=Whole(_BLOCK_TOKENS, 1 << 20), default=1 << 17, metavar="N", help="(default 131072)")
    parser.add_argument("--repeats", type=Whole(1, 10_000), default=20, metavar="N", help="of each part (default 20)")
    parser.add_argument("--transport", choices=_TRANSPORTS, default="tcp", help="of the match (default tcp)")
    parser.add_argument("--json", type=file_to_write, metavar="PATH", help="write the rows as a list")
    arguments: argparse.Namespace = parser.parse_args(argv)
    rows = measure(arguments.tokens, arguments.repeats, arguments.transport)
    table = Table(title=f"A prompt of {arguments.tokens:,} tokens in blocks of {_BLOCK_TOKENS}: CPU time in ms")
    for name in ("part", "median", "least", "node"):
        table.add_column(name, justify="left" if name == "part" else "right")
    for row in rows:
        table.add_row(row.part, f"{row.cpu_ms:.2f}", f"{row.least_ms:.2f}", "" if row.node_ms is None else f"{row.node_ms:.2f}")
    Console().print(table)
    if arguments.json is not None:
        Path(arguments.json).write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
