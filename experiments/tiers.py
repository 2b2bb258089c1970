"""The benefit of tiers below HBM: a pool with a quarter of the memory that its sequences need, and pages used in place.

    python -m experiments.tiers [--json PATH] [--quick]

Two measurements with the real model and a real node on this host.

`pressure`: eight prompts run at once, and then once more, in an HBM pool of a quarter of what they need together: without another
tier (evicted pages are computed again), with HOST, and with a store whose pages are sent over tcp, copied from its mapped memory,
or used in place. They are compared with the run with room for everything. Throughput is that of the second round, prompt tokens and
generated ones together; hits are counted by tier; tokens must equal those of the run with room.

`decode`: time for each further token of one sequence whose prompt is in its own pool (`resident`) or in the node's memory
(`shared_in_place`), in rounds that alternate. The median of the rounds' ratios must be at most 1.2.
"""

from __future__ import annotations

import json
import random
import statistics
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from typing import Any, Final

from rich.console import Console
from rich.table import Table

from attnstore.command_line import CommandParser
from attnstore.core.layout import DType
from attnstore.option_types import file_to_write
from attnstore.testing import StoreProcess
from attnstore_worker.cache import Tier, open_store
from attnstore_worker.engine import Engine, EngineOptions, SamplingParams
from attnstore_worker.model import LoadedModel, load_model
from attnstore_worker.options import SharedUse

_WAIT_MS: Final = 120_000
_PROMPTS: Final = 8
_RATIO_MAX: Final = 1.2


@dataclass(frozen=True, slots=True)
class Mode:
    """The tiers of a run. `transport` is None if there is no store; a share of 1 is room for all."""

    name: str
    pool_share: float
    host: bool = False
    transport: str | None = None
    shared: SharedUse = SharedUse.COPY


MODES: Final = (
    Mode("unconstrained", 1.0),
    Mode("hbm_only", 0.25),
    Mode("host", 0.25, host=True),
    Mode("remote_tcp", 0.25, transport="tcp"),
    Mode("shared_copy", 0.25, transport="shm"),
    Mode("shared_in_place", 0.25, transport="auto", shared=SharedUse.IN_PLACE),
    Mode("host_and_remote_tcp", 0.25, host=True, transport="tcp"),
)


@dataclass(frozen=True, slots=True)
class PressureRow:
    """One mode's second round."""

    mode: str
    pool_blocks: int
    needed_blocks: int
    tokens_per_s: float
    hit_tokens_by_tier: dict[str, int]
    read_bytes_by_tier: dict[str, int]
    prompt_tokens: int
    preemptions: int
    tokens_equal: bool
    measurement: str = "pressure"


@dataclass(frozen=True, slots=True)
class DecodeRow:
    """One place of the context. `ratio`: its time over `resident`'s, the median over the rounds."""

    mode: str
    dtype: str
    context_tokens: int
    tpot_ms: float
    ratio: float
    hit_tokens_by_tier: dict[str, int]
    tokens_equal: bool
    measurement: str = "decode"


def prompts_of(model: LoadedModel, count: int, tokens: int) -> list[list[int]]:
    """Returns prompts that share no block."""
    digits = random.Random(11)
    vocabulary = model.module.config.vocab_size
    return [[digits.randrange(vocabulary) for _ in range(tokens)] for _ in range(count)]


