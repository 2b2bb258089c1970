"""The engine: prompts in, tokens out, one step at a time.

Owns: the queue of sequences and their life from `submit` to the last token. `step` is admit, run, postprocess (the shape of
nano-vllm's engine). Invariant: whatever the store does, the tokens are those of a run without it; a finished
sequence holds no block.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from torch import Tensor

from attnstore.attention import AttentionBackend, create_attention
from attnstore.clock import Clock, MonotonicClock
from attnstore.core.eviction import create_eviction_policy
from attnstore.core.hashing import namespace
from attnstore.errors import AttnStoreError, InvalidArgument
from attnstore.limits import MIB
from worker.cache import CacheManager, CacheStatistics, PagePool, PageStore, RemoteTier
from worker.engine.runner import Runner
from worker.engine.sampler import SamplingParams
from worker.engine.sequence import Chunk, FinishReason, Sequence, next_chunk
from worker.errors import ContextOverflow, PoolTooSmall
from worker.model.loading import LoadedModel


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """`pool_bytes` is a hard limit on KV memory; `chunk_tokens` of prefill run in one step; every store call has a deadline;
    `eviction` is one of `EVICTION_POLICIES`.

    Raises `InvalidArgument` for values that do not fit together (an unknown `eviction` when the engine is made).
    """

    pool_bytes: int = 512 * MIB
    block_tokens: int = 16
    chunk_tokens: int = 256
    store_deadline_ms: int = 5_000
    tenant_salt: bytes = b""
    eviction: str = "lru"

    def __post_init__(self) -> None:
        if self.chunk_tokens < 1 or self.chunk_tokens % self.block_tokens:
            raise InvalidArgument(
                f"chunk_tokens is {self.chunk_tokens}; it must be a positive multiple of block_tokens = {self.block_tokens}"
            )
        if self.store_deadline_ms < 1:
            raise InvalidArgument(f"store_deadline_ms is {self.store_deadline_ms}; it must be at least 1")


@dataclass(frozen=True, slots=True)
class Token:
    """One generated token, with the fp32 logits `[vocabulary]` that it was drawn from."""

    sequence: Sequence
    token_id: int
    logits: Tensor


class Engine:
    """Generates with `model`; pages that `store` has are read instead of computed, new ones are written to it.

    Sequences run one after another in the order of submission. Not thread-safe. Leaving it as a context manager closes it.
    """

    def __init__(
        self,
        model: LoadedModel,
        options: EngineOptions | None = None,
        *,
        store: PageStore | None = None,
        attention: AttentionBackend | None = None,
        clock: Clock | None = None,
    ) -> None:
        self.model = model
        self.options = options or EngineOptions()
        self._clock = clock or MonotonicClock()
        self.layout = model.layout(self.options.block_tokens)
        pages = PagePool(self.layout, self.options.pool_bytes)
        name = namespace(self.layout, model=model.fingerprint, tenant_salt=self.options.tenant_salt)
        remote = None
        if store is not None:
            remote = RemoteTier(store, name, self.layout, deadline_ms=self.options.store_deadline_ms, clock=self._clock)
        self._cache = CacheManager(
            pages, name, remote=remote, clock=self._clock, policy=create_eviction_policy(self.options.eviction)
        )
        self._runner = Runner(model, pages, attention or create_attention("cpu"))
        self._waiting: deque[Sequence] = deque()
        self._running: Sequence | None = None
        self._submitted = 0

    def warm_up(self) -> None:
        """Pays for first uses (threads, kernels, weights still on disk, the store connection) before a request does."""
        self._cache.connect()
        tokens = min(self.options.chunk_tokens, self._cache.capacity_tokens, self.model.context_tokens_max) - 1
        sequence = self._sequence([0] * max(tokens, 1), SamplingParams(max_tokens=1))
        sequence.admission = self._cache.admit_nothing()
        for _ in range(2):  # a prefill and a decode step
            self._compute(next_chunk(sequence, self.options.chunk_tokens))
            sequence.computed_tokens = len(sequence.token_ids)
            sequence.token_ids.append(0)
        self._cache.release(sequence.admission.table)

    def submit(self, token_ids: list[int], sampling: SamplingParams | None = None) -> Sequence:
        """Queues a prompt.

        Raises `ContextOverflow` or `PoolTooSmall` for a prompt that does not fit, `InvalidArgument` for an empty prompt or for
        token ids outside the vocabulary.
        """
        self._check_prompt(token_ids)
        sequence = self._sequence(token_ids, sampling or SamplingParams(stop_token_ids=self.model.stop_token_ids))
        sequence.announced = self._cache.announce(token_ids)
        self._waiting.append(sequence)
        return sequence

    def step(self) -> list[Token]:
        """Runs one chunk; returns the tokens that it gave. Nothing happens when there is no work."""
        sequence = self._admit()
        if sequence is None:
            return []
        try:
            return self._advance(sequence)
        except AttnStoreError:
            self._end(sequence)
            raise

    def generate(self, token_ids: list[int], sampling: SamplingParams | None = None) -> Sequence:
        """Runs a prompt to its end, after those that were submitted before it."""
        sequence = self.submit(token_ids, sampling)
        while sequence.finish_reason is None:
            self.step()
        return sequence

    def flush(self, timeout_ms: float) -> bool:
        """Waits until write-behind is done. False when time ran out."""
        return self._cache.flush(timeout_ms)

    def statistics(self) -> CacheStatistics:
        """A snapshot of the KV manager."""
        return self._cache.statistics()

    def check(self) -> None:
        """Asserts the conservation of blocks."""
        self._cache.check()

    def close(self) -> None:
        """Ends write-behind; flush first to keep what was computed."""
        self._cache.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _sequence(self, token_ids: list[int], sampling: SamplingParams) -> Sequence:
        self._submitted += 1
        return Sequence(self._submitted, list(token_ids), len(token_ids), sampling, self._clock.now_ms())

    def _admit(self) -> Sequence | None:
        if self._running is None and self._waiting:
            sequence = self._waiting.popleft()
            self._cache.settle(sequence.announced)
            sequence.admission = self._cache.admit(sequence.token_ids)
            sequence.computed_tokens = sequence.admission.hit_tokens
            self._running = sequence
        return self._running

    def _advance(self, sequence: Sequence) -> list[Token]:
        chunk = next_chunk(sequence, self.options.chunk_tokens)
        logits = self._compute(chunk)
        sequence.computed_tokens = chunk.end
        assert sequence.admission is not None
        self._cache.seal(sequence.admission.table, sequence.token_ids, chunk.end)
        if not chunk.gives_token:
            return []
        token_id = sequence.sampler.sample(logits[0])
        sequence.token_ids.append(token_id)
        if sequence.first_token_ms is None:
            sequence.first_token_ms = self._clock.now_ms()
        sequence.finish_reason = self._finish_reason(sequence, token_id)
        if sequence.finish_reason is not None:
            self._end(sequence)
        return [Token(sequence, token_id, logits[0])]

    def _compute(self, chunk: Chunk) -> Tensor:
        assert chunk.sequence.admission is not None
        self._cache.grow(chunk.sequence.admission.table, chunk.end)
        return self._runner.run([chunk])

    def _end(self, sequence: Sequence) -> None:
        assert sequence.admission is not None
        sequence.finished_ms = self._clock.now_ms()
        sequence.blocks_used = len(sequence.admission.table.block_ids)
        self._cache.release(sequence.admission.table)
        self._running = None

    def _finish_reason(self, sequence: Sequence, token_id: int) -> FinishReason | None:
        if token_id in sequence.sampling.stop_token_ids:
            return FinishReason.STOP
        if len(sequence.generated) >= sequence.sampling.max_tokens:
            return FinishReason.LENGTH
        if len(sequence.token_ids) >= self.model.context_tokens_max:
            return FinishReason.CONTEXT_FULL
        if len(sequence.token_ids) > self._cache.capacity_tokens:
            return FinishReason.POOL_FULL
        return None

    def _check_prompt(self, token_ids: list[int]) -> None:
        context, pool = self.model.context_tokens_max, self._cache.capacity_tokens
        vocabulary = self.model.module.config.vocab_size
        if not token_ids:
            raise InvalidArgument("the prompt is empty; it must have at least one token")
        if not all(0 <= token < vocabulary for token in token_ids):
            raise InvalidArgument(f"the prompt has token ids outside the vocabulary [0, {vocabulary})")
        if len(token_ids) >= context:
            raise ContextOverflow(
                f"the prompt has {len(token_ids)} tokens; the context of {self.model.name} is {context}, the answer included"
            )
        if len(token_ids) > pool:
            raise PoolTooSmall(
                f"the prompt has {len(token_ids)} tokens; the pool of {self.options.pool_bytes} bytes holds {pool} of "
                f"{self.layout.page_bytes // self.layout.block_tokens} bytes each; give it more"
            )
