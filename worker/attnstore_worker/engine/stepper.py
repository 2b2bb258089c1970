"""One step of the engine: drafts, the model's run, and the resulting tokens.

Owns: the order of a step, and the counts of steps and tokens. The scheduler decides which chunks are computed; residency owns
blocks and the end of a sequence. Invariant: a chunk is sealed only after its pages and its logits are known to be right; a step
that loses pages seals nothing and gives no token.
"""

from __future__ import annotations

from collections.abc import Sequence as Items
from functools import partial

from torch import Tensor

from attnstore.clock import Clock
from attnstore_worker.cache import CacheManager, Load, LoadEnd, Observer
from attnstore_worker.cache.attending.contexts import RemoteAttention, Traffic
from attnstore_worker.cache.planning.observation import Answer
from attnstore_worker.cache.planning.step_times import StepTimes
from attnstore_worker.engine.outputs import Token
from attnstore_worker.engine.residency import Residency
from attnstore_worker.engine.runner import Drawn, Runner
from attnstore_worker.engine.scheduler import Scheduler
from attnstore_worker.engine.sequence import Chunk, FinishReason, Sequence, chunk_at
from attnstore_worker.engine.speculative import DRAFTS_MAX, Speculation
from attnstore_worker.errors import PagesLost


class Stepper:
    """Steps of sequences of at most `context_tokens_max` tokens, `chunk_tokens` of each at a time. `attention` is None if no block
    stays in the store. Next tokens are drafted if it `speculates`.
    """

    def __init__(
        self,
        runner: Runner,
        cache: CacheManager,
        scheduler: Scheduler,
        residency: Residency,
        attention: RemoteAttention | None,
        speculation: Speculation,
        clock: Clock,
        observer: Observer,
        times: StepTimes,
        *,
        context_tokens_max: int,
        chunk_tokens: int,
        speculates: bool,
    ) -> None:
        self._runner = runner
        self._cache = cache
        self._scheduler = scheduler
        self._residency = residency
        self._attention = attention
        self._speculation = speculation
        self._clock = clock
        self._observer = observer
        self._times = times
        self._context_tokens_max = context_tokens_max
        self._chunk_tokens = chunk_tokens
        self._speculates = speculates
        self.steps = 0
        self.tokens_computed = 0
        self.tokens_generated = 0

    def draft(self) -> None:
        """Drafts next tokens, within the free room: no sequence is preempted for a draft."""
        running = self._scheduler.running
        if self._speculates and self._cache.available_blocks >= len(running) * (1 + DRAFTS_MAX // self._cache.block_tokens):
            pool_tokens = self._cache.capacity_tokens
            self._speculation.draft(running, tokens_max=self._context_tokens_max, pool_tokens=pool_tokens)

    def run(self, chunks: Items[Chunk]) -> Drawn:
        """Runs the model as `Runner.run` does, and reports the step as `StepTimes` does, without the copies that it waits for."""
        self._cache.before_step()
        started = self._times.start()
        asked = self._traffic()
        drawn = self._runner.run(chunks)
        now = self._traffic()
        ranges = tuple((chunk.begin, chunk.end) for chunk in chunks)
        self._times.end(started, ranges, now.round_trips - asked.round_trips, now.bytes - asked.bytes)
        return drawn

    def step(self, chunks: Items[Chunk]) -> list[Token]:
        """Computes the chunks. Returns their tokens, none if a store node that attends failed."""
        with self._residency.failing(chunks):
            started_ms = self._clock.now_ms()
            if self._draft_from_residents():
                chunks = self._scheduler.chunks()
            try:
                drawn = self.run(chunks)
            except PagesLost:
                for chunk in chunks:
                    chunk.sequence.drafts = ()
                self._residency.recover()
                return []
            return self._postprocess(chunks, drawn, self._clock.now_ms() - started_ms)

    def step_behind(self, sequence: Sequence, load: Load) -> list[Token]:
        """Computes the chunk after pages that are still arriving, layer by layer. Has no effect if they do not all arrive."""
        assert sequence.table is not None
        assert load.layered is not None
        loads = self._cache.loads
        begin = load.layered.stop * self._cache.block_tokens
        chunk = chunk_at(sequence, begin, self._chunk_tokens)
        with self._residency.failing([chunk]):
            try:
                # Not observed as a step, because its duration depends more on the link than on the model.
                drawn = self._runner.run([chunk], partial(loads.wait_layer, load))
                loads.wait_layer(load, None)
            except PagesLost:
                return []
            sequence.computed_tokens = loads.advance(sequence.table, load, sequence.computed_tokens)
            assert sequence.computed_tokens == begin
            self._residency.end_load(sequence, LoadEnd.COMPLETE)
            return self._postprocess([chunk], drawn, None)

    def _traffic(self) -> Traffic:
        return self._attention.traffic() if self._attention is not None else Traffic()

    def _draft_from_residents(self) -> bool:
        """Makes the model draft with the blocks that are here. Returns False if no sequence got a draft."""
        if not self._speculates or self._attention is None:
            return False
        return self._speculation.draft_from_residents(
            self._scheduler.running,
            self._runner.draft_resident,
            tokens_max=self._context_tokens_max,
            chunk_tokens=self._chunk_tokens,
        )

    def _postprocess(self, chunks: Items[Chunk], drawn: Drawn, took_ms: float | None) -> list[Token]:
        """Processes the results of a step, and its duration if that says something about the model."""
        self.steps += 1
        self.tokens_computed += sum(chunk.tokens for chunk in chunks)
        # Only after the step has read them is it known that the pages were the right ones all the time.
        self._residency.drop_recycled([chunk.sequence for chunk in chunks])
        alone_ms = took_ms if len(chunks) == 1 else None
        tokens: list[Token] = []
        for index, chunk in enumerate(chunks):
            if chunk.sequence.table is None:  # its pages were recycled
                continue
            try:
                self._follow(chunk, index, drawn, alone_ms, tokens)
            except Exception as error:
                self._residency.fail(chunk.sequence, error)
        self._cache.end_step()
        return tokens

    def _follow(self, chunk: Chunk, index: int, drawn: Drawn, alone_ms: float | None, tokens: list[Token]) -> None:
        """Seals what a chunk computed, and appends the next tokens to `tokens`."""
        sequence = chunk.sequence
        assert sequence.table is not None
        # Drawn before anything is sealed: pages of a chunk whose logits are not finite are never found.
        token_ids = drawn.tokens(index)
        if token_ids:
            self._speculation.observe(chunk, len(token_ids), alone_ms)
        rows = drawn.logits(index) if sequence.sampling.logits and token_ids else None
        sequence.drafts = ()
        sequence.computed_tokens = chunk.end
        self._cache.seal(sequence.table, sequence.token_ids, chunk.end)
        for number, token_id in enumerate(token_ids):
            if number:  # it was a draft, so it is computed already
                sequence.computed_tokens += 1
                self._cache.seal(sequence.table, sequence.token_ids, sequence.computed_tokens)
            tokens.append(self._extend(sequence, token_id, None if rows is None else rows[number]))
            if sequence.finish_reason is not None:
                break

    def _extend(self, sequence: Sequence, token_id: int, logits: Tensor | None) -> Token:
        assert sequence.text_stream is not None
        sequence.token_ids.append(token_id)
        self.tokens_generated += 1
        if sequence.first_token_ms is None:
            sequence.first_token_ms = self._clock.now_ms()
            if sequence.prompt is not None:
                self._observer.answered(Answer(sequence.prompt, sequence.admitted_ms, sequence.first_token_ms))
        text = sequence.text_stream.push(token_id)
        reason = self._finish_reason(sequence, token_id)
        if reason is not None:
            text += sequence.text_stream.finish()
            self._residency.end(sequence, reason)
        return Token(sequence, token_id, logits, text)

    def _finish_reason(self, sequence: Sequence, token_id: int) -> FinishReason | None:
        assert sequence.text_stream is not None
        if token_id in sequence.sampling.stop_token_ids or sequence.text_stream.stopped:
            return FinishReason.STOP
        if len(sequence.generated) >= sequence.sampling.max_tokens:
            return FinishReason.LENGTH
        if len(sequence.token_ids) >= self._context_tokens_max:
            return FinishReason.CONTEXT_FULL
        if len(sequence.token_ids) > self._cache.capacity_tokens and self._attention is None:
            return FinishReason.POOL_FULL
        return None
