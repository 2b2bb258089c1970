"""The connector that vLLM loads: vLLM's interface on one side, `SchedulerSide` and `Transfers` on the other.

Owns: only the translation. vLLM creates one connector for its scheduler and one in each worker process. Written against
`KVConnectorBase_V1` of vLLM 0.32.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import psutil  # one of vLLM's packages
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorHandshakeMetadata,
    KVConnectorMetadata,
    KVConnectorRole,
    KVConnectorTransferResults,
    SupportsHMA,
)

import attnstore
from attnstore.clock import MonotonicClock
from attnstore.core.hashing import Namespace
from attnstore.errors import InvalidArgument
from attnstore.limits import NODE_FAIR_MS
from attnstore.logs import get_logger
from attnstore_worker.cache.planning.observation import Step, Unobserved
from attnstore_worker.cache.planning.step_times import Started, StepTimes
from attnstore_worker.cache.store.remote import RemoteTier
from attnstore_worker.cache.store.transfer import Transfer
from attnstore_worker.device.factory import device_of
from attnstore_worker.vllm.counts import Counts
from attnstore_worker.vllm.gate import Gate
from attnstore_worker.vllm.identity import shard_of
from attnstore_worker.vllm.lookups import StoredGroup, StoredSource
from attnstore_worker.vllm.messages import StepMetadata, WorkerMetadata, WorkerStart
from attnstore_worker.vllm.page_groups import PageGroup, told_group
from attnstore_worker.vllm.plan import Pages, StepPlan
from attnstore_worker.vllm.probe import probe_link
from attnstore_worker.vllm.reporting import ReportingConnector
from attnstore_worker.vllm.scheduling import SchedulerSide
from attnstore_worker.vllm.settings import Settings
from attnstore_worker.vllm.shards import ToldSources
from attnstore_worker.vllm.store_events import Chain, StoreEvents
from attnstore_worker.vllm.supported import check_supported, continues_prefixes, is_served
from attnstore_worker.vllm.transfers import Transfers
from attnstore_worker.vllm.worker_pages import worker_pages
from attnstore_worker.vllm.written_tier import WrittenTier

if TYPE_CHECKING:
    from torch import Tensor

_PROBE_MS_MAX = 10_000.0
_STEPS_MAX = 64
"""Measured steps that are not reported yet."""

_log = get_logger(__name__)


class _Steps(Unobserved):
    """The measured steps that are not reported yet."""

    def __init__(self) -> None:
        self.untold: deque[Step] = deque(maxlen=_STEPS_MAX)

    def stepped(self, step: Step) -> None:
        """See `Observer`."""
        self.untold.append(step)


class AttnStoreConnector(ReportingConnector, SupportsHMA):
    """See the package. Raises `InvalidArgument` for a configuration that it cannot serve."""

    def __init__(self, vllm_config: Any, role: KVConnectorRole, kv_cache_config: Any) -> None:
        super().__init__(vllm_config=vllm_config, role=role, kv_cache_config=kv_cache_config)
        self._settings = Settings.parse(self._kv_transfer_config.kv_connector_extra_config)
        check_supported(vllm_config, kv_cache_config, weights_are_named=self._settings.model_id is not None)
        self._continues = continues_prefixes(vllm_config)
        if not self._continues:
            _log.warning(
                "vLLM's MLA cannot compute after a loaded prefix here: a prompt is a hit if one token of it is left to compute"
            )
        self._clock = MonotonicClock()
        rank = 0 if role is KVConnectorRole.SCHEDULER else _tensor_parallel_rank()
        tp_size = int(vllm_config.parallel_config.tensor_parallel_size)
        self._shard = shard_of(rank, tp_size=tp_size, replicas=int(kv_cache_config.kv_tp_replicas))
        self._store = attnstore.connect(
            self._settings.store,
            deadline_ms=self._settings.load_ms_max,
            transport=self._settings.transport,
            token=self._settings.token,
            tls_ca=self._settings.tls_ca,
            http_proxy=self._settings.http_proxy,
        )
        self._groups: Sequence[tuple[PageGroup, Namespace]] = ()
        self._told: ToldSources = ()
        self._scheduling: SchedulerSide | None = None
        self._counts = Counts()
        told = vllm_config.kv_events_config
        self._tells_events = told is not None and told.enable_kv_cache_events
        self._events: StoreEvents | None = None
        self._written: WrittenTier | None = None  # if its pages are reported: those of rank 0, which the scheduler matches
        self._transfers: Transfers | None = None
        self._steps = _Steps()
        self._step_times: StepTimes | None = None
        self._step: Started | None = None
        self._probe: Future[tuple[Transfer, ...]] | None = None
        if role is KVConnectorRole.SCHEDULER:
            self._prober = ThreadPoolExecutor(1, "attnstore-probe")

    # Scheduler

    def set_xfer_handshake_metadata(self, metadata: Mapping[int, KVConnectorHandshakeMetadata]) -> None:
        """The workers' handshakes by rank, after their caches were allocated. Pages have names from now on. Called before the first
        request.
        """
        starts = {rank: told for rank, told in metadata.items() if isinstance(told, WorkerStart)}
        if not starts:  # MultiConnector passes on the handshake of its first connector
            raise InvalidArgument("the workers report no page names; in a MultiConnector put this connector first")
        # The scheduler matches the pages of rank 0. Another rank that lacks a page reports its block, and vLLM computes the block.
        told = starts[min(starts)].sources
        self._groups = told[0][0]
        gate, lookup_ms_max = Gate(self._clock, load_ms_max=self._settings.load_ms_max), self._settings.lookup_ms_max
        self._counts = Counts(then=gate)
        deadline_ms = max(lookup_ms_max, NODE_FAIR_MS)  # a request's may be short; the store is judged with enough time
        # Of a source with several shards the first one is asked: engines write the pages of all ranks at once.
        stored = [
            StoredSource(
                [
                    StoredGroup(
                        group,
                        space,
                        RemoteTier(
                            self._store, space, group.layout, deadline_ms=deadline_ms, clock=self._clock, observer=self._counts
                        ),
                    )
                    for group, space in ranges[0]
                ],
                parts=len(ranges),
            )
            for ranges in told
        ]
        self._events = self._new_events()
        self._scheduling = SchedulerSide(
            stored,
            gate,
            self._clock,
            lookup_ms_max=lookup_ms_max,
            chunk_tokens=int(self._vllm_config.scheduler_config.max_num_batched_tokens),
            continues=self._continues,
            events=self._events,
        )
        self._measure_link()

    def _new_events(self) -> StoreEvents | None:
        """Returns the events of the group of which they tell, if vLLM publishes events."""
        group = told_group([group for group, _ in self._groups])
        if not self._tells_events or group is None:
            return None
        self._told_group = group.index
        return StoreEvents(group.page_tokens // group.page_hashes, group.page_hashes)

    @property
    def _side(self) -> SchedulerSide:
        assert self._scheduling is not None, "vLLM passes on the workers' handshakes before the first request"
        return self._scheduling

    def on_new_request(self, request: Any) -> None:
        """See the base class."""
        if is_served(request):
            chain = None
            if self._events is not None and request.prompt_token_ids is not None:  # embeddings have no tokens to announce
                chain = Chain(request.block_hashes, request.all_token_ids, request.cache_salt)
            self._side.arrived(request.request_id, request.block_hashes, request.num_tokens, chain)

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int | None, bool]:
        """See the base class. Never waits: it answers None until the store's answer is there."""
        self._take_probe()
        if not is_served(request):  # the scheduling does not know the request, so nothing of it is saved
            return 0, False
        hit = self._side.hit_tokens(request.request_id, request.block_hashes, request.num_tokens, num_computed_tokens)
        if self._probe is None and self._side.wants_probe:
            self._measure_link()
        return hit, bool(hit)

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        """See the base class."""
        self._side.allocated(request.request_id, blocks.get_block_ids(), num_external_tokens)
        self._counts.hit(num_external_tokens)

    def build_connector_meta(self, scheduler_output: Any) -> StepMetadata:
        """See the base class."""
        saves: list[Pages] = []
        chunks: list[tuple[int, int]] = []
        scheduled = scheduler_output.num_scheduled_tokens
        for new in scheduler_output.scheduled_new_reqs:
            begin, end = new.num_computed_tokens, new.num_computed_tokens + scheduled[new.req_id]
            chunks.append((begin, end))
            saves += self._side.scheduled(new.req_id, new.block_ids, tokens_after=end, restarted=True)
        cached = scheduler_output.scheduled_cached_reqs
        for index, request_id in enumerate(cached.req_ids):
            blocks, begin = cached.new_block_ids[index], cached.num_computed_tokens[index]
            end = begin + scheduled[request_id]
            chunks.append((begin, end))
            saves += self._side.scheduled(
                request_id,
                blocks,
                tokens_after=end,
                restarted=request_id in cached.resumed_req_ids,
            )
        preempted = scheduler_output.preempted_req_ids or set()
        for request_id in preempted:
            self._side.preempted(request_id)
        return StepMetadata(self._side.step(saves, tuple(chunks)), frozenset(preempted | scheduler_output.finished_req_ids))

    def update_connector_output(self, connector_output: Any) -> None:
        """See the base class."""
        if connector_output.invalid_block_ids:
            self._side.failed(connector_output.invalid_block_ids)
        if connector_output.failed_recving:
            self._side.failed_requests(connector_output.failed_recving)
        told = connector_output.kv_connector_worker_meta
        if isinstance(told, WorkerMetadata):
            self._side.learn(told.observations)
            if self._events is not None:
                self._events.written(told.written)

    def request_finished_all_groups(
        self,
        request: Any,
        block_ids: tuple[list[int], ...],  # noqa: ARG002
    ) -> tuple[bool, dict[str, Any] | None]:
        """No block is held back: a block that is saved is copied before another step uses it."""
        self._side.finished(request.request_id)
        return False, None

    def reset_cache(self) -> bool:
        """Drops no page, because other engines use them too. False tells vLLM so; None would mean success."""
        _log.warning("the store's pages are not dropped: an engine whose weights were replaced needs a model_id of its own")
        return False

    def _measure_link(self) -> None:
        """Runs in the background; nobody waits for it."""
        group, space = max(self._groups, key=lambda each: each[0].layout.page_bytes)
        self._probe = self._prober.submit(probe_link, self._store, space, group.layout, self._clock, deadline_ms=_PROBE_MS_MAX)

    def _take_probe(self) -> None:
        if self._probe is None or not self._probe.done():
            return
        probe, self._probe = self._probe, None
        transfers = probe.result()
        self._side.learn(transfers)
        if not transfers:
            _log.warning("the link to the store was not measured; it will be when the store answers")

    # Worker

    def register_kv_caches(self, kv_caches: dict[str, Any]) -> None:
        """See the base class. The cache of a layer is a tensor, or for a state several."""
        self._told, stores = worker_pages(
            self._vllm_config,
            self._kv_cache_config,
            self._shard,
            self._settings,
            kv_caches,
            self._tier,
            loaded_since_s=psutil.Process().create_time(),
        )
        first = next(iter(kv_caches.values()))
        self._device = device_of(first if hasattr(first, "device") else first[0])
        self._step_times = StepTimes(self._device, self._clock, self._steps)
        save_bytes_max = self._settings.save_bytes_max
        self._transfers = Transfers(stores, self._device, self._clock, save_bytes_max=save_bytes_max, whole=not self._continues)

    def _tier(self, group: PageGroup, space: Namespace, tells: bool) -> RemoteTier:
        """The store's tier of a group. With `tells`, events tell of its pages."""
        deadline_ms, clock, observer = self._settings.load_ms_max, self._clock, self._counts
        if not (tells and self._tells_events and self._shard.index == 0):
            return RemoteTier(self._store, space, group.layout, deadline_ms=deadline_ms, clock=clock, observer=observer)
        self._written = WrittenTier(self._store, space, group.layout, deadline_ms=deadline_ms, clock=clock, observer=observer)
        return self._written

    def get_handshake_metadata(self) -> WorkerStart:
        """What the scheduler cannot know of pages."""
        return WorkerStart(self._told)

    def bind_connector_metadata(self, connector_metadata: KVConnectorMetadata) -> None:
        """Called before each step: the measurement of the step starts, and loads for requests that have ended stop."""
        super().bind_connector_metadata(connector_metadata)
        assert isinstance(connector_metadata, StepMetadata)
        if self._transfers is not None and connector_metadata.ended:
            self._transfers.end(connector_metadata.ended)
        if self._step_times is not None:
            self._step = self._step_times.start()

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:  # noqa: ARG002
        """Starts the loads of waiting requests; no step waits for a load. Called on the stream of the model."""
        if self._transfers is not None:
            for load in self._plan().loads:
                self._transfers.load(load)

    def wait_for_layer_load(self, layer_name: str) -> None:
        """No-op: a request takes part in a step only after its load is over."""

    def save_kv_layer(self, layer_name: str, kv_layer: Tensor, attn_metadata: Any, **kwargs: Any) -> None:
        """No-op: blocks are saved whole, after the step."""

    def wait_for_save(self) -> None:
        """Copies the blocks that this step completed, on the stream of the model; they are written behind."""
        plan = self._plan()
        if plan.chunks and self._step_times is not None and self._step is not None:
            self._step_times.end(self._step, plan.chunks)
        if plan.saves and self._shard.writes and self._transfers is not None:
            self._transfers.save(plan.saves)

    def get_transfer_results(self, finished_req_ids: set[str]) -> KVConnectorTransferResults:  # noqa: ARG002
        """Requests whose loads are over, and those of several groups of which a page did not arrive."""
        if self._transfers is None:
            return KVConnectorTransferResults()
        loaded = self._transfers.take_loaded()
        return KVConnectorTransferResults(finished_recving=loaded, failed_recving=self._transfers.take_failed_requests())

    def get_block_ids_with_load_errors(self) -> set[int]:
        """Blocks that vLLM must compute itself."""
        return self._transfers.take_failed_blocks() if self._transfers is not None else set()

    def build_connector_worker_meta(self) -> WorkerMetadata | None:
        """Returns the measurements since the last step, if any."""
        if self._transfers is None:
            return None
        observations: tuple[Transfer | Step, ...] = (*self._transfers.take_loads(), *self._steps.untold)
        self._steps.untold.clear()
        written = self._written.take_written() if self._written is not None else ()
        return WorkerMetadata(observations, written) if observations or written else None

    def shutdown(self) -> None:
        """Writes pending pages, then ends."""
        with ExitStack() as closing:
            closing.callback(self._store.close)
            if self.role is KVConnectorRole.SCHEDULER:
                closing.callback(self._prober.shutdown, wait=False, cancel_futures=True)
                if self._scheduling is not None:
                    closing.callback(self._scheduling.close)
            if self._transfers is not None:
                closing.callback(self._device.close)
                closing.callback(self._transfers.flush)

    def _plan(self) -> StepPlan:
        metadata = self._get_connector_metadata()
        assert isinstance(metadata, StepMetadata)
        return metadata.plan


def _tensor_parallel_rank() -> int:
    from vllm.distributed import get_tensor_model_parallel_rank  # only worker processes have one

    return int(get_tensor_model_parallel_rank())
