"""The engine on a thread of its own, for asyncio.

Owns: that thread, the only one that uses the engine, and the two queues: commands in, and tokens out to each event loop.
Invariants: every accepted stream ends exactly once, with a finish reason or an error, also when the engine fails or closes; prompts
are accepted until the engine is closed or cannot compute any more (docs/decisions/0063-a-fault-ends-what-it-concerns.md). Buffers
are bounded: commands are executed between two steps, when the engine's own queue refuses what is too much, and a stream holds no
more tokens than its sequence can have.
"""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from attnstore.errors import AttnStoreError, Unavailable
from attnstore_worker.cache import CacheStatistics, Planner
from attnstore_worker.engine.engine import Engine
from attnstore_worker.engine.outputs import BatchingStatistics, Token
from attnstore_worker.engine.sampler import SamplingParams
from attnstore_worker.engine.sequence import FinishReason, Sequence
from attnstore_worker.errors import SequenceFailed

_LOG = logging.getLogger(__name__)

_Event = Sequence | Token | FinishReason | AttnStoreError
"""A stream's events: the sequence once it is accepted, its tokens, then a finish reason; or an error at any time."""


@dataclass(frozen=True, slots=True)
class _Submit:
    stream: TokenStream
    token_ids: list[int]
    sampling: SamplingParams
    priority: int
    cache_salt: str


@dataclass(frozen=True, slots=True)
class _Cancel:
    stream: TokenStream


@dataclass(frozen=True, slots=True)
class _Close:
    pass


_Command = _Submit | _Cancel | _Close


@dataclass(frozen=True, slots=True)
class EngineSnapshot:
    """The engine's statistics after its last step."""

    batching: BatchingStatistics
    cache: CacheStatistics


class TokenStream:
    """The tokens of one sequence as they are generated: iterate over it once. Leaving the context manager cancels an unfinished
    sequence.

    `finish_reason` is set when the iteration has ended. Iterating raises the error of a sequence that FAILED, and `Unavailable` if
    the engine failed or was closed.
    """

    def __init__(self, engine: AsyncEngine) -> None:
        self.finish_reason: FinishReason | None = None
        self._engine = engine
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[_Event] = asyncio.Queue()
        self._sequence: Sequence | None = None

    @property
    def prompt_tokens(self) -> int:
        """Tokens of the prompt."""
        assert self._sequence is not None
        return self._sequence.prompt_tokens

    @property
    def hit_tokens(self) -> int:
        """Tokens of the prompt that came from a cache; 0 while the sequence waits."""
        assert self._sequence is not None
        return self._sequence.admission.hit_tokens if self._sequence.admission is not None else 0

    def cancel(self) -> None:
        """Requests the end of the sequence; the stream then ends with CANCELLED, unless it was finished before."""
        self._engine._post_if_alive(_Cancel(self))

    async def accepted(self) -> None:
        """Waits until the engine has queued the sequence. Raises the error with which the engine refuses it."""
        event = await self._next()
        assert isinstance(event, Sequence)
        self._sequence = event

    def deliver(self, event: _Event) -> bool:
        """Called on the engine's thread. Returns False if nobody can receive it any more."""
        try:
            self._loop.call_soon_threadsafe(self._events.put_nowait, event)
        except RuntimeError:  # the event loop is closed
            return False
        return True

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Token:
        if self.finish_reason is not None:
            raise StopAsyncIteration
        event = await self._next()
        if isinstance(event, FinishReason):
            self.finish_reason = event
            raise StopAsyncIteration
        assert isinstance(event, Token)
        return event

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self.finish_reason is None:
            self.cancel()

    async def _next(self) -> _Event:
        event = await self._events.get()
        if isinstance(event, AttnStoreError):
            self.finish_reason = FinishReason.FAILED
            raise event
        return event


