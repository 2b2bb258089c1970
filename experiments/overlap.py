"""Does fetching hide behind computing, or computing behind fetching?

    python -m experiments.overlap [--json PATH] [--quick]

The first tokens of a prompt are pages in a store node, behind a link of a chosen rate (`attnstore.testing.link`); its last chunk
has to be computed. Three times to the first token are measured: with the pages in the pool already (the compute time), with the
chunk computed after the last page has arrived (`sequential`), and with the chunk computed layer by layer as the pages arrive
(`overlapped`). The rates are chosen so that the transfer takes a half, one and two times as long as computing. The bound is 1.15 x
max(transfer, compute) + one layer of the longer of both. Real model, real node, tcp; torch computes with one thread, because the
transfer needs a core too. Figures are medians; every repetition has a new engine, and a new last chunk.
"""

from __future__ import annotations

import json
import random
import statistics
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from typing import Final

import torch
from rich.console import Console
from rich.table import Table

from attnstore.command_line import CommandParser
from attnstore.links import LinkProfile
from attnstore.option_types import file_to_write
from attnstore.testing import StoreProcess
from attnstore.testing.link import Link
from attnstore_worker.cache import FetchAll, PageStore, open_store
from attnstore_worker.cache.moving.load import FetchOrder, Load, LoadPlan
from attnstore_worker.cache.planning.observation import Unobserved
from attnstore_worker.cache.store.transfer import Transfer, TransferKind
from attnstore_worker.engine import Engine, EngineOptions, SamplingParams
from attnstore_worker.model import LoadedModel, load_model

_DEADLINE_MS: Final = 60_000
_MARGIN: Final = 1.15
_ONE_TOKEN: Final = SamplingParams(max_tokens=1)


class ByLayers(FetchAll):
    """All hits in one read, layer by layer."""

    def plan(self, load: Load) -> LoadPlan:
        """Returns the plan of `FetchAll` in another order."""
        return replace(super().plan(load), order=FetchOrder.LAYERS)


class _Reads(Unobserved):
    """The durations of the reads."""

    def __init__(self) -> None:
        self.durations_ms: list[float] = []

    def transferred(self, transfer: Transfer) -> None:
        """Records the duration of a read."""
        if transfer.kind is TransferKind.READ:
            self.durations_ms.append(transfer.ended_ms - transfer.started_ms)


@dataclass(frozen=True, slots=True)
class Row:
    """One rate. `share` is `overlapped_ttft_ms` over `bound_ms`; `tokens_equal`: all runs of a prompt gave the same token."""

    gbit_per_s: float
    hit_tokens: int
    chunk_tokens: int
    transfer_ms: float
    compute_ms: float
    layer_ms: float
    sequential_ttft_ms: float
    overlapped_ttft_ms: float
    bound_ms: float
    share: float
    tokens_equal: bool


@dataclass(frozen=True, slots=True)
class Shape:
    """`hit_tokens` are in the store; the `chunk_tokens` after them are computed, `repetitions` times for each figure.

    Chunks end at multiples of their size, so `hit_tokens` must be one for the tokens after them to be one chunk.
    """

    hit_tokens: int
    chunk_tokens: int
    repetitions: int


