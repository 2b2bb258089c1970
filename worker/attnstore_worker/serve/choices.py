"""The sequences of one request: started, read and cancelled together.

Owns: `Choices`. Invariant: however a request ends, each of its sequences is finished or cancelled.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from attnstore.errors import Overloaded
from attnstore_worker.engine import AsyncEngine, FinishReason, SamplingParams, TokenStream

_REASONS = {
    FinishReason.STOP: "stop",
    FinishReason.LENGTH: "length",
    FinishReason.CONTEXT_FULL: "length",
    FinishReason.POOL_FULL: "length",
}
"""By OpenAI's names. All other reasons are failures of the server."""


@dataclass(frozen=True, slots=True)
class Piece:
    """Some text of the choice at `index`; the last piece has a `finish_reason`."""

    index: int
    text: str
    finish_reason: str | None


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens of a request."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int

    def as_json(self) -> dict[str, object]:
        """Returns OpenAI's `usage` object."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
        }


class Choices:
    """The sequences of one request. Leaving the context manager cancels unfinished ones."""

    def __init__(self, streams: list[TokenStream]) -> None:
        self._streams = streams
        self._completion_tokens = 0

    @classmethod
    async def submit(
        cls,
        engine: AsyncEngine,
        prompts: Iterable[list[int]],
        samplings: Iterable[SamplingParams],
        *,
        priority: int,
        cache_salt: str,
    ) -> Self:
        """Starts one sequence for each prompt and sampling. Raises as `AsyncEngine.submit` does; then none is started."""
        choices = cls([])
        try:
            for token_ids, sampling in zip(prompts, samplings, strict=True):
                stream = await engine.submit(token_ids, sampling, priority=priority, cache_salt=cache_salt)
                choices._streams.append(stream)
        except BaseException:
            choices.cancel()
            raise
        return choices

    def cancel(self) -> None:
        """Cancels unfinished sequences."""
        for stream in self._streams:
            if stream.finish_reason is None:
                stream.cancel()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.cancel()

    def usage(self, choices_per_prompt: int) -> Usage:
        """Returns the usage so far. A prompt counts once, however many choices continue it."""
        firsts = self._streams[::choices_per_prompt]
        return Usage(
            prompt_tokens=sum(stream.prompt_tokens for stream in firsts),
            completion_tokens=self._completion_tokens,
            cached_tokens=sum(stream.hit_tokens for stream in firsts),
        )

    async def pieces(self) -> AsyncIterator[Piece]:
        """Yields the text of all choices as it arrives. Raises the error of a sequence that FAILED, and `Overloaded` if the engine
        could not finish one.
        """
        nexts = {asyncio.ensure_future(self._piece(index)): index for index in range(len(self._streams))}
        try:
            while nexts:
                done, _ = await asyncio.wait(nexts, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    index = nexts.pop(task)
                    piece = task.result()
                    if piece.finish_reason is None:
                        nexts[asyncio.ensure_future(self._piece(index))] = index
                    yield piece
        finally:
            for task in nexts:
                task.cancel()
            await asyncio.gather(*nexts, return_exceptions=True)  # every result is retrieved, otherwise asyncio logs it

    async def _piece(self, index: int) -> Piece:
        stream = self._streams[index]
        async for token in stream:
            self._completion_tokens += 1
            if token.text:
                return Piece(index, token.text, None)
        assert stream.finish_reason is not None
        if stream.finish_reason not in _REASONS:
            raise Overloaded(f"the sequence could not be finished ({stream.finish_reason.value}); try again")
        return Piece(index, "", _REASONS[stream.finish_reason])