class AsyncEngine:
    """Runs `engine` until it is closed. Only this class may then use the engine; the caller still closes it.

    `submit` may be called from any event loop.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._commands: queue.SimpleQueue[_Command] = queue.SimpleQueue()
        self._streams: dict[Sequence, TokenStream] = {}
        self._snapshot = EngineSnapshot(engine.batching(), engine.statistics())
        self._posting = threading.Lock()
        self._ended = False
        self._thread = threading.Thread(target=self._run, name="attnstore-engine", daemon=True)
        self._thread.start()

    @property
    def alive(self) -> bool:
        """True while prompts are accepted."""
        return not self._ended

    @property
    def planner(self) -> Planner:
        """The engine's planner."""
        return self._engine.planner

    @property
    def snapshot(self) -> EngineSnapshot:
        """The statistics after the last step."""
        return self._snapshot

    async def submit(
        self, token_ids: list[int], sampling: SamplingParams, *, priority: int = 0, cache_salt: str = ""
    ) -> TokenStream:
        """Queues a prompt. Raises as `Engine.submit` does, and `Unavailable` once the engine is closed or has failed."""
        stream = TokenStream(self)
        if not self._post_if_alive(_Submit(stream, token_ids, sampling, priority, cache_salt)):
            raise _not_running()
        try:
            await stream.accepted()
        except asyncio.CancelledError:
            stream.cancel()
            raise
        return stream

    def close(self) -> None:
        """Cancels running sequences and ends the thread. Blocks for as long as one step takes."""
        self._post_if_alive(_Close())
        self._thread.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _post_if_alive(self, command: _Command) -> bool:
        # With the lock held, so that no command is queued after the last one that the thread executes.
        with self._posting:
            if not self._ended:
                self._commands.put(command)
                self._engine.wake()
            return not self._ended

    def _run(self) -> None:
        try:
            while self._obey():
                self._step()
        except Exception:
            _LOG.exception("the engine failed; it takes no more prompts")
        finally:
            self._end()

    def _obey(self) -> bool:
        """Executes all commands; waits for one if there is no work. Returns False after the command to close."""
        while self._engine.idle or not self._commands.empty():
            command = self._commands.get()
            if isinstance(command, _Close):
                return False
            if isinstance(command, _Submit):
                self._submit(command)
            else:
                self._cancel(command.stream)
        return True

    def _submit(self, command: _Submit) -> None:
        try:
            sequence = self._engine.submit(
                command.token_ids, command.sampling, priority=command.priority, cache_salt=command.cache_salt
            )
        except Exception as error:
            if not isinstance(error, AttnStoreError):
                _LOG.exception("a prompt could not be taken")
                error = SequenceFailed("the prompt could not be taken; the worker's log says why")
            command.stream.deliver(error)
            return
        self._streams[sequence] = command.stream
        self._publish()
        self._deliver(sequence, sequence)

    def _cancel(self, stream: TokenStream) -> None:
        for sequence in [sequence for sequence, other in self._streams.items() if other is stream]:
            self._engine.cancel(sequence)
            self._publish()
            self._report_end(sequence)

    def _step(self) -> None:
        tokens: list[Token] = []
        failed = False
        try:
            tokens = self._engine.step()
        except Exception:
            failed = any(sequence.finish_reason is not None for sequence in self._streams)
            if not failed:  # every other step would fail like this one
                raise
            _LOG.exception("a step failed, and with it the sequences that it computed")
        self._publish()
        for token in tokens:
            self._deliver(token.sequence, token)
        for sequence in [sequence for sequence in self._streams if sequence.finish_reason is not None]:
            self._report_end(sequence)
        if failed:
            self._engine.probe()

    def _deliver(self, sequence: Sequence, event: _Event) -> None:
        stream = self._streams.get(sequence)
        if stream is not None and not stream.deliver(event):
            self._engine.cancel(sequence)
            del self._streams[sequence]

    def _report_end(self, sequence: Sequence) -> None:
        assert sequence.finish_reason is not None
        self._streams.pop(sequence).deliver(sequence.error or sequence.finish_reason)

    def _publish(self) -> None:
        self._snapshot = EngineSnapshot(self._engine.batching(), self._engine.statistics())

    def _end(self) -> None:
        with self._posting:
            self._ended = True
        for sequence, stream in self._streams.items():
            self._engine.cancel(sequence)
            stream.deliver(sequence.error or _not_running())
        self._streams.clear()
        while not self._commands.empty():
            command = self._commands.get()
            if isinstance(command, _Submit):
                command.stream.deliver(_not_running())
        self._publish()


def _not_running() -> Unavailable:
    return Unavailable("the engine is closed or has failed")
