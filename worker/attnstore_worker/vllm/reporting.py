"""The connector's counters and events in the classes of vLLM, for its `/metrics` and its event publisher.

Owns: only the translation. Written against vLLM 0.32.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Final

from vllm.distributed.kv_events import BlockRemoved, BlockStored, KVCacheEvent
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorBase_V1
from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorPromMetrics, KVConnectorStats
from vllm.v1.core.kv_cache_utils import maybe_convert_block_hash
from vllm.v1.metrics.utils import create_metric_per_engine

from attnstore_worker.vllm.counts import COUNTERS, Counts
from attnstore_worker.vllm.store_events import BlocksStored, StoreEvent, StoreEvents

MEDIUM: Final = "ATTNSTORE"
_LOCALITY: Final = "REMOTE"


@dataclass
class AttnStoreStats(KVConnectorStats):
    """Counts by the names of `COUNTERS`."""

    def reset(self) -> None:
        """See the base class."""
        self.data: dict[str, Any] = {}

    def aggregate(self, other: KVConnectorStats) -> AttnStoreStats:
        """Adds up the counts of two processes, or of two steps."""
        names = self.data.keys() | other.data.keys()
        return AttnStoreStats({name: self.data.get(name, 0) + other.data.get(name, 0) for name in names})

    def reduce(self) -> dict[str, int | float]:
        """Returns what vLLM logs."""
        return {f"store {name}": round(value, 3) for name, value in sorted(self.data.items())}

    def is_empty(self) -> bool:
        """See the base class."""
        return not self.data


class AttnStorePromMetrics(KVConnectorPromMetrics):
    """A counter `vllm:attnstore_NAME` for each of `COUNTERS`."""

    def __init__(self, vllm_config: Any, metric_types: Any, labelnames: list[str], per_engine_labelvalues: Any) -> None:
        super().__init__(vllm_config, metric_types, labelnames, per_engine_labelvalues)
        self._counters = {
            name: create_metric_per_engine(
                self._counter_cls(name=f"vllm:attnstore_{name}", documentation=documentation, labelnames=labelnames),
                self.per_engine_labelvalues,
            )
            for name, documentation in COUNTERS.items()
        }

    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        """See the base class."""
        for name, value in transfer_stats_data.items():
            self._counters[name][engine_idx].inc(value)


def kv_events(events: Iterable[StoreEvent], block_tokens: int, group: int) -> Iterator[KVCacheEvent]:
    """The events as vLLM publishes them, of one of its groups of caches."""
    for event in events:
        hashes = [maybe_convert_block_hash(block) for block in event.block_hashes]
        if isinstance(event, BlocksStored):
            yield BlockStored(
                block_hashes=hashes,
                parent_block_hash=None if event.parent is None else maybe_convert_block_hash(event.parent),
                token_ids=list(event.token_ids),
                block_size=block_tokens,
                lora_id=None,
                medium=MEDIUM,
                lora_name=None,
                extra_keys=None if event.salt is None else [(event.salt,), *[None] * (len(hashes) - 1)],
                group_idx=group,
                locality=_LOCALITY,
            )
        else:
            yield BlockRemoved(block_hashes=hashes, medium=MEDIUM, group_idx=group, locality=_LOCALITY)


class ReportingConnector(KVConnectorBase_V1):
    """The methods by which vLLM asks each of its processes for counts, and the scheduler's for events."""

    _counts: Counts
    _events: StoreEvents | None
    _told_group: int

    def take_events(self) -> Iterable[KVCacheEvent]:
        """See the base class."""
        if self._events is None:
            return ()
        return tuple(kv_events(self._events.take(), self._events.block_tokens, self._told_group))

    def get_kv_connector_stats(self) -> AttnStoreStats | None:
        """See the base class."""
        counts = self._counts.take()
        return AttnStoreStats(counts) if counts else None

    @classmethod
    def build_kv_connector_stats(cls, data: dict[str, Any] | None = None) -> AttnStoreStats:
        """See the base class."""
        return AttnStoreStats(data or {})

    @classmethod
    def build_prom_metrics(
        cls, vllm_config: Any, metric_types: Any, labelnames: list[str], per_engine_labelvalues: Any
    ) -> AttnStorePromMetrics:
        """See the base class."""
        return AttnStorePromMetrics(vllm_config, metric_types, labelnames, per_engine_labelvalues)
