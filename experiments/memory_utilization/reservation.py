"""The memory that a sequence needs before it may start: the only difference between the compared systems.

Owns: the contract `Reservation`, `ContiguousReservation` with its allocator, and `PagedReservation`.
Invariant: ranges that are reserved at the same time are disjoint and inside the memory.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Callable, Iterable
from typing import Protocol

from attnstore_worker.engine import Sequence
from experiments.memory_utilization.workload import Request


class Reservation(Protocol):
    """Memory of `capacity` token slots, allocated by a policy."""

    def reserve(self, request: Request) -> bool:
        """Takes what the request needs to start. Returns False if that is not possible now."""
        ...

    def release(self, request: Request) -> None:
        """Frees the memory of a finished request."""
        ...

    def reserved_slots(self, running: Iterable[Sequence]) -> int:
        """Token slots that no other request can have now."""
        ...


class PagedReservation:
    """Blocks on demand: the engine's own admission, without a reservation."""

    def reserve(self, request: Request) -> bool:
        """Always returns True, because the engine makes a request wait while blocks are short."""
        del request
        return True

    def release(self, request: Request) -> None:
        """No-op: the engine has freed its blocks."""

    def reserved_slots(self, running: Iterable[Sequence]) -> int:
        """Whole blocks."""
        return sum(sequence.table.capacity_tokens for sequence in running if sequence.table is not None)


class ContiguousReservation:
    """One range of slots for a request's whole life, in the first gap that is large enough.

    Better for the baseline than the paper, whose buddy allocator rounds each range up to a power of two.
    """

    def __init__(self, capacity: int, slots_of: Callable[[Request], int]) -> None:
        self._slots_of = slots_of
        self._gaps = [(0, capacity)]
        self._ranges: dict[Request, tuple[int, int]] = {}

    def reserve(self, request: Request) -> bool:
        """Takes the first gap that fits."""
        slots = self._slots_of(request)
        for index, (begin, end) in enumerate(self._gaps):
            if end - begin >= slots:
                self._gaps[index : index + 1] = [(begin + slots, end)] if begin + slots < end else []
                self._ranges[request] = (begin, begin + slots)
                return True
        return False

    def release(self, request: Request) -> None:
        """Frees the range and joins it with neighbouring gaps."""
        insort(self._gaps, self._ranges.pop(request))
        joined: list[tuple[int, int]] = []
        for begin, end in self._gaps:
            if joined and joined[-1][1] == begin:
                joined[-1] = (joined[-1][0], end)
            else:
                joined.append((begin, end))
        self._gaps = joined

    def reserved_slots(self, running: Iterable[Sequence]) -> int:
        """The slots of all ranges."""
        del running
        return sum(end - begin for begin, end in self._ranges.values())
