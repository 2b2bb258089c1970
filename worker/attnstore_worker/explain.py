"""The planner's decisions with their reasons, as text: `attnstore-worker explain`.

Owns: the sources of decisions (a running worker, a file, or a trial prompt) and their display. Every figure shown is one of a
`Decision` or a `CostReport`.
"""

from __future__ import annotations

import http.client
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from pydantic import TypeAdapter, ValidationError
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from attnstore.errors import InvalidArgument
from attnstore.http_client import open_url
from attnstore.limits import PROMPT_CHARS_MAX
from attnstore.option_types import read_text
from attnstore_worker.cache import CostPlanner
from attnstore_worker.cache.moving.load import Prompt
from attnstore_worker.cache.planning.decisions import Decision
from attnstore_worker.engine import Engine, SamplingParams

_TIMEOUT_S: Final = 10.0
_ROUTE: Final = "/planner"
_COLUMNS: Final = (
    *("#", "tokens", "here", "found", "RTT ms", "Gb/s", "+-"),
    *("recompute", "fetch", "planned", "attend", "choice", "fetched", "took", "error"),
)
_ANSWER_BYTES_MAX: Final = 4 << 20
_DECISIONS: Final = TypeAdapter(list[Decision])


def decisions_of(source: str, last: int, http_proxy: str | None = None, token: str | None = None) -> list[dict[str, Any]]:
    """Returns the last decisions of the worker at an http URL, or of a file that `--decisions` wrote; the newest last.

    Raises `InvalidArgument` if they cannot be read.
    """
    try:
        if source.startswith(("http://", "https://")):
            with open_url(f"{source.rstrip('/')}{_ROUTE}?last={last}", _TIMEOUT_S, http_proxy, token) as answer:
                found = json.loads(answer.read(_ANSWER_BYTES_MAX))["decisions"]
        else:
            found = [json.loads(line) for line in read_text(Path(source), PROMPT_CHARS_MAX).splitlines()]
        decisions = _DECISIONS.validate_python(found)
    except ValidationError:
        raise InvalidArgument(f"no decisions can be read from {source}: it holds something else") from None
    except (OSError, http.client.HTTPException, ValueError, KeyError, TypeError, RecursionError) as error:
        raise InvalidArgument(f"no decisions can be read from {source}: {error}") from None
    return [decision.as_json() for decision in decisions[-last:]]


def try_out(engine: Engine, planner: CostPlanner, token_ids: list[int]) -> list[dict[str, Any]]:
    """Runs a prompt to its first token, from which the planner learns the link, and then plans the prompt again as if the store had
    all of it and the pool nothing. Returns both decisions.
    """
    engine.generate(token_ids, SamplingParams(max_tokens=1))
    layout = engine.layout
    usable = (len(token_ids) - 1) // layout.block_tokens
    prompt = Prompt(0, len(token_ids), layout.block_tokens, layout.page_bytes, layout.layers, 0, usable)
    return [decision.as_json() for decision in (*planner.decisions(1), planner.explain(prompt))]


def show(decisions: Sequence[dict[str, Any]], console: Console) -> None:
    """Returns one line per decision: the predicted time of each choice, the decision, the actual time."""
    table = Table(box=box.SIMPLE_HEAD, title="Time to the first token, ms")
    for column in _COLUMNS:
        table.add_column(column, justify="right")
    for each in decisions:
        forecasts = each["forecasts"]
        error = each.get("error")
        table.add_row(
            str(each["number"]),
            str(each["tokens"]),
            str(each["resident_blocks"]),
            _number(each["hit_end"], "d"),
            _number(each["rtt_ms"], ".1f"),
            _number(each["gbit_per_s"], ".3g"),
            _number(each["spread"], ".2f"),
            *(_number(forecasts.get(name), ".0f") for name in ("recompute", "fetch", "planned", "attend")),
            escape(each["choice"]),
            str(each["arrived_blocks"]),
            _number(each["happened_ttft_ms"], ".0f"),
            "" if error is None else f"{error:.0%}",
        )
    console.print(table)
    console.print("here, found, fetched: blocks in the pool, found below up to, brought from there; +-: factor of uncertainty")


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)
