"""The time of a `Match`: over the wire, idle and during bulk reads, and in the page table itself for growing sizes.

Owns: `MatchFigures` and its two measurements. Invariant: every requested hash is found, so that the full cost is measured. The
pages of the table have no payload (the core stores none), so a million of them fit here.
"""

from __future__ import annotations

import json
import os
import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import cycle, islice

import attnstore
from attnstore.core.page_table import ArrivingPage, PageTable
from attnstore.limits import LEASE_ID_BYTES
from attnstore.testing import StoreProcess
from attnstore.types import Space
from experiments.bandwidth.lane import Start
from experiments.bandwidth.processes import Child
from experiments.bandwidth.results import quantile_us

_LAYOUT = attnstore.PageLayout(layers=1, kv_heads=1, head_dim=8)
_EXTENT_BYTES = 4 << 20
_WIRE_HASHES = 512
_BULK_PAGES = 256
_BULK_PAGE_BYTES = 368_640
_BULK_BATCH = 32


@dataclass(frozen=True, slots=True)
class MatchFigures:
    """One line: latencies of one call with `hashes` hashes, all of them in a table of `table_pages` pages."""

    where: str
    table_pages: int
    hashes: int
    p50_us: float
    p99_us: float

    @property
    def ns_per_hash(self) -> float:
        """The median time of a call, divided by its hashes."""
        return self.p50_us * 1000 / self.hashes


def over_the_wire(seconds: float) -> list[MatchFigures]:
    """Measures `Match` of 512 hashes on loopback: on an idle node, and while another process reads pages from it in bulk."""
    pages = max(_WIRE_HASHES, _BULK_PAGES)
    capacity_bytes = (pages + 2 * _BULK_PAGES) * _BULK_PAGE_BYTES
    start = Start(_BULK_PAGE_BYTES, _BULK_PAGES)
    with StoreProcess("--capacity", str(capacity_bytes), "--log-level", "error") as node, attnstore.connect(node.url) as client:
        namespace = attnstore.namespace(_LAYOUT, model=b"match")
        hashes = _hashes(_WIRE_HASHES)
        client.register_layout(namespace, _LAYOUT)
        client.write(namespace, hashes, [bytes(_LAYOUT.page_bytes)] * _WIRE_HASHES)

        def match() -> None:
            if client.match(namespace, [hashes]).hits != (_WIRE_HASHES,):
                raise RuntimeError("the node lost a page")

        idle = _timed(match, seconds)
        with _bulk_reads(replace(start, address=node.url, server_pids=(node.process.pid,))):
            busy = _timed(match, seconds)
    return [
        _figures("wire, idle node", _WIRE_HASHES, _WIRE_HASHES, idle),
        _figures("wire, during bulk tcp reads", _WIRE_HASHES + _BULK_PAGES, _WIRE_HASHES, busy),
    ]


def in_the_table(table_pages: Sequence[int], hashes: Sequence[int], seconds: float) -> list[MatchFigures]:
    """Measures `PageTable.match` without a network, for each size of the table and each number of hashes."""
    return [figure for pages in table_pages for figure in _of_table(pages, hashes, seconds)]


def _of_table(pages: int, hashes: Sequence[int], seconds: float) -> Iterator[MatchFigures]:
    table = PageTable(
        capacity_bytes=-(-pages * _LAYOUT.page_bytes // _EXTENT_BYTES) * _EXTENT_BYTES,
        extent_bytes=_EXTENT_BYTES,
        new_lease_id=lambda: os.urandom(LEASE_ID_BYTES),
    )
    space = Space("default", attnstore.namespace(_LAYOUT, model=b"match"))
    table.namespaces.register(space, _LAYOUT)
    known = _hashes(pages)
    for page_hash in known:
        arriving = table.prepare(space, page_hash, 0, 0.0)
        assert isinstance(arriving, ArrivingPage), arriving
        table.complete(arriving, 0.0)
        table.take_events()
    starts = random.Random(pages)
    for count in hashes:
        # The blocks of a prompt were stored one after the other; a table smaller than the prompt is repeated.
        at = starts.randrange(pages)
        prefix = list(islice(cycle(known[at:] + known[:at]), count))
        durations = _timed(partial(table.match, space, [prefix], 0, 0.0), seconds)
        yield _figures("page table", pages, count, durations)


@contextmanager
def _bulk_reads(start: Start) -> Iterator[None]:
    """Runs a lane that reads from the node all the time."""
    with Child.of_module("experiments.bandwidth.lanes.store", start.to_argument()) as lane:
        lane.first_line()
        lane.tell(json.dumps({"verb": "tcp read", "batch": _BULK_BATCH, "seconds": 3600}))
        try:
            yield
        finally:
            lane.process.kill()


def _timed(call: Callable[[], object], seconds: float) -> list[int]:
    """Returns the nanoseconds of each call during the given time, after one warm-up call."""
    call()
    durations: list[int] = []
    until = time.perf_counter_ns() + int(seconds * 1e9)
    while not durations or time.perf_counter_ns() < until:
        began = time.perf_counter_ns()
        call()
        durations.append(time.perf_counter_ns() - began)
    return durations


def _figures(where: str, table_pages: int, hashes: int, durations_ns: list[int]) -> MatchFigures:
    return MatchFigures(where, table_pages, hashes, quantile_us(durations_ns, 0.5), quantile_us(durations_ns, 0.99))


def _hashes(count: int) -> list[bytes]:
    source = random.Random(count)
    return [source.randbytes(32) for _ in range(count)]
