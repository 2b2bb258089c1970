"""A step's timeline, worker and node, by layer: where the time of an attended layer goes.

Owns: `trace`, which runs attended steps with notes on both sides; `Timeline`, their layers; its table and its form for a viewer of
Chrome traces (Perfetto).
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from rich.table import Table

from attnstore.attention import online_softmax
from attnstore.testing import StoreProcess
from attnstore_worker.cache.attending.step import RemoteStep
from attnstore_worker.model import LoadedModel, few_rows
from experiments.attend.notes import Notes
from experiments.attend.ping import measured_rtt_ms
from experiments.attend.real_model import BLOCK_TOKENS, Cell, attended, resident, weight_bytes

_STEPS: Final = 16
"""The last steps of a run are traced: by then, both sides know whether to spin."""
_TOKENS: Final = 48
_US: Final = 1e6
_WORKER: Final = ("weights", "ask", "attend here", "receive", "merge")
_NODE: Final = ("query", "answer", "compute")

Interval = tuple[float, float]


@dataclass(frozen=True, slots=True)
class Layer:
    """The intervals of one layer, in seconds. Worker: `weights` are the products up to the attention, `receive` includes the wait.
    Node: `query` from the header's arrival to the answer's departure, in it `answer` from the check of the bytes on, in it
    `compute`.
    """

    weights: Interval
    ask: Interval
    attend_here: Interval
    receive: Interval
    merge: Interval
    query: Interval
    answer: Interval
    compute: Interval

    def parts_us(self, rtt_ms: float) -> dict[str, float]:
        """The microseconds of each part. `beside` is the time from the query to the merged result beside the longer computation
        and a round trip of `rtt_ms`.
        """
        whole = self.merge[1] - self.ask[0]
        beside = whole - max(_length(self.compute), _length(self.attend_here)) - rtt_ms / 1e3
        parts = {
            "worker: products of weights": _length(self.weights),
            "worker: build and send the query": _length(self.ask),
            "link: to the node": self.query[0] - self.ask[1],
            "node: receive the rows": self.answer[0] - self.query[0],
            "node: check, wait for its turn": self.compute[0] - self.answer[0],
            "node: compute": _length(self.compute),
            "node: checksum and send": self.query[1] - self.compute[1],
            "link: to the worker, receive and check": self.receive[1] - max(self.query[1], self.receive[0]),
            "worker: local attention (beside the node)": _length(self.attend_here),
            "worker: wait for the partial": _length(self.receive),
            "worker: merge": _length(self.merge),
            "from the query to the merged result": whole,
            "beside computing and the link": beside,
        }
        return {name: seconds * _US for name, seconds in parts.items()}


@dataclass(frozen=True, slots=True)
class Timeline:
    """The layers of some steps over one link, one after the other."""

    cell: Cell
    context_tokens: int
    rtt_ms: float
    layers: Sequence[Layer]

    @property
    def link(self) -> str:
        """The link in words."""
        return self.cell.profile or "direct"

    def medians_us(self) -> dict[str, float]:
        """The median of each part over all layers."""
        parts = [layer.parts_us(self.rtt_ms) for layer in self.layers]
        return {name: statistics.median(each[name] for each in parts) for name in parts[0]}

    def events(self, number: int) -> Iterator[dict[str, Any]]:
        """The events of a Chrome trace; a timeline has two processes, worker and node."""
        worker, node = 2 * number, 2 * number + 1
        for pid, side in ((worker, "worker"), (node, "node")):
            yield {"name": "process_name", "ph": "M", "pid": pid, "args": {"name": f"{side}, {self.link}, {self.context_tokens}"}}
        for index, layer in enumerate(self.layers):
            for pid, names in ((worker, _WORKER), (node, _NODE)):
                for name in names:
                    began_s, ended_s = getattr(layer, name.replace(" ", "_"))
                    times = {"ts": began_s * _US, "dur": (ended_s - began_s) * _US}
                    yield {"name": name, "ph": "X", "pid": pid, "tid": pid, **times, "args": {"layer": index}}
            flow = {"cat": "exchange", "id": f"{number}.{index}"}
            yield {"name": "query", "ph": "s", "pid": worker, "tid": worker, "ts": layer.ask[1] * _US, **flow}
            yield {"name": "query", "ph": "f", "pid": node, "tid": node, "ts": layer.query[0] * _US, "bp": "e", **flow}


def trace(model: LoadedModel, prompt: list[int], cells: Sequence[Cell], *, threads: int) -> list[Timeline]:
    """Returns the timelines of attended steps behind a prompt, one for each link."""
    timelines = []
    layers = model.layout(BLOCK_TOKENS).layers
    for cell in cells:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "notes.json"
            under = (sys.executable, "-m", "experiments.attend.traced_node", str(path))
            with StoreProcess("--capacity", "1GiB", "--attend-threads", str(threads), under=under) as node:
                resident(model, prompt, 2, node.url)
                rtt_ms = measured_rtt_ms(cell.profile, weight_bytes(model) // layers)
                notes = _worker_notes()
                try:
                    with cell.link(node.url) as url:
                        attended(model, prompt, _TOKENS, url, speculate=False)
                finally:
                    notes.end()
            there = Notes()
            there.spans = [(label, began_s, ended_s) for label, began_s, ended_s in json.loads(path.read_text())]
        timelines.append(Timeline(cell, len(prompt), rtt_ms, _layers(notes, there, layers)))
    return timelines


def table(timelines: Sequence[Timeline]) -> Table:
    """Returns the medians of all parts, a column for each link."""
    shown = Table(title="Microseconds of a layer, medians")
    shown.add_column("part")
    for timeline in timelines:
        shown.add_column(f"{timeline.link}, {timeline.context_tokens}", justify="right")
    medians = [timeline.medians_us() for timeline in timelines]
    for name in medians[0]:
        shown.add_row(name, *(f"{each[name]:.0f}" for each in medians))
    return shown


def write(timelines: Sequence[Timeline], path: Path) -> None:
    """Writes a Chrome trace."""
    events = [event for number, timeline in enumerate(timelines) for event in timeline.events(number)]
    path.write_text(json.dumps({"traceEvents": events, "displayTimeUnit": "ns"}))


def _worker_notes() -> Notes:
    notes = Notes()
    notes.take(few_rows, "run_to_attention", "weights")
    notes.take(few_rows, "run_attention", "attend here")
    notes.take(RemoteStep, "ask_rows", "ask")
    notes.take(RemoteStep, "_receive", "receive")
    notes.take(online_softmax, "merge_rows", "merge")
    return notes


def _layers(here: Notes, there: Notes, layers: int) -> list[Layer]:
    """Returns the layers of the last steps. Every exchange is noted on both sides, and they end in the same order."""
    count = _STEPS * layers
    of_worker = {name: here.of(name)[-count:] for name in _WORKER}
    weights = here.of("weights")[-(layers + 1) * _STEPS :]
    of_worker["weights"] = [each for index, each in enumerate(weights) if (index + 1) % (layers + 1)]  # the last ends the step
    of_node = {name: there.of(name)[-count:] for name in _NODE}
    fields = {name.replace(" ", "_"): spans for name, spans in {**of_worker, **of_node}.items()}
    return [Layer(**{name: spans[index] for name, spans in fields.items()}) for index in range(count)]


def _length(interval: Interval) -> float:
    return interval[1] - interval[0]