class Pressure:
    """The first measurement: prompts of `prompt_tokens`, `new_tokens` generated for each."""

    def __init__(self, model: LoadedModel, prompt_tokens: int, new_tokens: int) -> None:
        self._model = model
        self._prompts = prompts_of(model, _PROMPTS, prompt_tokens)
        self._how = SamplingParams(max_tokens=new_tokens)
        self._page_bytes = model.layout(16).page_bytes
        self._needed = _PROMPTS * -(-(prompt_tokens + new_tokens) // 16)
        self._expected: list[list[int]] = []

    def row(self, mode: Mode) -> PressureRow:
        """Runs a mode. The first one must have room for all, because the tokens of the others are compared with its tokens."""
        blocks = int(self._needed * mode.pool_share) + (_PROMPTS if mode.pool_share == 1 else 0)
        options = EngineOptions(
            pool_bytes=blocks * self._page_bytes,
            host_pool_bytes=2 * self._needed * self._page_bytes if mode.host else 0,
            sequences_max=_PROMPTS,
            store_deadline_ms=_WAIT_MS,
            shared=mode.shared,
        )
        with ExitStack() as stack:
            store = None
            if mode.transport is not None:
                node = stack.enter_context(StoreProcess("--capacity", "1GiB", "--log-level", "error"))
                store = open_store(node.url, deadline_ms=_WAIT_MS, transport=mode.transport)
                stack.enter_context(store)
            engine = stack.enter_context(Engine(self._model, options, store=store))
            engine.warm_up()
            first = [sequence.generated for sequence in engine.generate_all(self._prompts, self._how)]
            engine.flush(_WAIT_MS)
            self._expected = self._expected or first
            before, preempted = engine.statistics().tiers, engine.batching().preemptions
            started_s = time.perf_counter()
            second = [sequence.generated for sequence in engine.generate_all(self._prompts, self._how)]
            elapsed_s = time.perf_counter() - started_s
            engine.check()
            after = engine.statistics().tiers
        tokens = sum(map(len, self._prompts)) + sum(map(len, second))
        return PressureRow(
            mode.name,
            blocks,
            self._needed,
            tokens / elapsed_s,
            {tier.value: after[tier].hit_tokens - before[tier].hit_tokens for tier in Tier},
            {tier.value: after[tier].bytes_read - before[tier].bytes_read for tier in Tier},
            sum(map(len, self._prompts)),
            engine.batching().preemptions - preempted,
            first == second == self._expected,
        )


def decode_rows(model: LoadedModel, context_tokens: int, new_tokens: int, rounds: int) -> list[DecodeRow]:
    """The second measurement. The engine computes the context once and then finds it in its own pool."""
    prompt = prompts_of(model, 1, context_tokens)[0]
    how = SamplingParams(max_tokens=new_tokens)
    pool_bytes = (-(-(context_tokens + new_tokens) // 16) + 8) * model.layout(16).page_bytes
    with ExitStack() as stack:
        node = stack.enter_context(StoreProcess("--capacity", "2GiB", "--log-level", "error"))
        engines = {}
        for name, shared in (("resident", SharedUse.COPY), ("shared_in_place", SharedUse.IN_PLACE)):
            shared_store = open_store(node.url, deadline_ms=_WAIT_MS)
            stack.enter_context(shared_store)
            options = EngineOptions(pool_bytes=pool_bytes, store_deadline_ms=_WAIT_MS, shared=shared)
            engines[name] = stack.enter_context(Engine(model, options, store=shared_store))
            engines[name].warm_up()
        expected = engines["resident"].generate(prompt, how).generated
        engines["resident"].flush(_WAIT_MS)
        times: dict[str, list[float]] = {name: [] for name in engines}
        hits: dict[str, dict[str, int]] = {}
        equal = dict.fromkeys(engines, True)
        for _ in range(rounds):
            for name, engine in engines.items():
                sequence = engine.generate(prompt, how)
                assert sequence.admission is not None
                assert sequence.first_token_ms is not None
                assert sequence.finished_ms is not None
                times[name].append((sequence.finished_ms - sequence.first_token_ms) / (len(sequence.generated) - 1))
                hits[name] = {tier.value: tokens for tier, tokens in sequence.admission.hit_tokens_by_tier().items()}
                equal[name] &= sequence.generated == expected
    ratios = {name: [each / base for each, base in zip(times[name], times["resident"], strict=True)] for name in engines}
    return [
        DecodeRow(
            name,
            model.dtype.value,
            context_tokens,
            statistics.median(times[name]),
            statistics.median(ratios[name]),
            hits[name],
            equal[name],
        )
        for name in engines
    ]


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the rows. Returns 0 if all tokens are equal and pages in place are within the bound."""
    parser = CommandParser("python -m experiments.tiers", description="Throughput by tier, and pages used in place.")
    parser.add_argument("--json", type=file_to_write, metavar="PATH", help="write the rows there, one JSON object a line")
    parser.add_argument("--quick", action="store_true", help="shorter prompts and contexts, within 50 s")
    arguments = parser.parse_args(argv)
    pressure = Pressure(load_model(), *((96, 8) if arguments.quick else (256, 16)))
    rows = [pressure.row(mode) for mode in MODES]
    decoded = decode_rows(load_model(dtype=DType.BF16), *((2_000, 24, 3) if arguments.quick else (8_000, 24, 4)))
    console = Console()
    console.print(_pressure_table(rows))
    console.print(_decode_table(decoded))
    if arguments.json is not None:
        everything: list[Any] = [*rows, *decoded]
        arguments.json.write_text("".join(json.dumps(asdict(row)) + "\n" for row in everything))
    right = all(row.tokens_equal for row in rows) and all(row.tokens_equal for row in decoded)
    return 0 if right and all(row.ratio <= _RATIO_MAX for row in decoded) else 1


def _pressure_table(rows: Sequence[PressureRow]) -> Table:
    table = Table(title=f"Eight prompts of {rows[0].prompt_tokens // _PROMPTS} tokens, the second time")
    for name in ("tiers", "pool blocks", "of", "tokens/s", *(f"{tier.name} hits" for tier in Tier), "preempted", "tokens equal"):
        table.add_column(name, justify="right")
    for row in rows:
        hits = (str(row.hit_tokens_by_tier[tier.value]) for tier in Tier)
        table.add_row(
            row.mode,
            str(row.pool_blocks),
            str(row.needed_blocks),
            f"{row.tokens_per_s:.0f}",
            *hits,
            str(row.preemptions),
            "yes" if row.tokens_equal else "NO",
        )
    return table


def _decode_table(rows: Sequence[DecodeRow]) -> Table:
    table = Table(title="One token more, behind a long context")
    for name in ("pages", "context", "ms per token", "of resident", "tokens equal"):
        table.add_column(name, justify="right")
    for row in rows:
        equal = "yes" if row.tokens_equal else "NO"
        table.add_row(row.mode, str(row.context_tokens), f"{row.tpot_ms:.1f}", f"{row.ratio:.2f}", equal)
    return table


if __name__ == "__main__":
    raise SystemExit(main())
