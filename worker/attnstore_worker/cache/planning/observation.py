"""What the worker measures of itself while it works, for estimators, metrics and explanations.

Owns: the observations, and `Observer`, who is told of them. Invariant: an observation is a fact about something that is over;
telling it changes nothing. Times are on the engine's clock.
"""

from __future__ import annotations

import enum
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, TypeVar

from attnstore_worker.cache.planning.load_plan import Found, LoadPlan, Prompt, SearchPlan
from attnstore_worker.cache.pool.tier import Tier

_LOG = logging.getLogger(__name__)
_T = TypeVar("_T")


class TransferKind(enum.Enum):
    """What a tier was asked to do. A MATCH moves no page: its duration is a round trip. So is that of an ATTEND, which tells a node
    on an attend stream what pages will be asked about.
    """

    MATCH = "match"
    READ = "read"
    WRITE = "write"
    ATTEND = "attend"


@dataclass(frozen=True, slots=True)
class Transfer:
    """One call to a tier that has ended. `pages` of `pages_asked` were found, verified or kept, `bytes` of them moved.

    `first_byte_ms` is when the first bytes were known to be there, where the transport tells. A call that `failed` as a whole
    (error, deadline, or not made because the tier had failed just before) may have moved some pages nevertheless.
    """

    tier: Tier
    kind: TransferKind
    started_ms: float
    ended_ms: float
    pages_asked: int
    pages: int
    bytes: int
    failed: bool
    first_byte_ms: float | None = None


@dataclass(frozen=True, slots=True)
class Step:
    """One step of the model. `chunks` are the token ranges `(begin, end)` that it computed, one for each sequence in it. Of what it
    asked store nodes meanwhile: the exchanges that it waited for, one after the other, and their payload.
    """

    started_ms: float
    ended_ms: float
    chunks: tuple[tuple[int, int], ...]
    round_trips: int = 0
    attend_bytes: int = 0


class LoadEnd(enum.Enum):
    """Why a load is over.

    LENT: the pages are used where they lie. COMPLETE: everything planned was fetched or failed. MET: the computed front reached
    what had arrived. NOT_FOUND: no lower tier had a block. DECLINED: the planner wanted none. LATE: its deadline passed, or the
    planner gave it up. RELEASED: the sequence was cancelled or preempted.
    """

    LENT = "lent"
    COMPLETE = "complete"
    MET = "met"
    NOT_FOUND = "not_found"
    DECLINED = "declined"
    LATE = "late"
    RELEASED = "released"


@dataclass(frozen=True, slots=True)
class Load:
    """What became of one search and its load: what was planned, and what happened. `found` and `plan` are None where it never came
    so far. Blocks `arrived_blocks` came from below and were used or could be.
    """

    prompt: Prompt
    search: SearchPlan
    found: Found | None
    plan: LoadPlan | None
    end: LoadEnd
    started_ms: float
    ended_ms: float
    arrived_blocks: int
    bytes_read: int


@dataclass(frozen=True, slots=True)
class Answer:
    """A prompt that lower tiers may have helped with has its first token; `started_ms` is when it was admitted."""

    prompt: Prompt
    started_ms: float
    ended_ms: float


class Observer(Protocol):
    """Is told of every observation, from the thread that made it. Must be quick; who may raise is `Shielded`."""

    def transferred(self, transfer: Transfer) -> None:
        """A call to a tier has ended."""
        ...

    def stepped(self, step: Step) -> None:
        """The model has run."""
        ...

    def loaded(self, load: Load) -> None:
        """A sequence waits for no page any more. Told once for each search."""
        ...

    def answered(self, answer: Answer) -> None:
        """A prompt has its first token."""
        ...


class Unobserved:
    """Nobody looks."""

    def transferred(self, transfer: Transfer) -> None:
        """Forgotten."""

    def stepped(self, step: Step) -> None:
        """Forgotten."""

    def loaded(self, load: Load) -> None:
        """Forgotten."""

    def answered(self, answer: Answer) -> None:
        """Forgotten."""


class Shielded:
    """Tells `observer`, which may raise: the first failure of each kind is logged, and none reaches who was observed."""

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
