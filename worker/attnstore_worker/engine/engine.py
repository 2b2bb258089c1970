"""The engine: prompts in, tokens out, one step at a time.

Owns: the life of sequences from `submit` to the last token. `step` is admit, make room, run, postprocess (the shape of nano-vllm's
engine); who takes part is the scheduler's decision, and where a sequence's blocks come from is residency's. Invariants: whatever
the store does and whoever else runs or fails, the tokens are those of a run alone, up to the rounding of near ties; a sequence that
waits or is finished holds no block.
"""

from __future__ import annotations

import logging
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator
from collections.abc import Sequence as Items
from contextlib import contextmanager
from types import TracebackType
from typing import Self

from torch import Tensor

from attnstore.attention import AttentionBackend, create_attention
from attnstore.clock import Clock, MonotonicClock
from attnstore.core.hashing import Namespace, namespace
from attnstore.errors import AttnStoreError, InvalidArgument, Overloaded
from attnstore_worker.cache import (
    CacheStatistics,
    FetchAll,
    LayerGate,
    LoadEnd,
    Observer,
    PageStore,
    Planner,
    Step,
    Unobserved,
    create_cache,
)
from attnstore_worker.cache.attending.contexts import AttendStatistics, RemoteAttention, Traffic
from attnstore_worker.cache.planning.observation import Answer, Shielded
from attnstore_worker.cache.store.base import AttendStore
from attnstore_worker.engine.attend_policy import AttendChoice, AttendForecaster, AttendPolicy
from attnstore_worker.engine.attended import AttendedBlocks
from attnstore_worker.engine.options import EngineOptions
from attnstore_worker.engine.outputs import BatchingStatistics, Token
from attnstore_worker.engine.residency import Residency
from attnstore_worker.engine.runner import Runner
from attnstore_worker.engine.sampler import Peak, SamplingParams, peaks
from attnstore_worker.engine.scheduler import Scheduler
from attnstore_worker.engine.sequence import Chunk, FinishReason, Sequence, chunk_at, next_chunk
from attnstore_worker.engine.speculative import DRAFTS_MAX, Speculation
from attnstore_worker.engine.text import TextStream
from attnstore_worker.errors import ContextOverflow, PagesLost, PoolTooSmall, SequenceFailed, StepFailed
from attnstore_worker.model.loading import LoadedModel

_LOG = logging.getLogger(__name__)

_SALT_KEY = b"cache_salt:"
"""Tells a salt from other extra keys of a block's hash."""


