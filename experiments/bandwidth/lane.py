"""A lane: one contender's client, and the loop that times it.

Owns: the contract `Lane`, the timing of one cell (`measure`), and the pipe over which the parent requests it (`serve_lane`).
Invariant: only the operation itself is timed; freeing space between passes of writes is not. Standard library only, because a
peer's client runs in an environment without AttnStore.

The parent writes one JSON object per line, `{"verb", "batch", "seconds"}`; the lane answers with a `Sample` as JSON. Its first line
is the list of its verbs.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Protocol

from experiments.bandwidth.pages import PageBuffers, Shape, expected

Move = Callable[[int, int], None]
"""`move(begin, end)` moves pages `[begin, end)` of the run's shape and returns when all have arrived."""


class Lane(Protocol):
    """One client. A verb is `TRANSPORT read` or `TRANSPORT write`, as it appears in the rows."""

    @property
    def verbs(self) -> Mapping[str, Move]:
        """The verbs of the lane."""
        ...

    @property
    def landing(self) -> Mapping[str, PageBuffers]:
        """Where the pages of a verb arrive; None for writes, and if the peer returns objects of its own."""
        ...

    def begin_pass(self) -> None:
        """Called untimed before each pass over the pages: makes written pages new to the server again."""
        ...


@dataclass(frozen=True, slots=True)
class Start:
    """The start parameters of a lane: the pages, its server's address and processes, and other parameters."""

    page_bytes: int
    pages: int
    address: str = ""
    server_pids: tuple[int, ...] = ()
    variant: str = ""

    @property
    def shape(self) -> Shape:
        """The pages to move."""
        return Shape(self.page_bytes, self.pages)

    @classmethod
    def from_arguments(cls) -> Start:
        """Reads this process's first argument."""
        fields = json.loads(sys.argv[1])
        return cls(**{**fields, "server_pids": tuple(fields["server_pids"])})

    def to_argument(self) -> str:
        """The inverse of `from_arguments`."""
        return json.dumps(asdict(self))


@dataclass(frozen=True, slots=True)
class Sample:
    """One cell of one round: nanoseconds of each operation, bytes of all of them, CPU time of both sides."""

    ns: list[int]
    bytes: int
    client_ns: int
    server_ns: int

    @property
    def gb_per_s(self) -> float:
        """10^9 bytes per second."""
        return self.bytes / sum(self.ns)

    @property
    def cpu_s_per_gb(self) -> float:
        """CPU time of both sides per 10^9 bytes."""
        return (self.client_ns + self.server_ns) / self.bytes


def measure(lane: Lane, start: Start, verb: str, batch: int, seconds: float) -> Sample:
    """Repeats one verb on batch after batch of the pages for `seconds` of timed work, at least once."""
    move = lane.verbs[verb]
    durations_ns: list[int] = []
    left_ns = int(seconds * 1e9)
    client_ns = server_ns = 0
    begin = start.pages
    while left_ns > 0 or not durations_ns:
        if begin + batch > start.pages:
            begin = 0
            lane.begin_pass()
        server_ns -= _cpu_ns(start.server_pids)
        client_ns -= time.process_time_ns()
        began = time.perf_counter_ns()
        move(begin, begin + batch)
        took = time.perf_counter_ns() - began
        client_ns += time.process_time_ns()
        server_ns += _cpu_ns(start.server_pids)
        durations_ns.append(took)
        left_ns -= took
        begin += batch
    return Sample(durations_ns, len(durations_ns) * batch * start.page_bytes, client_ns, server_ns)


def serve_lane(lane: Lane, start: Start) -> None:
    """Checks that reads return the right bytes, then answers the parent until it closes the pipe."""
    for verb, destination in lane.landing.items():
        lane.verbs[verb](0, start.pages)
        for index, view in enumerate(destination.views):
            if view != expected(index, start.page_bytes):
                raise RuntimeError(f"{verb}: page {index} arrived wrong")
            view[:] = bytes(start.page_bytes)
    print(json.dumps(list(lane.verbs)), flush=True)
    for line in sys.stdin:
        print(json.dumps(asdict(measure(lane, start, **json.loads(line)))), flush=True)


def _cpu_ns(pids: tuple[int, ...]) -> int:
    """Returns the CPU time of other processes, all their threads: Linux's clock of a process, see `clock_getcpuclockid(3)`."""
    return sum(time.clock_gettime_ns((~pid << 3) | 2) for pid in pids)
