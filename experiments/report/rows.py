"""The rows that experiments write and the report reads: one type per kind, recognised by its fields.

Owns: the fields of penalty rows (docs/report.md), `Results` and `read_results`. Invariant: a row that is not understood, or has
impossible values, stops the report with its file and number; no row is left out silently.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from statistics import median
from typing import Any, Final, TypeVar

from attnstore.errors import InvalidArgument
from experiments.attend.rows import MODES
from experiments.attend.rows import Row as AttendRow
from experiments.attention import Row as AttentionRow
from experiments.replay.hash_only import Replay

BANDWIDTH_FIELDS: Final = {"transport", "op", "page_bytes", "batch", "gb_per_s", "p50_us", "p99_us", "cpu_s_per_gb"}
RESIDENCES: Final = ("resident", "prefetched", "attended", "fetched")
"""The place of the KV of a decoding sequence: in the worker's memory; fetched before each step; in the node, which answers the
queries; in the node, read again for each step.
"""


@dataclass(frozen=True, slots=True)
class FirstToken:
    """One cell of the sweep, medians of its rounds. `choice` and `predicted_ttft_ms` are the planner's prediction."""

    rtt_ms: float
    gbit_per_s: float
    context_tokens: int
    hit_rate: float
    recompute_ttft_ms: float
    fetch_ttft_ms: float
    planner_ttft_ms: float
    predicted_ttft_ms: float
    choice: str

    @property
    def penalty(self) -> float:
        """Fetching over recomputing: below 1 the network is the better memory."""
        return self.fetch_ttft_ms / self.recompute_ttft_ms

    @property
    def better_ms(self) -> float:
        """The faster of the two simple ways."""
        return min(self.recompute_ttft_ms, self.fetch_ttft_ms)

    @property
    def over_better(self) -> float:
        """The planner over the faster simple way; below 1 it is faster than both."""
        return self.planner_ttft_ms / self.better_ms

    @property
    def error(self) -> float:
        """The error of the prediction, relative to the measured time."""
        return abs(self.predicted_ttft_ms - self.planner_ttft_ms) / self.planner_ttft_ms


@dataclass(frozen=True, slots=True)
class Decode:
    """Time between two tokens of one sequence, by the place of its KV (`RESIDENCES`)."""

    rtt_ms: float
    gbit_per_s: float
    context_tokens: int
    residence: str
    itl_ms: float


@dataclass(frozen=True, slots=True)
class Fault:
    """A link that failed during a fetch: the planner's time to the first token, and the time of recomputing."""

    fault: str
    rtt_ms: float
    gbit_per_s: float
    context_tokens: int
    recompute_ttft_ms: float
    planner_ttft_ms: float

    @property
    def over_recompute(self) -> float:
        """The planner over recomputing everything."""
        return self.planner_ttft_ms / self.recompute_ttft_ms


@dataclass(frozen=True, slots=True)
class Run:
    """Where the rows of a file were measured."""

    machine: str
    seed: int


@dataclass
class Results:
    """Everything that was read, each cell once."""

    runs: list[Run] = field(default_factory=list)
    first_tokens: list[FirstToken] = field(default_factory=list)
    decodes: list[Decode] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)
    bandwidth: list[dict[str, Any]] = field(default_factory=list)
    attention: list[AttentionRow] = field(default_factory=list)
    replays: list[Replay] = field(default_factory=list)
    attends: list[AttendRow] = field(default_factory=list)

    @property
    def is_empty(self) -> bool:
        """True if there is nothing to draw."""
        drawn = (self.first_tokens, self.decodes, self.faults, self.bandwidth, self.attention, self.replays, self.attends)
        return not any(drawn)


def read_results(paths: Iterable[Path]) -> Results:
    """Merges all files. Each contains JSON lines, or one JSON list. Raises `InvalidArgument` naming file and row, or `OSError`."""
    results = Results()
    for path in paths:
        for number, row in enumerate(_rows(path), 1):
            try:
                _take(results, row)
            except (TypeError, ValueError) as error:
                raise InvalidArgument(f"{path}, row {number}: {error}") from None
    results.runs = list(dict.fromkeys(results.runs))
    results.first_tokens = _medians(results.first_tokens, ("rtt_ms", "gbit_per_s", "context_tokens", "hit_rate"))
    results.decodes = _medians(results.decodes, ("rtt_ms", "gbit_per_s", "context_tokens", "residence"))
    results.faults = _medians(results.faults, ("fault", "rtt_ms", "gbit_per_s", "context_tokens"))
    return results


