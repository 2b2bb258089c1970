"""Which sequences attend to blocks that stay in the store, and when a sequence changes to the other way.

Owns: `AttendChoice`, which decides for a sequence by the user's policy and by measured costs. It changes no block. Invariant: a
sequence that does not fit into the pool attends at any cost, unless the policy is NEVER.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Final, Protocol, runtime_checkable

from attnstore.core.layout import PageLayout
from attnstore_worker.cache import CacheManager
from attnstore_worker.cache.attending.contexts import AttendedPrefix, QueryShape
from attnstore_worker.cache.attending.fetched import window_pages
from attnstore_worker.cache.moving.load import Prompt
from attnstore_worker.cache.planning.attend_planner import AttendForecast, ChunkForecast, ChunkWork
from attnstore_worker.engine.sequence import Sequence
from attnstore_worker.options import AttendPolicy

_ANSWERS_KEPT: Final = 64


@runtime_checkable
class ChunkForecaster(Protocol):
    """A planner that forecasts chunks behind blocks in the store."""

    def chunk_forecast(self, work: ChunkWork, /) -> ChunkForecast | None:
        """Returns the forecast of a chunk; None while a cost is unknown."""
        ...


def chunk_choice(forecaster: ChunkForecaster, layout: PageLayout, shape: QueryShape) -> Callable[[int, int], bool]:
    """Returns `fetches(blocks, rows)`: whether a chunk of `rows` rows should fetch its first `blocks` blocks, and not ask about
    them. A single row never fetches: what it fetches would be of use to the next one.
    """
    rows_max, row_bytes, together = shape.rows_max(layout), shape.row_bytes(layout), window_pages(layout)

    def fetches(blocks: int, rows: int) -> bool:
        if rows == 1:
            return False
        queries = -(-rows // rows_max)
        sizes = layout.block_tokens, layout.page_bytes, layout.layers
        forecast = forecaster.chunk_forecast(ChunkWork(rows, blocks, *sizes, queries, together, row_bytes))
        return forecast is not None and forecast.fetches

    return fetches


@runtime_checkable
class AttendForecaster(Protocol):
    """A planner that has measured the costs of attending."""

    def attend_forecast(self, prompt: Prompt, remote_blocks: int, row_bytes: int, /) -> AttendForecast | None:
        """Returns the forecast of a prompt whose first `remote_blocks` blocks are in the store; None while a cost is unknown."""
        ...

    def attending(self, prompt: Prompt, remote_blocks: int, forecast: AttendForecast, /) -> None:
        """Records that the prompt attends to these blocks."""
        ...


@dataclass(frozen=True, slots=True)
class Judged:
    """The prompt whose forecast says that it should attend to its first `remote_blocks` blocks."""

    prompt: Prompt
    remote_blocks: int
    forecast: AttendForecast


@dataclass(frozen=True, slots=True)
class Taken:
    """The decision that a sequence attends: by measured costs if `judged`, else by the policy."""

    judged: Judged | None = None


class AttendChoice:
    """`forecaster` is needed only for MEASURED. `row_bytes`: bytes of one row's queries and answers over all layers.
    `tokens_per_step` returns how many tokens a step gives, accepted drafts included.
    """

    def __init__(
        self,
        policy: AttendPolicy,
        cache: CacheManager,
        forecaster: AttendForecaster | None,
        row_bytes: int,
        tokens_per_step: Callable[[], float],
    ) -> None:
        self._policy = policy
        self._cache = cache
        self._forecaster = forecaster if policy is AttendPolicy.MEASURED else None
        self._row_bytes = row_bytes
        self._tokens_per_step = tokens_per_step
        self._answers: deque[int] = deque(maxlen=_ANSWERS_KEPT)

    def fits(self, sequence: Sequence) -> bool:
        """Returns whether the sequence, and one more token, fits into the pool."""
        return len(sequence.token_ids) < self._cache.capacity_tokens

    def must(self, sequence: Sequence) -> bool:
        """Returns whether the sequence must attend, at any cost."""
        return self._policy is AttendPolicy.ALWAYS or not self.fits(sequence)

    def wants(self, sequence: Sequence) -> bool:
        """Returns whether the sequence should look for blocks to attend to."""
        if self.must(sequence):
            return True
        if sequence.attend.has_moved or self._forecaster is None:
            return False
        prompt = self._cache.prompt(sequence.token_ids, sequence.hashes, sequence.extra_keys)
        return self._attends(sequence, prompt, prompt.usable_blocks) is not None

    def takes(self, sequence: Sequence, found: AttendedPrefix | None) -> Taken | None:
        """Returns the decision to attend to the blocks that were found in the store, or None."""
        if not self.fits(sequence):
            return Taken()
        if found is None:
            return None
        if self._forecaster is None:
            return Taken()
        prompt = self._cache.prompt(sequence.token_ids, sequence.hashes, sequence.extra_keys)
        forecast = self._attends(sequence, prompt, found.blocks)
        return Taken(Judged(prompt, found.blocks, forecast)) if forecast is not None else None

    def began(self, sequence: Sequence, taken: Taken) -> None:
        """Records that the sequence attends from its admission on."""
        if taken.judged is not None:
            assert self._forecaster is not None
            self._forecaster.attending(taken.judged.prompt, taken.judged.remote_blocks, taken.judged.forecast)
            sequence.prompt = taken.judged.prompt

    def moves(self, sequence: Sequence, spare_blocks: int) -> bool:
        """Returns whether an attending sequence should load its blocks now, given `spare_blocks` free blocks."""
        spent = len(sequence.generated) - sequence.attend.began_tokens
        if not self.fits(sequence) or len(sequence.token_ids) >= spare_blocks * self._cache.block_tokens:
            return False
        forecast = self._running_forecast(sequence)
        if forecast is None:
            return False
        steps = self._tokens_per_step()
        most = sequence.sampling.max_tokens - len(sequence.generated)
        return forecast.moves(spent=spent / steps, expected=self._expected_steps(sequence), most=most / steps)

    def leaves(self, sequence: Sequence, victim: Sequence) -> bool:
        """Returns whether a resident sequence should attend, so that `victim` can keep its blocks."""
        forecast, other = self._running_forecast(sequence), self._running_forecast(victim)
        if forecast is None or other is None:
            return False
        return forecast.leaves(self._expected_steps(sequence), other.load_ttft_ms)

    def ended(self, sequence: Sequence) -> None:
        """Records the length of an answer."""
        self._answers.append(len(sequence.generated))

    def _attends(self, sequence: Sequence, prompt: Prompt, remote_blocks: int) -> AttendForecast | None:
        """Returns the forecast, if it says that the sequence should attend."""
        assert self._forecaster is not None
        forecast = self._forecaster.attend_forecast(prompt, remote_blocks, self._row_bytes)
        return forecast if forecast is not None and forecast.attends(self._expected_steps(sequence)) else None

    def _running_forecast(self, sequence: Sequence) -> AttendForecast | None:
        """Returns the forecast as if no block of the sequence were here."""
        if self._forecaster is None:
            return None
        prompt = self._cache.prompt(sequence.token_ids, sequence.hashes, sequence.extra_keys, resident_blocks=0)
        return self._forecaster.attend_forecast(prompt, prompt.usable_blocks, self._row_bytes)

    def _expected_steps(self, sequence: Sequence) -> float:
        """Returns the expected steps to the end of the sequence: the median of recent answers, at most the requested tokens."""
        most = sequence.sampling.max_tokens
        answer = min(most, median(self._answers)) if self._answers else most
        return max(answer - len(sequence.generated), 0) / self._tokens_per_step()
