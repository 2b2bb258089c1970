"""A race detector for blocks and slots: vector clocks of the streams and of the host.

Owns: `Races`, which is told of every access, and `Unsynchronised`. Invariant: what it finds does not depend on timing: an access
races if no chain of submissions and waits orders it after the last access that conflicts with it, whatever ran first.
The host counts as one: its threads order their accesses among themselves, by locks and queues that this does not see.
Source: the happens-before relation (Lamport 1978); last accesses as in FastTrack (Flanagan and Freund 2009).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Final, NamedTuple

HOST: Final = "host"


class Unsynchronised(AssertionError):
    """Two accesses to one block or slot, at least one of them a write, that nothing orders."""

    def __init__(self, place: Place, sites: tuple[str, str]) -> None:
        super().__init__(f"{place.memory} {place.number}, layer {place.layer}: {sites[1]} is not ordered after {sites[0]}")
        self.place = place
        self.sites = sites


class Place(NamedTuple):
    """One layer of a block or slot. `memory` names the pool or the host memory."""

    memory: str
    number: int
    layer: int


Clock = Mapping[str, int]
"""For each stream, and the host, how much of its work is known to have ended."""


@dataclass(slots=True)
class _Access:
    actor: str
    time: int
    site: str


@dataclass(slots=True)
class _Last:
    write: _Access | None = None
    reads: dict[str, _Access] = field(default_factory=dict)


class Races:
    """The clocks and the last accesses. Not thread-safe."""

    def __init__(self) -> None:
        self.found: list[Unsynchronised] = []
        self._clocks: defaultdict[str, dict[str, int]] = defaultdict(dict)
        self._last: defaultdict[Place, _Last] = defaultdict(_Last)

    def clock(self, actor: str) -> Clock:
        """Returns what has happened before now for a stream or the host."""
        return dict(self._clocks[actor])

    def joins(self, actor: str, clock: Clock) -> None:
        """Orders the next work of `actor` after everything that `clock` knows."""
        own = self._clocks[actor]
        for other, time in clock.items():
            own[other] = max(own.get(other, 0), time)

    def accesses(self, actor: str, site: str, places: Iterable[Place], *, writes: bool) -> None:
        """Records one access of `actor` to all `places`. Raises `Unsynchronised` for the first that races, after recording all."""
        own = self._clocks[actor]
        own[actor] = own.get(actor, 0) + 1
        now = _Access(actor, own[actor], site)
        races = []
        for place in places:
            last = self._last[place]
            for other in (last.write, *(last.reads.values() if writes else ())):
                if other is not None and own.get(other.actor, 0) < other.time:
                    races.append(Unsynchronised(place, (other.site, site)))
            if writes:
                last.write, last.reads = now, {}
            else:
                last.reads[actor] = now
        if races:
            self.found += races
            raise races[0]
