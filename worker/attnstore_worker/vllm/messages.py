"""What the scheduler's half and the worker's half of the connector send each other, in the classes of vLLM.

Owns: only the form. Written against vLLM 0.32, which pickles them between processes.
"""

from __future__ import annotations

from dataclasses import dataclass

from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorHandshakeMetadata,
    KVConnectorMetadata,
    KVConnectorWorkerMetadata,
)

from attnstore_worker.cache.planning.observation import Step
from attnstore_worker.cache.store.transfer import Transfer
from attnstore_worker.vllm.plan import StepPlan
from attnstore_worker.vllm.shards import ToldSources


@dataclass
class StepMetadata(KVConnectorMetadata):
    """Scheduler to worker, each step. `ended`: requests that have lost their blocks since the last step."""

    plan: StepPlan
    ended: frozenset[str] = frozenset()


@dataclass
class WorkerMetadata(KVConnectorWorkerMetadata):
    """Worker to scheduler: the measurements since the last report, and the pages of rank 0 that were `written`."""

    observations: tuple[Transfer | Step, ...]
    written: tuple[bytes, ...] = ()

    def aggregate(self, other: KVConnectorWorkerMetadata) -> WorkerMetadata:
        """Merges those of two workers."""
        assert isinstance(other, WorkerMetadata)
        return WorkerMetadata(self.observations + other.observations, self.written + other.written)


@dataclass(frozen=True)
class WorkerStart(KVConnectorHandshakeMetadata):
    """Worker to scheduler, once: what a page of each group holds, and its namespace, of which the worker's attention backends
    decide a part.
    """

    sources: ToldSources
