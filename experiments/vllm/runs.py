"""One run: a node that has the documents, and each engine in turn, alone or on the node over a transport and link.

Owns: the node, the links and the sessions of a run, and `Row`. Invariants: at most one engine works at a time; every engine's
tokens are compared with those of vLLM alone.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import IO, Any, Final

import attnstore
from attnstore.links import LinkProfile, parse_link
from attnstore.testing import StoreProcess
from attnstore.testing.link import Link
from experiments.bandwidth.processes import Child
from experiments.vllm.lmcache import lmcache_server
from experiments.vllm.session import Answers, Batch, Start, attnstore_connector, environment
from experiments.vllm.workloads import Played, Workload

_START_S_MAX: Final = 600.0
"""vLLM compiles when it starts, which takes minutes on a busy machine."""
_BATCH_S_MAX: Final = 300.0
_SETTLED_S: Final = 0.3
_SETTLE_S_MAX: Final = 60.0
_LMCACHE_SETTLE_S: Final = 1.0
"""vLLM does not report when everything is written."""
_CAPACITY: Final = "4GiB"


@dataclass(frozen=True, slots=True)
class System:
    """vLLM on a node behind `link` (text for `parse_link`), or, if `transport` is None, alone or on a `peer`."""

    transport: str | None = None
    link: str = "loopback"
    peer: str | None = None

    @property
    def name(self) -> str:
        """Its name in output and salts."""
        return f"attnstore {self.transport} {self.link}" if self.transport else self.peer or "vllm"

    @property
    def profile(self) -> LinkProfile:
        """The link's figures."""
        return parse_link(self.link)


@dataclass(frozen=True, slots=True)
class Row:
    """One system and workload. `ttft_ms`: median; `over_alone`: relative to vLLM alone; `tokens_per_s`: new tokens over the whole
    time.

    `bytes_read` is None if only the peer knows it.
    """

    system: str
    transport: str | None
    link: str
    rtt_ms: float
    gbit_per_s: float | None
    dtype: str
    workload: str
    requests: int
    ttft_ms: float
    ttft_max_ms: float
    over_alone: float
    tokens_per_s: float
    bytes_read: int | None
    tokens_equal: bool


class Engine:
    """A session's process. Raises `ChildEnded` if it breaks or takes too long."""

    def __init__(self, python: Path, start: Start, threads: int, log: IO[str]) -> None:
        command = [str(python), "-m", "experiments.vllm.session", json.dumps(asdict(start))]
        self._child = Child(command, stderr=log, environment=environment(os.environ, threads))
        try:
            self._child.first_line(_START_S_MAX)
        except BaseException:
            self._child.stop()
            raise

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self._child.stop()

    def ask(self, batch: Batch) -> Answers:
        """Runs a batch to its end."""
        return Answers(**json.loads(self._child.ask_within(_BATCH_S_MAX, json.dumps(asdict(batch)))))


class Run:
    """Measures systems one after the other on one node. `report` is called with each start; vLLM's output goes to `log`."""

    def __init__(self, python: Path, start: Start, threads: int, log: IO[str], report: Callable[[str], None]) -> None:
        self._python = python
        self._start = start
        self._threads = threads
        self._log = log
        self._report = report

    def measure(self, systems: Sequence[System], workloads: Sequence[Workload], lmcache_python: Path | None) -> Iterator[Row]:
        """Yields rows, first those of vLLM alone, last those of LMCache if there is an interpreter that has it. Raises
        `ChildEnded`.
        """
        with StoreProcess("--capacity", _CAPACITY) as node, attnstore.connect(node.url, transport="grpc") as client:
            self._report("vllm alone")
            with self._engine(None) as engine:
                alone = {workload.name: workload.play(engine.ask, None) for workload in workloads}
            for workload in workloads:
                yield self._row(System(), workload, alone[workload.name], alone[workload.name], 0)
            self._report("one process that fills the store")
            with self._engine(attnstore_connector(store=node.url)) as engine:
                for workload in workloads:
                    workload.fill(engine.ask)
                _settle(client)
            for system in systems:
                yield from self._on_node(system, workloads, alone, node, client)
        if lmcache_python is not None:
            yield from self._on_lmcache(lmcache_python, workloads, alone)

    def _on_node(
        self,
        system: System,
        workloads: Sequence[Workload],
        alone: dict[str, Played],
        node: StoreProcess,
        client: attnstore.Client | attnstore.ClusterClient,
    ) -> Iterator[Row]:
        self._report(system.name)
        with (
            _reached(node, system) as url,
            self._engine(attnstore_connector(store=url, transport=system.transport)) as engine,
        ):

            def ask(batch: Batch) -> Answers:
                _settle(client)  # waits until the last turn is written: users take longer than that to think
                return engine.ask(batch)

            def ask_alone(batch: Batch) -> Answers:
                return ask(replace(batch, salts=[system.name for _ in batch.prompts]))

            for workload in workloads:
                read = client.stats().read_bytes
                played = workload.play(ask if workload.shares else ask_alone, alone[workload.name].tokens)
                yield self._row(system, workload, played, alone[workload.name], client.stats().read_bytes - read)

    def _on_lmcache(self, python: Path, workloads: Sequence[Workload], alone: dict[str, Played]) -> Iterator[Row]:
        system = System(peer="lmcache")
        self._report(system.name)
        with lmcache_server(python, self._log) as connector:
            with self._engine(connector, python) as engine:
                for workload in workloads:
                    workload.fill(engine.ask)
            with self._engine(connector, python) as engine:

                def ask(batch: Batch) -> Answers:
                    time.sleep(_LMCACHE_SETTLE_S)
                    return engine.ask(batch)

                for workload in workloads:
                    played = workload.play(ask, alone[workload.name].tokens)
                    yield self._row(system, workload, played, alone[workload.name], None)

    def _engine(self, connector: dict[str, Any] | None, python: Path | None = None) -> Engine:
        return Engine(python or self._python, replace(self._start, connector=connector), self._threads, self._log)

    def _row(self, system: System, workload: Workload, played: Played, alone: Played, bytes_read: int | None) -> Row:
        profile = system.profile
        return Row(
            system=system.name,
            transport=system.transport,
            link=system.link,
            rtt_ms=profile.rtt_ms,
            gbit_per_s=None if math.isinf(profile.down_bits_per_s) else profile.down_bits_per_s / 1e9,
            dtype=self._start.dtype,
            workload=workload.name,
            requests=len(played.ttft_ms),
            ttft_ms=median(played.ttft_ms),
            ttft_max_ms=max(played.ttft_ms),
            over_alone=median(played.ttft_ms) / median(alone.ttft_ms),
            tokens_per_s=sum(map(len, played.tokens)) / played.wall_ms * 1e3,
            bytes_read=bytes_read,
            tokens_equal=played.tokens == alone.tokens,
        )


@contextmanager
def _reached(node: StoreProcess, system: System) -> Iterator[str]:
    if system.link == "loopback":
        yield node.url
        return
    with Link.to_node(node.url, system.profile) as link:
        yield link.url


def _settle(client: attnstore.Client | attnstore.ClusterClient) -> None:
    """Waits until nothing is being written."""
    give_up_s = time.monotonic() + _SETTLE_S_MAX
    sealed, since_s = -1, time.monotonic()
    while time.monotonic() < give_up_s:
        now = client.stats().pages_sealed
        if now != sealed:
            sealed, since_s = now, time.monotonic()
        elif time.monotonic() - since_s > _SETTLED_S:
            return
        time.sleep(_SETTLED_S / 6)
