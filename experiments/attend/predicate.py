"""The predicate: what the planner forecasts for a request that attends, fetches or recomputes, against what was measured.

Owns: `predict`, which teaches a planner with one document and asks it about another; `Predicted`, one way of one cell. Invariant:
the planner learns nothing from the runs that it is compared with.
"""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from rich.table import Table

from attnstore.clock import MonotonicClock
from attnstore.testing import StoreProcess
from attnstore_worker.cache import CostPlanner
from attnstore_worker.cache.moving.load import Prompt
from attnstore_worker.engine import AttendPolicy, Engine
from attnstore_worker.model import LoadedModel
from experiments.attend.real_model import BLOCK_TOKENS, CHUNK_TOKENS, Cell, engine_options, generate, store_at

WAYS: Final = ("attend", "fetch", "recompute")
_LESSONS: Final = 2


@dataclass(frozen=True, slots=True)
class Predicted:
    """A request of `tokens` tokens behind a prompt of `context_tokens`, from its admission to its end, in milliseconds."""

    context_tokens: int
    rtt_ms: float
    gbit_per_s: float
    way: str
    tokens: int
    forecast_ms: float
    measured_ms: float

    @property
    def error(self) -> float:
        """|forecast - measured| / measured."""
        return abs(self.forecast_ms - self.measured_ms) / self.measured_ms


def predict(model: LoadedModel, known: list[int], asked: list[int], cells: Sequence[Cell], *, threads: int) -> list[Predicted]:
    """Returns the three ways of each cell, for the prompt `asked`; the planner learns from `known`, which is as long."""
    rows = []
    with StoreProcess("--capacity", "1GiB", "--attend-threads", str(threads)) as node:
        for cell in cells:
            planner = CostPlanner(MonotonicClock(), CHUNK_TOKENS)
            salt = cell.profile or "direct"
            with cell.link(node.url) as url:
                _teach(planner, model, known, cell.tokens, url, salt)
                forecasts = _forecasts(planner, model, asked, cell.tokens)
                measured = {
                    "recompute": _run(model, asked, cell.tokens, url, salt, AttendPolicy.NEVER),
                    "fetch": _run(model, asked, cell.tokens, url, salt, AttendPolicy.NEVER),
                    "attend": _run(model, asked, cell.tokens, url, salt, AttendPolicy.ALWAYS),
                }
            rows += [
                Predicted(len(asked), cell.rtt_ms, cell.gbit_per_s, way, cell.tokens, forecasts[way], measured[way]) for way in WAYS
            ]
    return rows


def regret(rows: Sequence[Predicted]) -> float:
    """Returns the most that the way with the least forecast took, as a multiple of the fastest way of its cell."""
    cells: dict[tuple[int, float, float], list[Predicted]] = defaultdict(list)
    for row in rows:
        cells[row.context_tokens, row.rtt_ms, row.gbit_per_s].append(row)
    return max(
        min(ways, key=lambda row: row.forecast_ms).measured_ms / min(row.measured_ms for row in ways) for ways in cells.values()
    )


def median_error(rows: Sequence[Predicted]) -> float:
    """Returns the median relative error of the forecasts."""
    return statistics.median(row.error for row in rows)


def table(rows: Sequence[Predicted]) -> Table:
    """Returns the rows as a table."""
    shown = Table(title=f"Forecasts: median error {median_error(rows):.1%}, choice at most {regret(rows):.2f} of the best")
    for name in ("context", "RTT ms", "Gb/s", "way", "forecast ms", "measured ms", "error"):
        shown.add_column(name, justify="left" if name == "way" else "right")
    for row in rows:
        figures = f"{row.forecast_ms:.0f}", f"{row.measured_ms:.0f}", f"{row.error:.0%}"
        shown.add_row(str(row.context_tokens), f"{row.rtt_ms:g}", f"{row.gbit_per_s:g}", row.way, *figures)
    return shown


def _teach(planner: CostPlanner, model: LoadedModel, known: list[int], tokens: int, url: str, salt: str) -> None:
    """Computes, fetches and attends while the planner observes."""
    for policy in (AttendPolicy.NEVER, *[AttendPolicy.NEVER, AttendPolicy.ALWAYS] * _LESSONS):
        _run(model, known, tokens, url, salt, policy, planner)


def _forecasts(planner: CostPlanner, model: LoadedModel, asked: list[int], tokens: int) -> dict[str, float]:
    layout = model.layout(BLOCK_TOKENS)
    usable = (len(asked) - 1) // BLOCK_TOKENS
    prompt = Prompt(0, len(asked), BLOCK_TOKENS, layout.page_bytes, layout.layers, 0, usable)
    forecast = planner.attend_forecast(prompt, usable, model.query_shape().row_bytes(layout))
    ttfts = planner.explain(prompt).forecasts
    assert forecast is not None, "the planner has not learnt every cost"
    later_ms = (tokens - 1) * forecast.resident_step_ms
    return {
        "attend": forecast.attend_ms(tokens),
        "fetch": ttfts["fetch"] + later_ms,
        "recompute": ttfts["recompute"] + later_ms,
    }


def _run(
    model: LoadedModel,
    prompt: list[int],
    tokens: int,
    url: str,
    salt: str,
    policy: AttendPolicy,
    planner: CostPlanner | None = None,
) -> float:
    """Runs a prompt in an engine without KV. Returns the milliseconds of the request."""
    wanted = engine_options(model, len(prompt) + tokens + CHUNK_TOKENS, attend=policy, tenant_salt=salt.encode())
    with store_at(url, "tcp") as store:
        stores = {"attend_store": store} if policy is not AttendPolicy.NEVER else {}
        with Engine(model, wanted, store=store, observer=planner, **stores) as engine:  # type: ignore[arg-type]
            run = generate(engine, prompt, tokens)
            engine.flush(60_000)
    return run.ttft_ms + sum(run.step_ms)
