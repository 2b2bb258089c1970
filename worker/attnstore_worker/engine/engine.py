"""The engine: prompts in, tokens out, one step at a time.

Owns: the parts of an engine and the order in which a step calls them: admit, draft, make room, compute (the structure of
nano-vllm's engine). The scheduler decides which sequences run, `Residency` where blocks come from and when a sequence ends,
`Stepper` computes. Invariants: whatever the store does and whichever other sequences run or fail, the tokens are those of a run
alone, up to the rounding of near ties; a waiting or finished sequence holds no block.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable
from collections.abc import Sequence as Items
from types import TracebackType
from typing import Self

from attnstore.attention import AttentionBackend, create_attention
from attnstore.clock import Clock, MonotonicClock
from attnstore.core.hashing import Namespace, namespace
from attnstore.errors import InvalidArgument, Overloaded
from attnstore_worker.cache import (
    CacheStatistics,
    FetchAll,
    Observer,
    PageStore,
    Planner,
    Unobserved,
    create_cache,
)
from attnstore_worker.cache.attending.contexts import AttendStatistics, RemoteAttention
from attnstore_worker.cache.planning.observation import Shielded
from attnstore_worker.cache.planning.step_times import StepTimes
from attnstore_worker.cache.pool.block_table import BlockTable
from attnstore_worker.cache.store.base import AttendStore
from attnstore_worker.device.base import Device
from attnstore_worker.device.host import HostDevice
from attnstore_worker.engine.attend_policy import AttendChoice, AttendForecaster, ChunkForecaster, chunk_choice
from attnstore_worker.engine.attended import AttendedBlocks
from attnstore_worker.engine.outputs import BatchingStatistics, Token
from attnstore_worker.engine.residency import Residency
from attnstore_worker.engine.runner import HostRunner, Runner
from attnstore_worker.engine.sampler import SamplingParams
from attnstore_worker.engine.scheduler import Scheduler
from attnstore_worker.engine.sequence import FinishReason, Sequence, next_chunk
from attnstore_worker.engine.speculative import Speculation
from attnstore_worker.engine.stepper import Stepper
from attnstore_worker.engine.text import TextStream
from attnstore_worker.errors import ContextOverflow, PoolTooSmall
from attnstore_worker.model.loading import LoadedModel
from attnstore_worker.options import AttendPolicy, EngineOptions

_SALT_KEY = b"cache_salt:"
"""Distinguishes a salt from other extra keys of a block's hash."""