class Overlap:
    """The measurement on one model and one node."""

    def __init__(self, model: LoadedModel, shape: Shape) -> None:
        self._model = model
        self._shape = shape
        generator = random.Random(1)
        self._prefix = [generator.randrange(3, 40_000) for _ in range(shape.hit_tokens)]
        tails = range(shape.repetitions)
        self._prompts = [self._prefix + [generator.randrange(3, 40_000) for _ in range(shape.chunk_tokens)] for _ in tails]
        layout = model.layout(16)
        blocks = (shape.hit_tokens + shape.chunk_tokens) // layout.block_tokens + 1
        self._options = EngineOptions(
            pool_bytes=2 * blocks * layout.page_bytes,
            chunk_tokens=shape.chunk_tokens,
            store_deadline_ms=_DEADLINE_MS,
        )
        # The store must not have the end of a prompt when a later prompt has the same end.
        self._reading_only = replace(self._options, write_policy="on-evict")
        self._layout = layout

    def resident(self, store: PageStore) -> tuple[float, list[int]]:
        """Computes the prefix, writes it to the store, and times the chunks after it. Returns milliseconds and the tokens."""
        times, tokens = [], []
        with Engine(self._model, self._options, store=store) as engine:
            engine.warm_up()
            engine.generate([*self._prefix, 5], _ONE_TOKEN)
            engine.flush(_DEADLINE_MS)
        with Engine(self._model, self._options) as engine:
            engine.generate([*self._prefix, 5], _ONE_TOKEN)
            for prompt in self._prompts:
                ttft_ms, token = _first_token(engine, prompt, self._shape.hit_tokens)
                times.append(ttft_ms)
                tokens.append(token)
        return statistics.median(times), tokens

    def row(self, url: str, ratio: float, compute_ms: float, expected: list[int]) -> Row:
        """Measures one rate: the transfer takes `ratio` times as long as computing."""
        bits = 8 * self._layout.page_bytes * self._shape.hit_tokens / self._layout.block_tokens
        rate = bits / (ratio * compute_ms / 1e3)
        with Link.to_node(url, LinkProfile("chosen", rate, rate, 0.1)) as link:
            transfer_ms, sequential_ms, tokens = self._fetched(link, FetchAll)
            _, overlapped_ms, others = self._fetched(link, ByLayers)
        layer_ms = max(transfer_ms, compute_ms) / self._layout.layers
        bound_ms = _MARGIN * max(transfer_ms, compute_ms) + layer_ms
        return Row(
            gbit_per_s=rate / 1e9,
            hit_tokens=self._shape.hit_tokens,
            chunk_tokens=self._shape.chunk_tokens,
            transfer_ms=transfer_ms,
            compute_ms=compute_ms,
            layer_ms=layer_ms,
            sequential_ttft_ms=sequential_ms,
            overlapped_ttft_ms=overlapped_ms,
            bound_ms=bound_ms,
            share=overlapped_ms / bound_ms,
            tokens_equal=tokens == others == expected,
        )

    def _fetched(self, link: Link, planner: Callable[[float], FetchAll]) -> tuple[float, float, list[int]]:
        """Returns medians of the transfer and of the time to the first token, and the tokens."""
        reads, times, tokens = _Reads(), [], []
        with open_store(link.url, deadline_ms=_DEADLINE_MS, transport="tcp") as store:
            for prompt in self._prompts:
                with Engine(self._model, self._reading_only, store=store, planner=planner(_DEADLINE_MS), observer=reads) as engine:
                    engine.warm_up()
                    ttft_ms, token = _first_token(engine, prompt, self._shape.hit_tokens)
                    times.append(ttft_ms)
                    tokens.append(token)
        return statistics.median(reads.durations_ms), statistics.median(times), tokens


def _first_token(engine: Engine, prompt: list[int], hit_tokens: int) -> tuple[float, int]:
    sequence = engine.generate(prompt, _ONE_TOKEN)
    assert sequence.first_token_ms is not None
    assert sequence.admission is not None
    if sequence.admission.hit_tokens != hit_tokens:
        raise RuntimeError(f"{sequence.admission.hit_tokens} tokens were found where {hit_tokens} are to be: nothing was measured")
    return sequence.first_token_ms - sequence.submitted_ms, sequence.generated[0]


def measure(model: LoadedModel, shape: Shape, ratios: Sequence[float]) -> list[Row]:
    """Returns a row for each ratio of transfer to compute time."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with ExitStack() as stack:
            node = stack.enter_context(StoreProcess("--capacity", "1GiB", "--log-level", "error"))
            experiment = Overlap(model, shape)
            store = open_store(node.url, deadline_ms=_DEADLINE_MS)
            stack.enter_context(store)
            compute_ms, expected = experiment.resident(store)
            return [experiment.row(node.url, ratio, compute_ms, expected) for ratio in ratios]
    finally:
        torch.set_num_threads(threads)


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the rows. Returns 0 if every one is within its bound and has the right tokens."""
    parser = CommandParser("python -m experiments.overlap", description="Swap-in overlapped with compute.")
    parser.add_argument("--json", type=file_to_write, metavar="PATH", help="write the rows there, one JSON object a line")
    parser.add_argument("--quick", action="store_true", help="a shorter prompt and fewer repetitions, within 50 s")
    arguments = parser.parse_args(argv)
    shape = Shape(1024, 256, 3) if arguments.quick else Shape(1792, 256, 7)
    rows = measure(load_model(), shape, [0.5, 1.0, 2.0])
    Console().print(_table(rows))
    if arguments.json is not None:
        arguments.json.write_text("".join(json.dumps(asdict(row)) + "\n" for row in rows))
    return 0 if all(row.tokens_equal and row.share <= 1 for row in rows) else 1


def _table(rows: Sequence[Row]) -> Table:
    table = Table(title="Time to the first token, in ms")
    for name in ("Gb/s", "transfer", "compute", "sequential", "overlapped", "bound", "of bound", "tokens equal"):
        table.add_column(name, justify="right")
    for row in rows:
        figures = (row.transfer_ms, row.compute_ms, row.sequential_ttft_ms, row.overlapped_ttft_ms, row.bound_ms)
        equal = "yes" if row.tokens_equal else "NO"
        table.add_row(f"{row.gbit_per_s:.2f}", *(f"{figure:.0f}" for figure in figures), f"{row.share:.2f}", equal)
    return table


if __name__ == "__main__":
    raise SystemExit(main())