def _rows(path: Path) -> list[Any]:
    text = path.read_text()
    try:
        return list(json.loads(text)) if text.lstrip().startswith("[") else [json.loads(line) for line in text.splitlines() if line]
    except ValueError as error:
        raise InvalidArgument(f"{path} is neither JSON lines nor a JSON list: {error}") from None


def _take(results: Results, row: Any) -> None:
    if not isinstance(row, dict):
        raise ValueError(f"{row!r} is no object")
    names = row.keys()
    if {"machine", "seed"} <= names:
        results.runs.append(Run(str(row["machine"]), int(row["seed"])))
    if "fetch_ttft_ms" in names:
        results.first_tokens.append(_made(FirstToken, row))
    elif "itl_ms" in names:
        decode = _made(Decode, row)
        if decode.residence not in RESIDENCES:
            raise ValueError(f"residence is {decode.residence!r}; known are {', '.join(RESIDENCES)}")
        results.decodes.append(decode)
    elif "fault" in names:
        results.faults.append(_made(Fault, row))
    elif names >= BANDWIDTH_FIELDS:
        results.bandwidth.append(row)
    elif "backend" in names:
        results.attention.append(_made(AttentionRow, row))
    elif "tpot_ms" in names:
        results.attends.append(_attend_row(row))
    elif "hit_blocks" in names:
        results.replays.append(Replay(**{each.name: row[each.name] for each in fields(Replay)}))
    elif not {"machine", "seed"} <= names:
        raise ValueError(f"a row with the fields {', '.join(sorted(names))} is of no known kind")


T = TypeVar("T")


def _made(kind: type[T], row: dict[str, Any]) -> T:
    """Returns the row as that type, with its numbers checked: every one finite and positive, except those that may be None."""
    values = {}
    for each in fields(kind):  # type: ignore[arg-type]
        if each.name not in row:
            raise ValueError(f"{each.name} is missing")
        value = row[each.name]
        if each.type != "str":
            least = 0 if each.name in ("rtt_ms", "hit_rate") else math.ulp(0.0)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not least <= value < math.inf:
                raise ValueError(f"{each.name} is {value!r}")
        values[each.name] = value
    return kind(**values)


def _attend_row(row: dict[str, Any]) -> AttendRow:
    """Returns a row of `experiments.attend`, where an unlimited link has no rate and several other figures may be missing."""
    values: dict[str, Any] = {each.name: row.get(each.name) for each in fields(AttendRow)}
    if values["mode"] not in MODES:
        raise ValueError(f"mode is {values['mode']!r}; known are {', '.join(MODES)}")
    values["gbit_per_s"] = math.inf if values["gbit_per_s"] is None else values["gbit_per_s"]
    for name in ("context_tokens", "nodes", "tpot_ms", "gbit_per_s", "rtt_ms", "bytes_per_token", "round_trips_per_token"):
        value = values[name]
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        may_be_zero = name in ("nodes", "rtt_ms", "bytes_per_token", "round_trips_per_token")
        if not is_number or not (value > 0 or (may_be_zero and value == 0)) or (name != "gbit_per_s" and value == math.inf):
            raise ValueError(f"{name} is {value!r}")
    return AttendRow(**values)


def _medians(rows: Sequence[T], key: tuple[str, ...]) -> list[T]:
    """Returns one row per cell: the median of each time, in order of the cells, and the most frequent of other values."""
    groups: dict[tuple[Any, ...], list[T]] = defaultdict(list)
    for row in rows:
        groups[tuple(getattr(row, name) for name in key)].append(row)
    return [_median(groups[cell]) for cell in sorted(groups)]


def _median(rounds: list[T]) -> T:
    values = {}
    for each in fields(rounds[0]):  # type: ignore[arg-type]
        found = [getattr(row, each.name) for row in rounds]
        values[each.name] = median(found) if each.name.endswith("_ms") else max(found, key=found.count)
    return type(rounds[0])(**values)