class Engine:
    """Generates with `model`. Pages in `store` are read instead of computed if `planner` (default: always) decides so, and new
    pages are written to it. `observer` is told of transfers, loads and steps. Sequences attend to pages in `attend_store` (default:
    `store`) as `EngineOptions.attend` says. Model and blocks are on `device` (default: the processor), which times the steps. If
    it uses Triton, `warm_up` captures steps of one token for each sequence, and tokens are drawn on the device.

    Not thread-safe, except for `wake`. Leaving it as a context manager closes it.
    """

    def __init__(
        self,
        model: LoadedModel,
        options: EngineOptions | None = None,
        *,
        store: PageStore | None = None,
        attention: AttentionBackend | None = None,
        clock: Clock | None = None,
        planner: Planner | None = None,
        observer: Observer | None = None,
        attend_store: AttendStore | None = None,
        device: Device | None = None,
    ) -> None:
        device = device or HostDevice()
        self.model = model
        self.options = options or EngineOptions()
        self._clock = clock or MonotonicClock()
        self.layout = model.layout(self.options.block_tokens)
        name = namespace(self.layout, model=model.fingerprint, tenant_salt=self.options.tenant_salt)
        self.planner = planner or FetchAll(self.options.store_deadline_ms)
        self._observer = Unobserved() if observer is None else Shielded(observer)
        self._cache = create_cache(
            self.layout,
            name,
            self.options,
            store=store,
            clock=self._clock,
            planner=self.planner,
            observer=self._observer,
            device=device,
        )
        self._speculation = Speculation(self._clock)
        try:
            self._attend = self._attended_blocks(attend_store or store, name, device)
            attended = self._attend.remote if self._attend is not None else None
            self._runner = self._create_runner(device, attention, attended)
        except BaseException:
            self._cache.close()  # ends the thread of its writer, which keeps the pool
            raise
        self._scheduler = Scheduler(self.options.scheduler_limits(), self.options.block_tokens)
        self._residency = Residency(
            self._cache,
            self._scheduler,
            self._attend,
            self._clock,
            chunk_tokens=self.options.chunk_tokens,
            prefetch_sequences=self.options.prefetch_sequences,
        )
        self._stepper = Stepper(
            self._runner,
            self._cache,
            self._scheduler,
            self._residency,
            attended,
            self._speculation,
            self._clock,
            self._observer,
            StepTimes(device, self._clock, self._observer),
            context_tokens_max=model.context_tokens_max,
            chunk_tokens=self.options.chunk_tokens,
            speculates=self.options.speculate,
        )
        self._submitted = 0

    def warm_up(self) -> None:
        """Pays for first uses (threads, kernels, weights still on disk, the store connection) before a request does."""
        self._cache.connect()
        tokens = min(self.options.chunk_tokens, self._cache.capacity_tokens, self.model.context_tokens_max) - 1
        sequence = self._sequence([0] * max(tokens, 1), SamplingParams(max_tokens=1))
        sequence.table = BlockTable(self._cache.block_tokens)
        self._cache.grow(sequence.table, len(sequence.token_ids))
        self._runner.run([next_chunk(sequence, self.options.chunk_tokens)])
        for _ in range(2):  # a prefill and a decode step, which now have their normal duration
            self._cache.grow(sequence.table, len(sequence.token_ids))
            self._stepper.run([next_chunk(sequence, self.options.chunk_tokens)])
            sequence.computed_tokens = len(sequence.token_ids)
            sequence.token_ids.append(0)
        self._cache.release(sequence.table)
        sequence.table = None
        self._runner.warm_up()

    def submit(
        self, token_ids: list[int], sampling: SamplingParams | None = None, *, priority: int = 0, cache_salt: str = ""
    ) -> Sequence:
        """Queues a prompt. Higher priorities run first, equal ones in the order of submission. Sequences of different salts share
        no page, here or in the store.

        Raises `ContextOverflow` or `PoolTooSmall` for a prompt that does not fit, `InvalidArgument` for an empty prompt or for
        token ids outside the vocabulary, `Overloaded` if the queue is full.
        """
        self._check_prompt(token_ids)
        sampling = sampling or SamplingParams(stop_token_ids=self.model.stop_token_ids)
        extra_keys = (_SALT_KEY + cache_salt.encode(),) if cache_salt else ()
        sequence = self._sequence(token_ids, sampling, priority, extra_keys)
        self._residency.enqueue(sequence)
        return sequence

    def cancel(self, sequence: Sequence) -> None:
        """Ends a sequence in any state; its computed blocks stay in the cache. A finished sequence stays as it is."""
        if sequence.finish_reason is None:
            self._residency.end(sequence, FinishReason.CANCELLED)

    def step(self) -> list[Token]:
        """Runs one batch. Returns the tokens that it generated.

        If all running sequences wait for their pages it waits with them, for a short time or until `wake`, and returns no token.
        No-op without work. A failure of one sequence ends that sequence as FAILED, with its `error`. If the step itself raises, the
        sequences whose chunks it computed have ended with `StepFailed`; the others continue with the next step.
        """
        self._residency.admit()
        self._residency.advance()
        self._residency.drop_recycled(self._scheduler.running)
        self._stepper.draft()
        self._residency.make_room()
        chunks = self._scheduler.chunks()
        if chunks:
            return self._stepper.step(chunks)
        if not self._scheduler.running:
            return []
        if (behind := self._residency.behind_layers()) is not None:
            return self._stepper.step_behind(*behind)
        self._residency.wait()
        return []

    def probe(self) -> None:
        """Computes a token for no sequence, after a step that raised. Raises if every step would: the device is lost."""
        sequence = self._sequence([0], SamplingParams(max_tokens=1))
        sequence.table = table = BlockTable(self._cache.block_tokens)
        try:
            self._cache.grow(table, 1)
            self._runner.draft_resident([next_chunk(sequence, self.options.chunk_tokens)], [1])
        except Overloaded:
            pass  # no block is free for this, which says nothing about the model
        finally:
            self._cache.release(table)

    def wake(self) -> None:
        """Ends the waiting of a step that waits for pages. From any thread."""
        self._cache.loads.wake()

    def generate(self, token_ids: list[int], sampling: SamplingParams | None = None) -> Sequence:
        """Runs a prompt to its end, together with those submitted before it. Raises the error of a sequence that FAILED."""
        (sequence,) = self.generate_all([token_ids], sampling)
        if sequence.error is not None:
            raise sequence.error
        return sequence

    def generate_all(self, prompts: Iterable[list[int]], sampling: SamplingParams | None = None) -> list[Sequence]:
        """Runs many prompts to their ends, together; more than the queue holds wait outside of it. Raises as `submit` does, after
        running the prompts before the refused one. A sequence that FAILED has its `error`.
        """
        sequences = []
        for token_ids in prompts:
            while self._scheduler.full:
                self.step()
            sequences.append(self.submit(token_ids, sampling))
        while any(sequence.finish_reason is None for sequence in sequences):
            self.step()
        return sequences

    @property
    def idle(self) -> bool:
        """True if no sequence runs or waits."""
        return not self._scheduler.running and not self._scheduler.waiting

    def flush(self, timeout_ms: float) -> bool:
        """Waits until all pages on their way to the store are written. Returns False if time ran out."""
        return self._cache.flush(timeout_ms)

    def drop_cached(self) -> None:
        """Evicts every block that no sequence holds, so that the next prompt misses in the pool."""
        self._cache.drop_cached()

    def statistics(self) -> CacheStatistics:
        """A snapshot of the KV manager."""
        return self._cache.statistics()

    def batching(self) -> BatchingStatistics:
        """A snapshot of the scheduler."""
        return BatchingStatistics(
            waiting=len(self._scheduler.waiting),
            running=len(self._scheduler.running),
            loading=sum(sequence.load is not None for sequence in self._scheduler.running),
            drafts_checked=self._speculation.checked,
            drafts_accepted=self._speculation.accepted,
            preemptions=self._residency.preemptions,
            steps=self._stepper.steps,
            tokens_computed=self._stepper.tokens_computed,
            tokens_generated=self._stepper.tokens_generated,
            failures=self._residency.failures,
        )

    def attending(self) -> AttendStatistics | None:
        """Returns a snapshot of the requests to store nodes that attend; None if the engine does not attend."""
        return self._attend.remote.statistics() if self._attend is not None else None

    def check(self) -> None:
        """Asserts the conservation of blocks."""
        self._cache.check()

    def close(self) -> None:
        """Stops writing; flush first to keep computed pages."""
        try:
            if self._attend is not None:
                self._attend.remote.end()
        finally:
            self._cache.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _create_runner(self, device: Device, attention: AttentionBackend | None, remote: RemoteAttention | None) -> Runner:
        pool = self._cache.pages.attended
        if not device.uses_triton:
            return HostRunner(
                self.model, pool, attention or create_attention("cpu"), remote, device, before_step=self._cache.before_step
            )
        # Imported only now, because a worker on a processor may lack Triton.
        from attnstore_worker.engine.device_runner import DeviceRunner, step_sizes

        blocks = min(-(-self.model.context_tokens_max // self.options.block_tokens), self._cache.pages.capacity)
        sizes = step_sizes(self.options.scheduler_limits(), blocks)
        return DeviceRunner(
            self.model, pool, attention or create_attention("triton"), remote, device, sizes, before_step=self._cache.before_step
        )

    def _attended_blocks(self, store: object, name: Namespace, device: Device) -> AttendedBlocks | None:
        policy = self.options.attend
        if policy is AttendPolicy.NEVER:
            return None
        shape = self.model.query_shape()
        if not isinstance(store, AttendStore):
            raise InvalidArgument(f"attend is {policy.value!r}, which needs a store that answers queries")
        forecaster = self.planner if isinstance(self.planner, AttendForecaster) else None
        if policy is AttendPolicy.MEASURED and forecaster is None:
            raise InvalidArgument("attend is 'measured', which needs the planner that measures costs")
        deadline_ms = self.options.store_deadline_ms
        may_fetch = policy is not AttendPolicy.ALWAYS and not shape.has_windows
        chunks = self.planner if may_fetch and isinstance(self.planner, ChunkForecaster) else None
        remote = RemoteAttention(
            store,
            name,
            self.layout,
            shape,
            deadline_ms=deadline_ms,
            clock=self._clock,
            observer=self._observer,
            device=device,
            fetches=chunk_choice(chunks, self.layout, shape) if chunks is not None else None,
        )
        row_bytes = shape.row_bytes(self.layout)
        choice = AttendChoice(policy, self._cache, forecaster, row_bytes, lambda: self._speculation.tokens_per_step)
        return AttendedBlocks(remote, self._cache, choice, chunk_tokens=self.options.chunk_tokens, flush_ms=deadline_ms)

    def _sequence(
        self, token_ids: list[int], sampling: SamplingParams, priority: int = 0, extra_keys: tuple[bytes, ...] = ()
    ) -> Sequence:
        self._submitted += 1
        text_stream = TextStream(self._decode, sampling.stops)
        now_ms = self._clock.now_ms()
        return Sequence(self._submitted, list(token_ids), len(token_ids), sampling, now_ms, priority, extra_keys, text_stream)

    def _decode(self, token_ids: Items[int]) -> str:
        text: str = self.model.tokenizer.decode(token_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text

    def _check_prompt(self, token_ids: list[int]) -> None:
        context, pool = self.model.context_tokens_max, self._cache.capacity_tokens
        vocabulary = self.model.module.config.vocab_size
        if not token_ids:
            raise InvalidArgument("the prompt is empty; it must have at least one token")
        try:
            ids = array("q", token_ids)
        except (TypeError, OverflowError):
            raise InvalidArgument("the prompt has token ids that are no integers of 64 bits") from None
        if min(ids) < 0 or max(ids) >= vocabulary:
            raise InvalidArgument(f"the prompt has token ids outside the vocabulary [0, {vocabulary})")
        if len(token_ids) >= context:
            raise ContextOverflow(
                f"the prompt has {len(token_ids)} tokens; the context of {self.model.name} is {context}, the answer included"
            )
        if len(token_ids) > pool and self._attend is None:
            raise PoolTooSmall(
                f"the prompt has {len(token_ids)} tokens; the pool of {self.options.pool_bytes} bytes holds {pool} of "
                f"{self.layout.page_bytes // self.layout.block_tokens} bytes each; give it more"
            )
