"""The faults of a run: which, when and for how long, all of it from a seed. Pure.

Invariant: one fault at a time, with time before it to measure the level and after it to recover; every kind occurs before any
occurs twice. A caller that misbehaves needs no time to recover: nobody else may notice it at all.
"""

from __future__ import annotations

import enum
import random
from dataclasses import dataclass
from typing import Final

WARM_UP_S: Final = 8.0
"""The store fills before anything is measured."""
LEVEL_S: Final = 3.0
"""Time before each fault over which the hit rate's level is taken."""
RESTART_S: Final = 3.0
"""Left for a killed service to become healthy again."""
CALLER_START_S: Final = 3.0
"""Left for a caller's process to start and to end."""
RECOVERY_S_MAX: Final = 10.0
"""The stated time: after a heal the hit rate is back at 90% of its level within it."""
_FAULT_S: Final = (2.5, 4.0)


class FaultKind(enum.StrEnum):
    """What is done to a service, and undone."""

    KILLED = "killed"
    """SIGKILL; started again, empty."""
    CUT_OFF = "cut off"
    """Packets from and to it vanish; the link is mended."""
    FROZEN = "frozen"
    """It stops without closing anything; it goes on where it was."""
    ROGUE = "rogue"
    """The directory gets records, intents and quotas that are no node's and no operator's."""
    HURRIED = "hurried"
    """A client makes calls whose deadlines no node could meet, between calls with time enough."""
    TRICKLING = "trickling"
    """A client begins pages at every door and sends them a byte at a time."""
    GREEDY = "greedy"
    """Another tenant takes all that it is given of every limit."""

    @property
    def is_caller(self) -> bool:
        """A caller that misbehaves (`experiments.chaos.caller`), rather than a service that fails."""
        return self in _CALLERS


_CALLERS: Final = (FaultKind.ROGUE, FaultKind.HURRIED, FaultKind.TRICKLING, FaultKind.GREEDY)
_STORES: Final = ("store1", "store2", "store3")
_SUBJECTS: Final = (
    ((FaultKind.KILLED, _STORES), (FaultKind.CUT_OFF, _STORES), (FaultKind.KILLED, ("redis",))),
    tuple((kind, ("client",)) for kind in _CALLERS),
    ((FaultKind.FROZEN, _STORES), (FaultKind.CUT_OFF, ("redis",)), (FaultKind.CUT_OFF, ("worker1", "worker2"))),
)
"""In this order, shuffled within each group: the first group is the least that a run of a minute has."""


@dataclass(frozen=True, slots=True)
class Fault:
    """`at_s` counts from the start of the load, warm-up included; the fault lasts `for_s`."""

    kind: FaultKind
    service: str
    at_s: float
    for_s: float


def plan_faults(seed: int, run_s: float) -> list[Fault]:
    """As many faults as `run_s` seconds of load after the warm-up hold, the same for the same seed."""
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
    """A deck to take from the end."""
    return [subject for group in reversed(_SUBJECTS) for subject in draws.sample(group, len(group))]
