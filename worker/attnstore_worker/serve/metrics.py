"""The endpoint's Prometheus metrics.

Owns: their names. Invariant: label values come from closed sets (routes, status codes), never from a client.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from attnstore.telemetry import TaskFailures
from attnstore_worker.cache import CostPlanner, Planner
from attnstore_worker.cache.planning.decisions import ERROR_BOUNDS
from attnstore_worker.engine import EngineSnapshot

_TIER_METRICS = {
    "queried_tokens": "Prompt tokens that a tier was asked for.",
    "hit_tokens": "Prompt tokens that a tier had.",
    "bytes_read": "Page bytes copied up from a tier.",
    "evicted_blocks": "Blocks that a tier evicted.",
}
"""The names are those of `TierStatistics`."""
_TTFT_BUCKETS_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)


class ServeMetrics:
    """The metrics of one endpoint in a registry of its own, so that several can live in one process (tests do that)."""

    def __init__(self, snapshot: Callable[[], EngineSnapshot], planner: Planner) -> None:
        self._registry = CollectorRegistry()
        self.requests = Counter(
            "attnstore_worker_requests_total",
            "Requests answered, by route and status.",
            ["route", "status"],
            registry=self._registry,
        )
        self.ttft_seconds = Histogram(
            "attnstore_worker_ttft_seconds", "From request to first text.", buckets=_TTFT_BUCKETS_S, registry=self._registry
        )
        self._registry.register(_EngineCollector(snapshot))
        self._registry.register(TaskFailures())
        if isinstance(planner, CostPlanner):
            self._registry.register(_PlannerCollector(planner))

    def text(self) -> bytes:
        """Returns all metrics in Prometheus' text format."""
        return generate_latest(self._registry)


class _EngineCollector(Collector):
    def __init__(self, snapshot: Callable[[], EngineSnapshot]) -> None:
        self._snapshot = snapshot

    def collect(self) -> Iterator[Metric]:
        snapshot = self._snapshot()
        batching, pool, remote = snapshot.batching, snapshot.cache.pool, snapshot.cache.remote
        for state in ("running", "waiting"):
            yield GaugeMetricFamily(f"attnstore_worker_sequences_{state}", f"Sequences {state}.", getattr(batching, state))
        for state in ("capacity", "free", "held", "evictable"):
            yield GaugeMetricFamily(f"attnstore_worker_blocks_{state}", f"Blocks of the pool: {state}.", getattr(pool, state))
        for name, meaning in _TIER_METRICS.items():
            family = CounterMetricFamily(f"attnstore_worker_tier_{name}", meaning, labels=["tier"])
            for tier, statistics in snapshot.cache.tiers.items():
                family.add_metric([tier.value], getattr(statistics, name))
            yield family
        yield CounterMetricFamily("attnstore_worker_steps", "Steps of the engine.", batching.steps)
        yield CounterMetricFamily("attnstore_worker_tokens_computed", "Tokens run through the model.", batching.tokens_computed)
        yield CounterMetricFamily("attnstore_worker_tokens_generated", "Tokens sampled.", batching.tokens_generated)
        yield CounterMetricFamily("attnstore_worker_failures", "Sequences that ended with an error.", batching.failures)
        yield CounterMetricFamily("attnstore_worker_preemptions", "Sequences that lost their blocks.", batching.preemptions)
        yield CounterMetricFamily("attnstore_worker_store_read_bytes", "Page bytes read from the store.", remote.bytes_read)
        yield CounterMetricFamily("attnstore_worker_store_written_bytes", "Page bytes kept by the store.", remote.bytes_written)
        yield CounterMetricFamily("attnstore_worker_store_failures", "Calls to the store that failed.", remote.failures)


class _PlannerCollector(Collector):
    def __init__(self, planner: CostPlanner) -> None:
        self._planner = planner

    def collect(self) -> Iterator[Metric]:
        report, predictions = self._planner.report(), self._planner.predictions()
        rtt = GaugeMetricFamily("attnstore_worker_link_rtt_seconds", "Round trip of a question to a tier.", labels=["tier"])
        rate = GaugeMetricFamily("attnstore_worker_link_bytes_per_second", "Bandwidth of reads from a tier.", labels=["tier"])
        spread = GaugeMetricFamily("attnstore_worker_link_spread", "Factor within which a read is expected.", labels=["tier"])
        for tier, link in report.links.items():
            rtt.add_metric([tier.value], link.rtt_ms / 1e3)
            rate.add_metric([tier.value], link.bytes_per_ms * 1e3)
            spread.add_metric([tier.value], link.spread)
        copied = GaugeMetricFamily(
            "attnstore_worker_copy_bytes_per_second",
            "Bandwidth of copies up to the device, by the tier of the pages.",
            labels=["tier"],
        )
        for tier, copy in report.copies.items():
            copied.add_metric([tier.value], copy.bytes_per_ms * 1e3)
        yield from (rtt, rate, spread, copied)
        if report.prefill is not None:
            for name in ("chunk_ms", "token_ms", "pair_ms"):
                value_s = getattr(report.prefill, name) / 1e3
                text = "Seconds of prefill for each chunk, token, or pair of a token and one of its context."
                yield GaugeMetricFamily(f"attnstore_worker_prefill_{name.removesuffix('_ms')}_seconds", text, value_s)
        if report.decode_ms is not None:
            yield GaugeMetricFamily(
                "attnstore_worker_decode_step_seconds", "A decode step of one sequence.", report.decode_ms / 1e3
            )
        yield GaugeMetricFamily("attnstore_worker_load_slowdown", "How much a load slows computing down.", report.slowdown)
        if report.attend is not None:
            yield GaugeMetricFamily(
                "attnstore_worker_attend_round_trip_seconds",
                "One exchange with a store node that attends.",
                report.attend.round_trip_ms / 1e3,
            )
            yield GaugeMetricFamily(
                "attnstore_worker_attend_factor", "Attended steps over what their formula says.", report.attend.factor
            )
        choices = CounterMetricFamily("attnstore_worker_decisions", "Prompts, by what was planned.", labels=["choice"])
        for choice, count in predictions.choices.items():
            choices.add_metric([choice], count)
        yield choices
        bounds = [*map(str, ERROR_BOUNDS), "+Inf"]
        buckets = list(zip(bounds, map(float, predictions.errors_at_most), strict=True))
        text = "Relative error of predicted times to the first token."
        yield HistogramMetricFamily("attnstore_worker_prediction_error", text, buckets, predictions.error_sum)
