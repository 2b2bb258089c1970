"""Whether one sequence attends to blocks in the store: a state, and the events that change it.

Owns: `AttendState`. Invariant: a sequence has an open prefix only while it attends: `AttendedBlocks` closes the prefix before an
event that ends attending. Pure: no clock, no I/O, no decision.

| phase | begin | load | move | give up |
|---|---|---|---|---|
| RESIDENT | ATTENDING | RESIDENT | | |
| ATTENDING | ATTENDING | RESIDENT | MOVED | GIVEN_UP |
| MOVED | RETURNED | MOVED | | |
| RETURNED | RETURNED | MOVED | MOVED | GIVEN_UP |
| GIVEN_UP | | GIVEN_UP | | |

An empty cell is a bug of the caller.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Final

from attnstore_worker.cache.attending.contexts import AttendedPrefix

LOSSES_MAX: Final = 3
"""A sequence with more losses than this gives up attending."""


class AttendPhase(enum.Enum):
    """RESIDENT: all blocks of the sequence are here. ATTENDING: it may leave its first blocks in the store. MOVED: it attended, and
    its blocks were fetched for good; it attends again only if it must, or to make room. RETURNED: it does so. GIVEN_UP: it lost its
    blocks in the store too often, or the store does not keep them.
    """

    RESIDENT = "resident"
    ATTENDING = "attending"
    MOVED = "moved"
    RETURNED = "returned"
    GIVEN_UP = "given_up"


class AttendEvent(enum.Enum):
    """BEGIN: the sequence attends from now on, also after it waited. LOAD: it is admitted with all its blocks here. MOVE: attending
    ends in favour of having the blocks here. GIVE_UP: see `AttendPhase`.
    """

    BEGIN = "begin"
    LOAD = "load"
    MOVE = "move"
    GIVE_UP = "give up"


TRANSITIONS: Final = {
    (AttendPhase.RESIDENT, AttendEvent.BEGIN): AttendPhase.ATTENDING,
    (AttendPhase.RESIDENT, AttendEvent.LOAD): AttendPhase.RESIDENT,
    (AttendPhase.ATTENDING, AttendEvent.BEGIN): AttendPhase.ATTENDING,
    (AttendPhase.ATTENDING, AttendEvent.LOAD): AttendPhase.RESIDENT,
    (AttendPhase.ATTENDING, AttendEvent.MOVE): AttendPhase.MOVED,
    (AttendPhase.ATTENDING, AttendEvent.GIVE_UP): AttendPhase.GIVEN_UP,
    (AttendPhase.MOVED, AttendEvent.BEGIN): AttendPhase.RETURNED,
    (AttendPhase.MOVED, AttendEvent.LOAD): AttendPhase.MOVED,
    (AttendPhase.RETURNED, AttendEvent.BEGIN): AttendPhase.RETURNED,
    (AttendPhase.RETURNED, AttendEvent.LOAD): AttendPhase.MOVED,
    (AttendPhase.RETURNED, AttendEvent.MOVE): AttendPhase.MOVED,
    (AttendPhase.RETURNED, AttendEvent.GIVE_UP): AttendPhase.GIVEN_UP,
    (AttendPhase.GIVEN_UP, AttendEvent.LOAD): AttendPhase.GIVEN_UP,
}


@dataclass(slots=True)
class AttendState:
    """`prefix` is what the sequence attends to, if the store holds any of it. `began_tokens` is the number of generated tokens when
    the sequence began to attend, `losses` how often it lost a prefix.
    """

    phase: AttendPhase = AttendPhase.RESIDENT
    prefix: AttendedPrefix | None = None
    began_tokens: int = 0
    losses: int = 0

    @property
    def attends(self) -> bool:
        """True if the sequence may leave blocks in the store."""
        return self.phase in (AttendPhase.ATTENDING, AttendPhase.RETURNED)

    @property
    def has_moved(self) -> bool:
        """True if the blocks were fetched for good once: only need makes the sequence attend again."""
        return self.phase in (AttendPhase.MOVED, AttendPhase.RETURNED)

    @property
    def may_begin(self) -> bool:
        """True unless the sequence has given up."""
        return self.phase is not AttendPhase.GIVEN_UP

    def begin(self, generated_tokens: int) -> None:
        """Records that the sequence attends from now on."""
        self._follow(AttendEvent.BEGIN)
        self.began_tokens = generated_tokens

    def load(self) -> None:
        """Records that the sequence is admitted with all its blocks here."""
        self._follow(AttendEvent.LOAD)

    def move(self) -> None:
        """Records that the sequence will have its blocks here for good."""
        self._follow(AttendEvent.MOVE)

    def give_up(self) -> None:
        """Records that the sequence stops attending."""
        self._follow(AttendEvent.GIVE_UP)

    def lose(self) -> None:
        """Records the loss of the prefix. Gives up after more than `LOSSES_MAX` losses."""
        assert self.attends
        self.losses += 1
        if self.losses > LOSSES_MAX:
            self.give_up()

    def _follow(self, event: AttendEvent) -> None:
        after = TRANSITIONS.get((self.phase, event))
        assert after is not None, f"{event.value} does not follow in {self.phase.value}"
        self.phase = after
        assert self.prefix is None or self.attends, "a prefix outlived attending"
