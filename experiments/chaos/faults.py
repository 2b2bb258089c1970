"""The faults of a run: their kinds, times and durations, all derived from a seed. Pure.

Invariant: one fault at a time, with time before it to measure the hit rate's level and after it to recover; every kind occurs
before any occurs twice. A misbehaving caller needs no time to recover, because it must not affect others at all.
"""

from __future__ import annotations

import enum
import random
from dataclasses import dataclass
from typing import Final

WARM_UP_S: Final = 8.0
"""The store fills before anything is measured."""
LEVEL_S: Final = 2.0
"""Time before each fault over which the hit rate's level is taken."""
RESTART_S: Final = 3.0
"""Time for a killed service to become healthy again."""
CALLER_START_S: Final = 2.0
"""Time for a caller's process to start and to end."""
RECOVERY_S_MAX: Final = 6.0
"""Within this time after the end of a fault, the hit rate is back at 90% of its level."""
_FAULT_S: Final = (2.5, 4.0)


class FaultKind(enum.StrEnum):
    """A fault of a service, and its end."""

    KILLED = "killed"
    """SIGKILL; started again, empty."""
    CUT_OFF = "cut off"
    """Packets from and to it are dropped until the link is mended."""
    FROZEN = "frozen"
    """It is stopped without closing anything, and continued later."""
    ROGUE = "rogue"
    """The directory receives records, intents and quotas that no node or operator wrote."""
    HURRIED = "hurried"
    """A client makes calls with deadlines that no node can meet, between calls with enough time."""
    TRICKLING = "trickling"
    """A client begins pages on every transport and sends them one byte at a time."""
    GREEDY = "greedy"
    """Another tenant takes as much of every limit as it gets."""

    @property
    def is_caller(self) -> bool:
        """True for a misbehaving caller (`experiments.chaos.caller`), false for a failing service."""
        return self in _CALLERS


_CALLERS: Final = (FaultKind.ROGUE, FaultKind.HURRIED, FaultKind.TRICKLING, FaultKind.GREEDY)
_STORES: Final = ("store1", "store2", "store3")
_SUBJECTS: Final = (
    ((FaultKind.KILLED, _STORES), (FaultKind.CUT_OFF, _STORES), (FaultKind.KILLED, ("redis",))),
    tuple((kind, ("client",)) for kind in _CALLERS),
    ((FaultKind.FROZEN, _STORES), (FaultKind.CUT_OFF, ("redis",)), (FaultKind.CUT_OFF, ("worker1", "worker2"))),
)
"""In this order, shuffled within each group: the first group is the minimum for a run of a minute."""


@dataclass(frozen=True, slots=True)
class Fault:
    """`at_s` counts from the start of the load, warm-up included; the fault lasts `for_s`."""

    kind: FaultKind
    service: str
    at_s: float
    for_s: float


def plan_faults(seed: int, run_s: float) -> list[Fault]:
    """Returns as many faults as fit `run_s` seconds of load after the warm-up; equal seeds give equal faults."""
    draws = random.Random(seed)
    faults: list[Fault] = []
    at_s = WARM_UP_S + LEVEL_S
    deck: list[tuple[FaultKind, tuple[str, ...]]] = []
    while True:
        if not deck:
            deck = _shuffled(draws)
        kind, services = deck.pop()
        for_s = round(draws.uniform(*_FAULT_S), 2)
        over_s = for_s + (CALLER_START_S if kind.is_caller else RESTART_S + RECOVERY_S_MAX)
        if at_s + over_s > WARM_UP_S + run_s:
            return faults
        faults.append(Fault(kind, draws.choice(services), round(at_s, 2), for_s))
        at_s += over_s + LEVEL_S


def _shuffled(draws: random.Random) -> list[tuple[FaultKind, tuple[str, ...]]]:
    """Returns a shuffled list to pop from."""
    return [subject for group in reversed(_SUBJECTS) for subject in draws.sample(group, len(group))]
