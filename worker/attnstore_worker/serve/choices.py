"""One request's sequences: started together, read together, cancelled together.

Owns: `Choices`. Invariant: whatever way a request ends, each of its sequences is finished or cancelled.
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
"""As OpenAI names them. The others are failures of the server."""


@dataclass(frozen=True, slots=True)
class Piece:
    """Some text of the choice at `index`; with a `finish_reason` its last."""

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
        """OpenAI's `usage` object."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
        }


class Choices:
    """The sequences of one request. Leaving it as a context manager cancels what is not finished."""

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
        """Starts one sequence for each prompt and sampling. Raises as `AsyncEngine.submit` does, and then has started none."""
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
        """Cancels what is not finished."""
        for stream in self._streams:
            if stream.finish_reason is None:
                stream.cancel()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.cancel()

    def usage(self, choices_per_prompt: int) -> Usage:
        """What was used so far. A prompt counts once, however many choices continue it."""
        firsts = self._streams[::choices_per_prompt]
        return Usage(
            prompt_tokens=sum(stream.prompt_tokens for stream in firsts),
            completion_tokens=self._completion_tokens,
            cached_tokens=sum(stream.hit_tokens for stream in firsts),
        )

    async def pieces(self) -> AsyncIterator[Piece]:
        """The text of all choices as it comes. Raises the error of one that FAILED, and `Overloaded` where the engine could not
        finish one.
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
            await asyncio.gather(*nexts, return_exceptions=True)  # each is asked how it ended, or asyncio logs that nobody did

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
