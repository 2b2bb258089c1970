"""Prometheus metrics of a store node.

Owns: the names of all metrics. Invariant: label values come from closed sets (RPC names, status names), never from a peer.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from attnstore import tasks
from attnstore.core.statistics import PageTableStatistics
from attnstore.errors import AttnStoreError
from attnstore.types import PageStatus

_LATENCY_BUCKETS_S = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)


class NodeMetrics:
    """The metrics of one node in a registry of its own, so that several nodes can live in one process (tests do that)."""

    def __init__(self, occupancy: Callable[[], PageTableStatistics]) -> None:
        self.registry = CollectorRegistry()
        self.calls = Counter("attnstore_rpc_total", "Calls ended, by RPC and error code.", ["rpc", "code"], registry=self.registry)
        self.seconds = Histogram(
            "attnstore_rpc_seconds", "Duration of calls.", ["rpc"], buckets=_LATENCY_BUCKETS_S, registry=self.registry
        )
        self.in_flight = Gauge("attnstore_rpc_in_flight", "Calls running now.", ["rpc"], registry=self.registry)
        self._pages = _ByLabels(
            Counter("attnstore_pages_total", "Pages answered, by RPC and status.", ["rpc", "status"], registry=self.registry)
        )
        self._sent = _ByLabels(
            Counter("attnstore_sent_bytes_total", "Page bytes sent to readers.", ["transport"], registry=self.registry)
        )
        self._received = _ByLabels(
            Counter("attnstore_received_bytes_total", "Page bytes received from writers.", ["transport"], registry=self.registry)
        )
        self._attended = _ByLabels(
            Counter("attnstore_attended_rows_total", "Query rows answered in place.", ["transport"], registry=self.registry)
        )
        self.loop_lag = Histogram(
            "attnstore_loop_lag_seconds",
            "How late the event loop was, looked at ten times a second.",
            buckets=_LATENCY_BUCKETS_S,
            registry=self.registry,
        )
        self.handed_over = Counter(
            "attnstore_handed_over_pages_total", "Pages sent to their new owners, by verdict.", ["status"], registry=self.registry
        )
        self.members = Gauge(
            "attnstore_cluster_members", "Nodes of the cluster as this one sees it, by state.", ["state"], registry=self.registry
        )
        self.hot_segments = Gauge(
            "attnstore_hot_segments", "Segments used so often here that they have a second copy.", registry=self.registry
        )
        self.records_skipped = Gauge(
            "attnstore_directory_records_skipped",
            "Records of the directory that no node of this cluster can have written, by kind.",
            ["kind"],
            registry=self.registry,
        )
        self.directory_up = Gauge(
            "attnstore_directory_up", "1 where the directory answered the last heartbeat.", registry=self.registry
        )
        self.certificate_expiry = Gauge(
            "attnstore_certificate_expiry_timestamp_seconds",
            "When the certificate of --tls-cert expires, in seconds since 1970; 0 without TLS.",
            registry=self.registry,
        )
        self.registry.register(_OccupancyCollector(occupancy))
        self.registry.register(TaskFailures())
        self._read_bytes = 0
        self._read_pages = 0
        self._lock = threading.Lock()

    @property
    def read_bytes(self) -> int:
        """Page bytes sent since start, over all transports."""
        return self._read_bytes

    @property
    def read_pages(self) -> int:
        """Pages sent or shared since start, whole or in part, over all transports."""
        return self._read_pages

    def ended(self, rpc: str, code: str, seconds: float) -> None:
        """Counts a call that has ended, and its duration. Safe from any thread."""
        self.calls.labels(rpc, code).inc()
        self.seconds.labels(rpc).observe(seconds)

    @contextmanager
    def call(self, rpc: str) -> Iterator[None]:
        """Counts the `with` block as one call, whatever its transport. Safe from any thread."""
        began, code = time.perf_counter(), "ok"
        with self.in_flight.labels(rpc).track_inprogress():
            try:
                yield
            except AttnStoreError as error:
                code = error.code
                raise
            finally:
                self.ended(rpc, code, time.perf_counter() - began)

    def matched(self, hits: Sequence[int], prefixes: Sequence[Sequence[bytes]]) -> None:
        """Counts the pages of an answered Match. Safe from any thread."""
        self.pages("Match", PageStatus.OK, sum(hits))
        self.pages("Match", PageStatus.MISSING, sum(map(len, prefixes)) - sum(hits))

    def pages(self, rpc: str, status: PageStatus, count: int = 1) -> None:
        """Counts pages answered. Safe from any thread."""
        self._pages[rpc, status.name.lower()].inc(count)

    def sent(self, transport: str, pages: int, size_bytes: int) -> None:
        """Counts pages answered by a Read, and the bytes sent. Safe from any thread."""
        self.pages("Read", PageStatus.OK, pages)
        self._sent[(transport,)].inc(size_bytes)
        with self._lock:
            self._read_pages += pages
            self._read_bytes += size_bytes

    def received(self, transport: str, size_bytes: int) -> None:
        """Counts page bytes received from a writer, stored or not. Safe from any thread."""
        self._received[(transport,)].inc(size_bytes)

    def attended(self, transport: str, rows: int) -> None:
        """Counts query rows that were answered. Safe from any thread."""
        self._attended[(transport,)].inc(rows)


class _ByLabels(dict[tuple[str, ...], Counter]):
    """The children of a counter by their label values. `Counter.labels` takes a lock and builds the key at every call, which every
    page would pay three times.
    """

    def __init__(self, counter: Counter) -> None:
        super().__init__()
        self._counter = counter

    def __missing__(self, values: tuple[str, ...]) -> Counter:
        child = self[values] = self._counter.labels(*values)
        return child


class TaskFailures(Collector):
    """The failures of background work in this process, whose tasks are shared by everything that runs in it."""

    def describe(self) -> Iterator[Metric]:
        yield from ()

    def collect(self) -> Iterator[Metric]:
        family = CounterMetricFamily("attnstore_task_failures", "Failures of background work, by its name.", labels=["task"])
        for name, count in tasks.failures().items():
            family.add_metric([name], count)
        yield family


class _OccupancyCollector(Collector):
    def __init__(self, occupancy: Callable[[], PageTableStatistics]) -> None:
        self._occupancy = occupancy

    def describe(self) -> Iterator[Metric]:
        yield from ()

    def collect(self) -> Iterator[Metric]:
        now = self._occupancy()
        for name, text, value in (
            ("attnstore_capacity_bytes", "Hard limit of the arena.", now.capacity_bytes),
            ("attnstore_used_bytes", "Bytes of slots that are arriving or sealed.", now.used_bytes),
            ("attnstore_pages_sealed", "Pages that can be read.", now.pages_sealed),
            ("attnstore_pages_arriving", "Pages being written.", now.pages_arriving),
            ("attnstore_pages_pinned", "Sealed pages held by a lease or a running read.", now.pages_pinned),
            ("attnstore_leases", "Live leases.", now.leases),
        ):
            yield GaugeMetricFamily(name, text, value=value)
        for name, text, value in (
            (
                "attnstore_hit_pages",
                "Look-ups of pages that found them: once for each Match that asks; reads do not count again.",
                now.hit_pages,
            ),
            (
                "attnstore_missed_pages",
                "Look-ups of pages that found nothing: once for each Match that asks; reads do not count again.",
                now.missed_pages,
            ),
            ("attnstore_stored_pages", "Pages sealed.", now.stored_pages),
            ("attnstore_evicted_pages", "Pages evicted.", now.evicted_pages),
            ("attnstore_verified_pages", "Pages hashed again where they lie.", now.verified_pages),
            ("attnstore_corrupt_pages", "Pages dropped because they were not what was sealed any more.", now.corrupt_pages),
        ):
            yield CounterMetricFamily(name, text, value=value)
