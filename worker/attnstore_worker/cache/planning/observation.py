"""The worker's measurements of itself, for estimators, metrics and explanations.

Owns: `Step` and `Answer`, and `Observer`, which receives them, every `Transfer` and every `Load`. Invariant: an observation is a
fact about finished work, and reporting it changes nothing. Times are on the engine's clock.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, TypeVar

from attnstore_worker.cache.moving.load import Load, Prompt
from attnstore_worker.cache.store.transfer import Transfer, TransferObserver

_LOG = logging.getLogger(__name__)
_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class Step:
    """One step of the model. `chunks` are the computed token ranges `(begin, end)`, one per sequence. The other fields describe its
    queries to store nodes: the sequential exchanges for which it waited, and their payload.
    """

    started_ms: float
    ended_ms: float
    chunks: tuple[tuple[int, int], ...]
    round_trips: int = 0
    attend_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Answer:
    """A prompt that the lower tiers may have served has its first token. It was admitted at `started_ms`."""

    prompt: Prompt
    started_ms: float
    ended_ms: float


class Observer(TransferObserver, Protocol):
    """Receives every observation on the thread that made it. Must be fast; an observer that may raise is wrapped in `Shielded`."""

    def stepped(self, step: Step) -> None:
        """The model has run."""
        ...

    def loaded(self, load: Load) -> None:
        """An observed load has ended. Called once per load."""
        ...

    def answered(self, answer: Answer) -> None:
        """A prompt has its first token."""
        ...


class Unobserved:
    """An observer that does nothing."""

    def transferred(self, transfer: Transfer) -> None:
        """No-op."""

    def stepped(self, step: Step) -> None:
        """No-op."""

    def loaded(self, load: Load) -> None:
        """No-op."""

    def answered(self, answer: Answer) -> None:
        """No-op."""


class Shielded:
    """Passes observations on to `observer`, which may raise. The first failure of each kind is logged, none reaches the caller."""

    def __init__(self, observer: Observer) -> None:
        self._observer = observer
        self._failed: set[str] = set()

    def transferred(self, transfer: Transfer) -> None:
        self._tell(self._observer.transferred, transfer)

    def stepped(self, step: Step) -> None:
        self._tell(self._observer.stepped, step)

    def loaded(self, load: Load) -> None:
        self._tell(self._observer.loaded, load)

    def answered(self, answer: Answer) -> None:
        self._tell(self._observer.answered, answer)

    def _tell(self, told: Callable[[_T], None], observation: _T) -> None:
        try:
            told(observation)
        except Exception as error:
            if (kind := f"{type(observation).__name__}: {type(error).__name__}") not in self._failed:
                self._failed.add(kind)
                _LOG.exception("an observer failed; what it was told is lost to it")