class Engine:
    """Generates with `model`; pages that `store` has are read instead of computed where `planner` (default: always) finds that
    better, new ones are written to it. `observer` is told of transfers, loads and steps. `attend_store` attends to pages that stay
    in it, where `EngineOptions.attend` says so (default: `store`).

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
    ) -> None:
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
            self.options.tier_options(),
            store=store,
            clock=self._clock,
            planner=self.planner,
            observer=self._observer,
        )
        self._speculation = Speculation(self._clock)
        self._attend = self._attended_blocks(attend_store or store, name)
        attended = self._attend.remote if self._attend is not None else None
        self._runner = Runner(model, self._cache.pages.attended, attention or create_attention("cpu"), attended)
        self._scheduler = Scheduler(self.options.scheduler_limits(), self.options.block_tokens)
        self._residency = Residency(
            self._cache,
            self._scheduler,
            self._attend,
            self._clock,
            self._end,
            self._fail,
            chunk_tokens=self.options.chunk_tokens,
            prefetch_sequences=self.options.prefetch_sequences,
        )
        self._submitted = 0
        self._counts: Counter[str] = Counter()

    def warm_up(self) -> None:
        """Pays for first uses (threads, kernels, weights still on disk, the store connection) before a request does."""
        self._cache.connect()
        tokens = min(self.options.chunk_tokens, self._cache.capacity_tokens, self.model.context_tokens_max) - 1
        sequence = self._sequence([0] * max(tokens, 1), SamplingParams(max_tokens=1))
        sequence.table = self._cache.empty_table()
        self._cache.grow(sequence.table, len(sequence.token_ids))
        self._runner.run([next_chunk(sequence, self.options.chunk_tokens)])
        for _ in range(2):  # a prefill and a decode step, which now take as long as they will
            self._cache.grow(sequence.table, len(sequence.token_ids))
            self._run([next_chunk(sequence, self.options.chunk_tokens)])
            sequence.computed_tokens = len(sequence.token_ids)
            sequence.token_ids.append(0)
        self._cache.release(sequence.table)

    def submit(
        self, token_ids: list[int], sampling: SamplingParams | None = None, *, priority: int = 0, cache_salt: str = ""
    ) -> Sequence:
        """Queues a prompt. Higher priorities run first, equal ones in the order of submission. Sequences of different salts share
        no page, here or in the store.

        Raises `ContextOverflow` or `PoolTooSmall` for a prompt that does not fit, `InvalidArgument` for an empty prompt or for
        token ids outside the vocabulary, `Overloaded` when the queue is full.
        """
        self._check_prompt(token_ids)
        sampling = sampling or SamplingParams(stop_token_ids=self.model.stop_token_ids)
        extra_keys = (_SALT_KEY + cache_salt.encode(),) if cache_salt else ()
        sequence = self._sequence(token_ids, sampling, priority, extra_keys)
        self._residency.enqueue(sequence)
        return sequence

    def cancel(self, sequence: Sequence) -> None:
        """Ends a sequence wherever it is; what it has computed stays in the cache. A finished one stays as it is."""
        if sequence.finish_reason is None:
            self._end(sequence, FinishReason.CANCELLED)

    def step(self) -> list[Token]:
        """Runs one batch; returns the tokens that it gave.

        Where all that run wait for their pages it waits with them, for a short time or until `wake`, and returns without a token.
        Nothing happens when there is no work. What fails for one sequence ends that one as FAILED, with its `error`. Where the step
        itself raises, the sequences whose chunks it computed have ended so, with `StepFailed`; the others go on with the next step.
        """
        self._residency.admit()
        self._residency.advance()
        self._residency.drop_recycled(self._scheduler.running)
        self._draft()
        self._residency.make_room()
        chunks = self._scheduler.chunks()
        if chunks:
            with self._failing(chunks):
                return self._step(chunks)
        if not self._scheduler.running:
            return []
        if (gated := self._residency.gated()) is not None:
            return self._step_behind(*gated)
        self._residency.wait()
        return []

    def probe(self) -> None:
        """Computes a token that nobody asked for, after a step that raised. Raises where every step would: the device is lost."""
        sequence = self._sequence([0], SamplingParams(max_tokens=1))
        sequence.table = table = self._cache.empty_table()
        try:
            self._cache.grow(table, 1)
            peaks(self._runner.run([next_chunk(sequence, self.options.chunk_tokens)]))
        except Overloaded:
            pass  # no block is free for this, which says nothing about the model
        finally:
            self._cache.release(table)

    def wake(self) -> None:
        """Ends the waiting of a step that waits for pages. From any thread."""
        self._cache.wake()

    def generate(self, token_ids: list[int], sampling: SamplingParams | None = None) -> Sequence:
        """Runs a prompt to its end, beside those that were submitted before it. Raises the error of a sequence that FAILED."""
        (sequence,) = self.generate_all([token_ids], sampling)
        if sequence.error is not None:
            raise sequence.error
        return sequence

    def generate_all(self, prompts: Iterable[list[int]], sampling: SamplingParams | None = None) -> list[Sequence]:
        """Runs many prompts to their ends, together; more than the queue holds wait outside of it. Raises as `submit` does, after
        the prompts before the one that is refused. A sequence that FAILED has its `error`.
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
        """No sequence runs or waits."""
        return not self._scheduler.running and not self._scheduler.waiting

    def flush(self, timeout_ms: float) -> bool:
        """Waits until all pages that are on their way to the store are there. False when time ran out."""
        return self._cache.flush(timeout_ms)

    def drop_cached(self) -> None:
        """Evicts every block that no sequence holds, so that what comes next is a miss in the pool."""
        self._cache.drop_cached()

    def statistics(self) -> CacheStatistics:
        """A snapshot of the KV manager."""
        return self._cache.statistics()

    def batching(self) -> BatchingStatistics:
        """A snapshot of the scheduler."""
        return BatchingStatistics(
            waiting=len(self._scheduler.waiting),
            running=len(self._scheduler.running),
            loading=sum(sequence.loading is not None for sequence in self._scheduler.running),
            drafts_checked=self._speculation.checked,
            drafts_accepted=self._speculation.accepted,
            preemptions=self._residency.preemptions,
            **{name: self._counts[name] for name in ("steps", "tokens_computed", "tokens_generated", "failures")},
        )

    def attending(self) -> AttendStatistics | None:
        """A snapshot of what was asked of store nodes; None where nothing ever is."""
        return self._attend.remote.statistics() if self._attend is not None else None

    def check(self) -> None:
        """Asserts the conservation of blocks."""
        self._cache.check()

    def close(self) -> None:
        """Ends writing; flush first to keep what was computed."""
        try:
            if self._attend is not None:
                self._attend.remote.end()
        finally:
            self._cache.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _attended_blocks(self, store: object, name: Namespace) -> AttendedBlocks | None:
        policy = self.options.attend_policy()
        if policy is AttendPolicy.NEVER:
            return None
        shape = self.model.query_shape()
        if not isinstance(store, AttendStore):
            raise InvalidArgument(f"attend is {policy.value!r}, which needs a store that answers queries")
        forecaster = self.planner if isinstance(self.planner, AttendForecaster) else None
        if policy is AttendPolicy.MEASURED and forecaster is None:
            raise InvalidArgument("attend is 'measured', which needs the planner that measures costs")
        deadline_ms = self.options.store_deadline_ms
        remote = RemoteAttention(
            store, name, self.layout, shape, deadline_ms=deadline_ms, clock=self._clock, observer=self._observer
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

    def _run(self, chunks: Items[Chunk]) -> Tensor:
        started_ms = self._clock.now_ms()
        asked = self._attend.remote.traffic() if self._attend is not None else Traffic()
        logits = self._runner.run(chunks)
        now = self._attend.remote.traffic() if self._attend is not None else Traffic()
        ranges = tuple((chunk.begin, chunk.end) for chunk in chunks)
        self._observer.stepped(
            Step(started_ms, self._clock.now_ms(), ranges, now.round_trips - asked.round_trips, now.bytes - asked.bytes)
        )
        return logits

    def _count(self, chunks: Items[Chunk]) -> None:
        self._counts["steps"] += 1
        self._counts["tokens_computed"] += sum(chunk.tokens for chunk in chunks)

    @contextmanager
    def _failing(self, chunks: Items[Chunk]) -> Iterator[None]:
        """Ends the sequences of a step that raises: nobody knows which of its tokens were counted."""
        try:
            yield
        except BaseException:
            for chunk in chunks:
                if chunk.sequence.finish_reason is None:
                    error = StepFailed("the step failed that computed this sequence; the worker's log says why")
                    self._end(chunk.sequence, FinishReason.FAILED, error)
            raise

    def _step(self, chunks: Items[Chunk]) -> list[Token]:
        started_ms = self._clock.now_ms()
        if self._draft_from_residents():
            chunks = self._scheduler.chunks()
        try:
            logits = self._run(chunks)
        except PagesLost:  # of a store node that attends; nothing was computed
            for chunk in chunks:
                chunk.sequence.drafts = ()
            self._residency.recover()
            return []
        return self._postprocess(chunks, logits, self._clock.now_ms() - started_ms)

    def _draft(self) -> None:
        """Guesses next tokens, within the room there is: nobody is preempted for a guess."""
        running = self._scheduler.running
        if self.options.speculate and self._cache.available_blocks >= len(running) * (1 + DRAFTS_MAX // self.layout.block_tokens):
            pool_tokens = self._cache.capacity_tokens
            self._speculation.draft(running, tokens_max=self.model.context_tokens_max, pool_tokens=pool_tokens)

    def _draft_from_residents(self) -> bool:
        """False where nobody was given guesses."""
        if not self.options.speculate or self._attend is None:
            return False

        def run(chunks: Items[Chunk]) -> Tensor:
            return self._runner.run(chunks, resident_only=True)

        tokens_max, chunk_tokens = self.model.context_tokens_max, self.options.chunk_tokens
        return self._speculation.draft_from_residents(
            self._scheduler.running, run, tokens_max=tokens_max, chunk_tokens=chunk_tokens
        )

    def _step_behind(self, sequence: Sequence, gate: LayerGate) -> list[Token]:
        """Computes the chunk behind pages that are still arriving, layer by layer. Where they do not all come, it did nothing."""
        loading = sequence.loading
        assert loading is not None

        def late() -> bool:
            return self._cache.is_late(loading)

        begin = gate.blocks.stop * self.layout.block_tokens
        chunk = chunk_at(sequence, begin, self.options.chunk_tokens)
        with self._failing([chunk]):
            try:
                # Not observed as a step: how long it takes says more about the link than about the model.
                logits = self._runner.run([chunk], lambda layer: gate.wait(layer, late))
                gate.wait_complete(late)
            except PagesLost:
                return []
            sequence.computed_tokens = self._cache.advance(loading, sequence.computed_tokens)
            assert sequence.computed_tokens == begin
            self._residency.end_loading(sequence, LoadEnd.COMPLETE)
            return self._postprocess([chunk], logits, None)

    def _postprocess(self, chunks: Items[Chunk], logits: Tensor, took_ms: float | None) -> list[Token]:
        """What follows from a step: `logits` as from `Runner.run`, and how long it took, where that says something of the model."""
        self._count(chunks)
        # Only now that the step has read them is it known that the pages were the right ones all the time.
        self._residency.drop_recycled([chunk.sequence for chunk in chunks])
        rows, highest = logits.unbind(), peaks(logits)
        alone_ms = took_ms if len(chunks) == 1 else None
        tokens: list[Token] = []
        begin = 0
        for chunk in chunks:
            own = slice(begin, begin + 1 + len(chunk.drafts) if chunk.gives_token else begin)
            begin = own.stop
            if chunk.sequence.table is None:  # its pages were recycled
                continue
            try:
                self._follow(chunk, rows[own], highest[own], alone_ms, tokens)
            except Exception as error:
                self._fail(chunk.sequence, error)
        self._cache.end_step()
        return tokens

    def _follow(self, chunk: Chunk, rows: Items[Tensor], highest: Items[Peak], alone_ms: float | None, tokens: list[Token]) -> None:
        """Takes up what a sequence's chunk computed, with these rows of logits, and appends the tokens that follow to `tokens`."""
        sequence = chunk.sequence
        assert sequence.table is not None
        # Drawn before anything is sealed: what a chunk without numbers wrote is found by nobody.
        drawn = self._speculation.next_tokens(chunk, rows, highest, alone_ms) if chunk.gives_token else []
        sequence.drafts = ()
        sequence.computed_tokens = chunk.end
        self._cache.seal(sequence.table, sequence.token_ids, chunk.end)
        for number, (token_id, row) in enumerate(zip(drawn, rows, strict=False)):
            if number:  # it was a guess, and so is computed
                sequence.computed_tokens += 1
                self._cache.seal(sequence.table, sequence.token_ids, sequence.computed_tokens)
            tokens.append(self._extend(sequence, token_id, row))
            if sequence.finish_reason is not None:
                break

    def _extend(self, sequence: Sequence, token_id: int, logits: Tensor) -> Token:
        assert sequence.text_stream is not None
        sequence.token_ids.append(token_id)
        self._counts["tokens_generated"] += 1
        if sequence.first_token_ms is None:
            sequence.first_token_ms = self._clock.now_ms()
            if sequence.prompt is not None:
                self._observer.answered(Answer(sequence.prompt, sequence.admitted_ms, sequence.first_token_ms))
        text = sequence.text_stream.push(token_id)
        reason = self._finish_reason(sequence, token_id)
        if reason is not None:
            text += sequence.text_stream.finish()
            self._end(sequence, reason)
        return Token(sequence, token_id, logits, text)

    def _end(self, sequence: Sequence, reason: FinishReason, error: AttnStoreError | None = None) -> None:
        """Ends a sequence, wherever it is. Never raises: an end that goes wrong concerns nobody else."""
        sequence.finish_reason, sequence.error = reason, error
        sequence.finished_ms = self._clock.now_ms()
        self._counts["failures"] += reason is FinishReason.FAILED
        try:
            self._residency.release(sequence)
        except Exception:
            _LOG.exception("sequence %d: not all that it held was given back in order", sequence.sequence_id)

    def _fail(self, sequence: Sequence, cause: Exception) -> None:
        """Ends a sequence for which alone something raised."""
        unforeseen = None if isinstance(cause, SequenceFailed) else cause
        _LOG.error("sequence %d failed: %s", sequence.sequence_id, cause, exc_info=unforeseen)
        if sequence.finish_reason is None:
            error = cause if isinstance(cause, SequenceFailed) else SequenceFailed("the sequence failed; the worker's log says why")
            self._end(sequence, FinishReason.FAILED, error)

    def _decode(self, token_ids: Items[int]) -> str:
        text: str = self.model.tokenizer.decode(token_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text

    def _finish_reason(self, sequence: Sequence, token_id: int) -> FinishReason | None:
        assert sequence.text_stream is not None
        if token_id in sequence.sampling.stop_token_ids or sequence.text_stream.stopped:
            return FinishReason.STOP
        if len(sequence.generated) >= sequence.sampling.max_tokens:
            return FinishReason.LENGTH
        if len(sequence.token_ids) >= self.model.context_tokens_max:
            return FinishReason.CONTEXT_FULL
        if len(sequence.token_ids) > self._cache.capacity_tokens and self._attend is None:
            return FinishReason.POOL_FULL
        return None

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
