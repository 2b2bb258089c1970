"""The connector that vLLM loads: vLLM's interface on one side, `SchedulerSide` and `Transfers` on the other.

Owns: nothing but the translation. vLLM makes one of these for its scheduler and one in each worker process. Written against
`KVConnectorBase_V1` of vLLM 0.32.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorHandshakeMetadata,
    KVConnectorMetadata,
    KVConnectorRole,
    KVConnectorWorkerMetadata,
)

import attnstore
from attnstore.clock import Deadline, MonotonicClock
from attnstore.core.hashing import Namespace
from attnstore.core.layout import PageLayout
from attnstore.errors import InvalidArgument
from attnstore.logs import get_logger
from attnstore_worker.vllm.identity import kv_settings, page_layout, vllm_namespace
from attnstore_worker.vllm.kv_pages import KvPages
from attnstore_worker.vllm.plan import BlockPlan, Costs, StepPlan
from attnstore_worker.vllm.probe import probe_link
from attnstore_worker.vllm.scheduling import SchedulerSide
from attnstore_worker.vllm.settings import Settings
from attnstore_worker.vllm.supported import check_supported, is_served
from attnstore_worker.vllm.transfers import RegisteredStore, Transfers, costs_of

if TYPE_CHECKING:
    from torch import Tensor

_PROBE_MS_MAX = 10_000.0

_log = get_logger(__name__)


@dataclass
class StepMetadata(KVConnectorMetadata):
    """Scheduler to worker, each step."""

    plan: StepPlan


@dataclass
class WorkerMetadata(KVConnectorWorkerMetadata):
    """Worker to scheduler: what was measured."""

    costs: Costs

    def aggregate(self, other: KVConnectorWorkerMetadata) -> WorkerMetadata:
        """Those of two workers."""
        assert isinstance(other, WorkerMetadata)
        return WorkerMetadata(self.costs.merged(other.costs))


@dataclass(frozen=True)
class WorkerStart(KVConnectorHandshakeMetadata):
    """Worker to scheduler, once: how its attention backends lay out a block. Only a worker knows them."""

    order: str


class AttnStoreConnector(KVConnectorBase_V1):
    """See the package. Raises `InvalidArgument` for a configuration that it cannot serve."""

    def __init__(self, vllm_config: Any, role: KVConnectorRole, kv_cache_config: Any) -> None:
        super().__init__(vllm_config=vllm_config, role=role, kv_cache_config=kv_cache_config)
        self._settings = Settings.parse(self._kv_transfer_config.kv_connector_extra_config)
        check_supported(vllm_config, kv_cache_config, weights_are_named=self._settings.model_id is not None)
        self._clock = MonotonicClock()
        self._layer_names: list[str] = list(kv_cache_config.kv_cache_groups[0].layer_names)
        self._layer_block_bytes = int(kv_cache_config.kv_cache_groups[0].kv_cache_spec.page_size_bytes)
        # The scheduler matches the pages of rank 0. Another rank that lacks one reports its block, and the block is computed again.
        rank = 0 if role is KVConnectorRole.SCHEDULER else _tensor_parallel_rank()
        self._layout = _layout(vllm_config, kv_cache_config, rank)
        self._store = attnstore.connect(
            self._settings.store,
            deadline_ms=self._settings.load_ms_max,
            transport=self._settings.transport,
            token=self._settings.token,
            tls_ca=self._settings.tls_ca,
            http_proxy=self._settings.http_proxy,
        )
        self._order = ""
        self._scheduling: SchedulerSide | None = None
        self._transfers: Transfers | None = None
        self._steps: deque[tuple[int, float]] = deque(maxlen=64)
        self._step_began_ms = 0.0
        self._probe: Future[Costs] | None = None
        if role is KVConnectorRole.SCHEDULER:
            self._prober = ThreadPoolExecutor(1, "attnstore-probe")

    def _namespace(self, order: str) -> Namespace:
        settings = kv_settings(self._vllm_config, self._kv_cache_config, model_id=self._settings.model_id)
        return vllm_namespace(self._layout, {**settings, "order": order}, tenant_salt=self._settings.tenant_salt)

    # Scheduler

    def set_xfer_handshake_metadata(self, metadata: Mapping[int, KVConnectorHandshakeMetadata]) -> None:
        """What the workers said once their caches were there, by rank: now pages have names. Called before the first request."""
        orders = {told.order for told in metadata.values() if isinstance(told, WorkerStart)}
        if len(orders) != 1:  # MultiConnector passes on what its first connector says
            raise InvalidArgument(f"the workers tell {len(orders)} ways in which blocks lie; in a MultiConnector this one is first")
        self._space = self._namespace(orders.pop())
        self._registered = RegisteredStore(self._store, self._space, self._layout)
        self._scheduling = SchedulerSide(
            self._match, self._space, self._layout, self._clock, lookup_ms_max=self._settings.lookup_ms_max
        )
        self._measure_link()

    @property
    def _side(self) -> SchedulerSide:
        assert self._scheduling is not None, "vLLM tells what the workers said before the first request"
        return self._scheduling

    def _match(self, hashes: Any) -> int:
        deadline = Deadline(self._clock, self._settings.load_ms_max)
        self._registered.ready(deadline)
        found = self._store.match(self._space, [hashes], lease_ms=0, deadline_ms=deadline.left_ms())
        if found.error is not None:
            raise found.error
        return found.hits[0]

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int | None, bool]:
        """See the base class. Never waits for the store for longer than a few milliseconds."""
        self._take_probe()
        if not is_served(request):  # it is unknown to the scheduling from here on, so that nothing of it is saved
            return 0, False
        hit = self._side.hit_tokens(request.request_id, request.block_hashes, request.num_tokens, num_computed_tokens)
        if self._probe is None and self._side.wants_probe:
            self._measure_link()
        return hit, bool(hit)

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        """See the base class."""
        self._side.allocated(request.request_id, blocks.get_block_ids()[0], num_external_tokens)

    def build_connector_meta(self, scheduler_output: Any) -> StepMetadata:
        """See the base class."""
        saves: list[BlockPlan] = []
        scheduled = scheduler_output.num_scheduled_tokens
        for new in scheduler_output.scheduled_new_reqs:
            after = new.num_computed_tokens + scheduled[new.req_id]
            saves += self._side.scheduled(new.req_id, new.block_ids[0], tokens_after=after, restarted=True)
        cached = scheduler_output.scheduled_cached_reqs
        for index, request_id in enumerate(cached.req_ids):
            blocks = cached.new_block_ids[index]
            saves += self._side.scheduled(
                request_id,
                blocks[0] if blocks is not None else [],
                tokens_after=cached.num_computed_tokens[index] + scheduled[request_id],
                restarted=request_id in cached.resumed_req_ids,
            )
        for request_id in scheduler_output.preempted_req_ids or ():
            self._side.preempted(request_id)
        return StepMetadata(self._side.step(saves, scheduler_output.total_num_scheduled_tokens))

    def update_connector_output(self, connector_output: Any) -> None:
        """See the base class."""
        if connector_output.invalid_block_ids:
            self._side.failed(connector_output.invalid_block_ids)
        told = connector_output.kv_connector_worker_meta
        if isinstance(told, WorkerMetadata):
            self._side.learn(told.costs)

    def request_finished(self, request: Any, block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:  # noqa: ARG002
        """Nothing is held back: what was saved has been copied."""
        self._side.finished(request.request_id)
        return False, None

    def reset_cache(self) -> bool:
        """Pages of a store are not this engine's alone: none is dropped. Tells vLLM so, which would take None for success."""
        _log.warning("the store's pages are not dropped: an engine whose weights were replaced needs a model_id of its own")
        return False

    def _measure_link(self) -> None:
        """In the background; nobody waits for it."""
        self._probe = self._prober.submit(
            probe_link, self._store, self._space, self._layout, self._clock, deadline_ms=_PROBE_MS_MAX
        )

    def _take_probe(self) -> None:
        if self._probe is None or not self._probe.done():
            return
        probe, self._probe = self._probe, None
        error = probe.exception()
        if error is None:
            self._side.learn(probe.result())
        else:
            _log.warning("the link to the store was not measured; it will be when the store answers", reason=str(error))

    # Worker

    def register_kv_caches(self, kv_caches: dict[str, Tensor]) -> None:
        """See the base class."""
        pages = KvPages([kv_caches[name] for name in self._layer_names], self._layer_block_bytes)
        self._order = _memory_order(self._vllm_config, self._layer_names)
        self._transfers = Transfers(
            self._store,
            self._namespace(self._order),
            self._layout,
            pages,
            self._clock,
            deadline_ms=self._settings.load_ms_max,
            save_bytes_max=self._settings.save_bytes_max,
        )

    def get_handshake_metadata(self) -> WorkerStart:
        """What the scheduler needs of this worker."""
        return WorkerStart(self._order)

    def bind_connector_metadata(self, connector_metadata: KVConnectorMetadata) -> None:
        """Called before each step: its clock starts."""
        super().bind_connector_metadata(connector_metadata)
        self._step_began_ms = self._clock.now_ms()

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:  # noqa: ARG002
        """Starts the loads of the requests that wait for them; no step waits for one."""
        if self._transfers is not None:
            for load in self._plan().loads:
                self._transfers.load(load)

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Nothing: a request takes part in a step only after its load is over."""

    def save_kv_layer(self, layer_name: str, kv_layer: Tensor, attn_metadata: Any, **kwargs: Any) -> None:
        """Nothing: blocks are saved whole, after the step."""

    def wait_for_save(self) -> None:
        """Copies the blocks that this step completed; they are written behind."""
        plan = self._plan()
        if plan.tokens:
            self._steps.append((plan.tokens, self._clock.now_ms() - self._step_began_ms))
        if plan.saves and self._transfers is not None:
            self._transfers.save(plan.saves)

    def get_finished(self, finished_req_ids: set[str]) -> tuple[set[str] | None, set[str] | None]:  # noqa: ARG002
        """Requests whose loads are over."""
        return None, self._transfers.take_loaded() if self._transfers is not None else None

    def get_block_ids_with_load_errors(self) -> set[int]:
        """Blocks that vLLM must compute itself."""
        return self._transfers.take_failed_blocks() if self._transfers is not None else set()

    def build_connector_worker_meta(self) -> WorkerMetadata | None:
        """What was measured since the last step, if anything."""
        if self._transfers is None:
            return None
        costs = costs_of(self._transfers, tuple(self._steps))
        self._steps.clear()
        return WorkerMetadata(costs) if costs != Costs() else None

    def shutdown(self) -> None:
        """Writes what waits to be written, then ends."""
        with ExitStack() as closing:
            closing.callback(self._store.close)
            if self.role is KVConnectorRole.SCHEDULER:
                closing.callback(self._prober.shutdown, wait=False, cancel_futures=True)
                if self._scheduling is not None:
                    closing.callback(self._scheduling.close)
            if self._transfers is not None:
                closing.callback(self._transfers.flush)

    def _plan(self) -> StepPlan:
        metadata = self._get_connector_metadata()
        assert isinstance(metadata, StepMetadata)
        return metadata.plan


def _tensor_parallel_rank() -> int:
    from vllm.distributed import get_tensor_model_parallel_rank  # only a worker process has joined a group

    return int(get_tensor_model_parallel_rank())


def _memory_order(vllm_config: Any, layer_names: Sequence[str]) -> str:
    """How K and V lie in a block: that is their backend's own, and on a CPU it packs keys for the instructions that it has."""
    from vllm import envs
    from vllm.config import get_layers_from_vllm_config
    from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase

    orders = {f"rocm_shuffle={envs.VLLM_ROCM_SHUFFLE_KV_CACHE_LAYOUT}"}
    for name, layer in get_layers_from_vllm_config(vllm_config, AttentionLayerBase, layer_names).items():
        backend = layer.get_attn_backend()
        packing = getattr(layer, "isa", None)
        if backend.get_name() == "CPU_ATTN" and packing is None:
            raise InvalidArgument(f"vLLM's layer {name} does not say for which instructions its keys are packed")
        orders.add(f"{backend.get_name()}/{packing}")
    return " ".join(sorted(orders))


def _layout(vllm_config: Any, kv_cache_config: Any, rank: int) -> PageLayout:
    group = kv_cache_config.kv_cache_groups[0]
    return page_layout(
        layers=len(group.layer_names),
        layer_block_bytes=int(group.kv_cache_spec.page_size_bytes),
        kv_heads=int(group.kv_cache_spec.num_kv_heads),
        block_tokens=int(group.kv_cache_spec.block_size),
        tp_rank=rank,
        tp_size=int(vllm_config.parallel_config.tensor_parallel_size),
    )
