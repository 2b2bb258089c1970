"""One run: a node that has the documents, and each engine in turn, alone or on the node over a transport and link.

Owns: the node, the links and the sessions of a run, and `Row`. Invariants: at most one engine works at a time; each request is made
twice in a row, of vLLM alone and of the other, in turns the one and the other first, so that a machine that changes its speed
changes both; every engine's tokens are compared with those of vLLM alone.
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
from experiments.vllm.workloads import Ask, Played, Workload

_START_S_MAX: Final = 600.0
"""vLLM compiles when it starts, which takes minutes on a busy machine."""
_BATCH_S_MAX: Final = 300.0
_SETTLED_S: Final = 0.3
_SETTLE_S_MAX: Final = 60.0
_LMCACHE_SETTLE_S: Final = 1.0
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
    """One system and workload. `ttft_ms`: median; `over_alone`, `max_over_alone`: the median and the slowest relative to those of
    vLLM alone; `over_own_cache`: the median relative to that of vLLM alone for prompts in its own prefix cache, where it was
    measured; `tokens_per_s`: new tokens over the whole time, and `speed_over_alone` relative to vLLM alone.

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
    max_over_alone: float
    over_own_cache: float | None
    tokens_per_s: float
    speed_over_alone: float
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
        with (
            StoreProcess("--capacity", _CAPACITY) as node,
            attnstore.connect(node.url, transport="grpc") as client,
            self._started("vllm alone", None) as alone,
        ):
            known = {workload.name: workload.play(alone.ask, None) for workload in workloads}
            for workload in workloads:
                yield self._row(System(), workload, known[workload.name], known[workload.name], None, 0)
            with self._started("one process that fills the store", attnstore_connector(store=node.url)) as engine:
                for workload in workloads:
                    workload.fill(engine.ask)
                _settle(client)
            for system in systems:
                with _reached(node, system) as url:
                    connector = attnstore_connector(store=url, transport=system.transport)
                    with self._started(system.name, connector) as engine:
                        yield from self._beside(system, workloads, alone, engine, known, client)
            if lmcache_python is not None:
                yield from self._on_lmcache(lmcache_python, workloads, alone, known)

    def _beside(
        self,
        system: System,
        workloads: Sequence[Workload],
        alone: Engine,
        engine: Engine,
        known: dict[str, Played],
        client: attnstore.Client | attnstore.ClusterClient | None,
    ) -> Iterator[Row]:
        for workload in workloads:
            pairs = Pairs(alone.ask, engine.ask, None if workload.shares else system.name, workload.waits, client)
            read = client.stats().read_bytes if client is not None else None
            played = workload.play(pairs.ask, known[workload.name].tokens)
            read_after = client.stats().read_bytes if client is not None else None
            yield self._row(
                system,
                workload,
                played,
                pairs.alone,
                pairs.own_cache if workload.shares else None,
                None if read is None or read_after is None else read_after - read,
            )

    def _on_lmcache(self, python: Path, workloads: Sequence[Workload], alone: Engine, known: dict[str, Played]) -> Iterator[Row]:
        system = System(peer="lmcache")
        with lmcache_server(python, self._log) as connector:
            with self._started("lmcache fills its server", connector, python) as engine:
                for workload in workloads:
                    workload.fill(engine.ask)
            with self._started(system.name, connector, python) as engine:
                yield from self._beside(system, workloads, alone, engine, known, None)

    def _started(self, name: str, connector: dict[str, Any] | None, python: Path | None = None) -> Engine:
        self._report(name)
        return Engine(python or self._python, replace(self._start, connector=connector), self._threads, self._log)

    def _row(
        self, system: System, workload: Workload, played: Played, alone: Played, own_cache: Played | None, bytes_read: int | None
    ) -> Row:
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
            max_over_alone=max(played.ttft_ms) / max(alone.ttft_ms),
            over_own_cache=None if own_cache is None else median(played.ttft_ms) / median(own_cache.ttft_ms),
            tokens_per_s=sum(map(len, played.tokens)) / played.wall_ms * 1e3,
            speed_over_alone=alone.wall_ms / played.wall_ms,
            bytes_read=bytes_read,
            tokens_equal=played.tokens == alone.tokens,
        )


class Pairs:
    """Asks vLLM alone and another engine the same, in turns the one and the other first. The other's requests have this `salt`.
    With `waits`, pages are written before it is asked again: users take longer than that to think.
    """

    def __init__(
        self, alone: Ask, other: Ask, salt: str | None, waits: bool, client: attnstore.Client | attnstore.ClusterClient | None
    ):
        self.alone = Played()
        self.own_cache = Played()
        """The same prompts while vLLM alone has them in its own cache."""
        self._alone = alone
        self._other = other
        self._salt = salt
        self._waits = waits
        self._client = client
        self._alone_first = True

    def ask(self, batch: Batch) -> Answers:
        """Returns the other engine's answers."""
        self._alone_first = not self._alone_first
        if self._alone_first:
            self._ask_alone(batch)
        self._wait()
        answers = self._other(batch if self._salt is None else replace(batch, salts=[self._salt for _ in batch.prompts]))
        if not self._alone_first:
            self._ask_alone(batch)
        return answers

    def _ask_alone(self, batch: Batch) -> None:
        self._wait()
        self.alone.add(self._alone(batch))
        if self._salt is None:
            self._wait()
            self.own_cache.add(self._alone(replace(batch, forget=False)))

    def _wait(self) -> None:
        if self._waits:
            _settle(self._client)


@contextmanager
def _reached(node: StoreProcess, system: System) -> Iterator[str]:
    if system.link == "loopback":
        yield node.url
        return
    with Link.to_node(node.url, system.profile) as link:
        yield link.url


def _settle(client: attnstore.Client | attnstore.ClusterClient | None) -> None:
    """Waits until nothing is being written. A peer does not report it."""
    if client is None:
        time.sleep(_LMCACHE_SETTLE_S)
        return
    give_up_s = time.monotonic() + _SETTLE_S_MAX
    sealed, since_s = -1, time.monotonic()
    while time.monotonic() < give_up_s:
        now = client.stats().pages_sealed
        if now != sealed:
            sealed, since_s = now, time.monotonic()
        elif time.monotonic() - since_s > _SETTLED_S:
            return
        time.sleep(_SETTLED_S / 6)
