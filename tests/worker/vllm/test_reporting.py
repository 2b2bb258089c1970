"""The counters of the connector, and with a real vLLM its metrics and events."""

from __future__ import annotations

import os
import subprocess
from typing import Final

import pytest

from attnstore.core.layout import PageLayout
from attnstore.testing import ManualClock
from attnstore_worker.cache.pool.tier import Tier
from attnstore_worker.cache.store.transfer import Transfer, TransferKind
from attnstore_worker.testing import MemoryStore
from attnstore_worker.vllm.counts import COUNTERS, Counts
from attnstore_worker.vllm.gate import Gate
from attnstore_worker.vllm.identity import page_hashes, page_layout, vllm_namespace
from attnstore_worker.vllm.written_tier import WrittenTier

PYTHON: Final = os.environ.get("ATTNSTORE_VLLM_PYTHON")
LAYOUT: Final[PageLayout] = page_layout(
    layers=2, layer_block_bytes=2 * 3 * 16 * 8, kv_heads=3, block_tokens=16, tp_rank=0, tp_size=1
)
SPACE: Final = vllm_namespace(LAYOUT, {"model": "m"}, tenant_salt="")


def transfer(kind: TransferKind, *, size_bytes: int = 0, failed: bool = False) -> Transfer:
    return Transfer(Tier.REMOTE, kind, 1_000.0, 1_250.0, 1, 1, size_bytes, failed)


def test_each_kind_of_call_has_its_counters_and_is_passed_on() -> None:
    gate = Gate(ManualClock(), load_ms_max=5_000)
    counts = Counts(then=gate)
    counts.hit(320)
    counts.hit(0)
    for _ in range(2):
        counts.transferred(transfer(TransferKind.MATCH))
        counts.transferred(transfer(TransferKind.READ, size_bytes=5_000))
    counts.transferred(transfer(TransferKind.WRITE, size_bytes=7, failed=True))
    counts.transferred(transfer(TransferKind.MATCH, failed=True))
    expected = {"hit_tokens": 320, "lookups": 3, "lookup_seconds": 0.75, "lookup_failures": 1, "loaded_bytes": 10_000}
    expected |= {"load_seconds": 0.5, "saved_bytes": 7, "save_seconds": 0.25, "save_failures": 1}
    told = counts.take()
    assert told == expected
    assert told.keys() <= COUNTERS.keys()
    assert counts.take() == {}
    assert not gate.is_stale, "the gate knows the link"


def test_a_page_is_reported_as_written_once_and_only_if_the_store_has_taken_it() -> None:
    store = MemoryStore()
    tier = WrittenTier(store, SPACE, LAYOUT, deadline_ms=1_000, clock=ManualClock())
    names = page_hashes(SPACE, [bytes((index,)) * 32 for index in range(3)])
    pages = [memoryview(bytes(LAYOUT.page_bytes))] * 3
    tier.write(names[:2], pages[:2])
    assert tier.take_written() == tuple(names[:2])
    assert tier.take_written() == ()
    store.failing = ["write"]
    tier.write(names[2:], pages[2:])
    assert tier.take_written() == ()


_SCRIPT: Final = """
import msgspec, prometheus_client
from types import SimpleNamespace
from vllm.distributed.kv_events import KVEventBatch
from attnstore_worker.vllm import AttnStoreConnector as connector
from attnstore_worker.vllm.counts import COUNTERS
from attnstore_worker.vllm.reporting import kv_events
from attnstore_worker.vllm.store_events import BlocksRemoved, BlocksStored

events = [BlocksStored((b"a" * 32, b"b" * 32), None, (1, 2, 3, 4), "salt"), BlocksRemoved((b"b" * 32,))]
batch = msgspec.msgpack.encode(KVEventBatch(ts=1.0, events=list(kv_events(events, 2, 1))))
stored, removed = msgspec.msgpack.decode(batch, type=KVEventBatch).events
assert (len(stored.block_hashes), stored.token_ids, stored.block_size, stored.medium) == (2, [1, 2, 3, 4], 2, "ATTNSTORE")
assert (stored.parent_block_hash, stored.locality, stored.extra_keys) == (None, "REMOTE", [("salt",), None])
assert (removed.block_hashes, removed.medium) == (stored.block_hashes[1:], "ATTNSTORE")
assert (stored.group_idx, removed.group_idx) == (1, 1)

kinds = {kind: kind for kind in (prometheus_client.Counter, prometheus_client.Gauge, prometheus_client.Histogram)}
config = SimpleNamespace(kv_transfer_config=None)
metrics = connector.build_prom_metrics(config, kinds, ["model_name", "engine"], {0: ["m", "0"]})
stats = connector.build_kv_connector_stats({"hit_tokens": 16}).aggregate(connector.build_kv_connector_stats({"hit_tokens": 4}))
assert not stats.is_empty() and connector.build_kv_connector_stats().is_empty()
metrics.observe(stats.to_dict())
text = prometheus_client.generate_latest().decode()
assert 'vllm:attnstore_hit_tokens_total{engine="0",model_name="m"} 20.0' in text, text
assert all(f"vllm:attnstore_{name}_total{{" in text for name in COUNTERS)
print("told", stats.reduce())
"""


@pytest.mark.vllm
@pytest.mark.slow
@pytest.mark.skipif(PYTHON is None, reason="ATTNSTORE_VLLM_PYTHON names no Python with vLLM (make test-vllm makes one)")
def test_vllm_publishes_the_events_and_the_counters() -> None:
    assert PYTHON is not None
    ran = subprocess.run([PYTHON, "-c", _SCRIPT], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr[-3_000:]
    assert "told {'store hit_tokens': 20}" in ran.stdout
