"""What a sequence must be given before it may start: the one difference between the systems that are compared.

Owns: the contract `Reservation`, `ContiguousReservation` with its allocator, and `PagedReservation`.
Invariant: ranges that are reserved at one time are disjoint and inside the memory.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Callable, Iterable
from typing import Protocol

from attnstore_worker.engine import Sequence
from experiments.memory_utilization.workload import Request


class Reservation(Protocol):
    """Memory of `capacity` token slots, as a policy gives it away."""

    def reserve(self, request: Request) -> bool:
        """Takes what the request needs to start. False: not now."""
        ...

    def release(self, request: Request) -> None:
        """The request is over."""
        ...

    def reserved_slots(self, running: Iterable[Sequence]) -> int:
        """Token slots that nobody else can have now."""
        ...


class PagedReservation:
    """Blocks on demand: the engine's own admission, which nothing precedes."""

    def reserve(self, request: Request) -> bool:
        """Always: the engine makes it wait where blocks are short."""
        del request
        return True

    def release(self, request: Request) -> None:
        """The engine has done that."""

    def reserved_slots(self, running: Iterable[Sequence]) -> int:
        """Whole blocks."""
        return sum(sequence.table.capacity_tokens for sequence in running if sequence.table is not None)


class ContiguousReservation:
    """One range of slots for a request's whole life, where the first gap is large enough.

    Kinder to the baseline than the paper, whose buddy allocator rounds each range up to a power of two.
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
        """Gives the range back and joins it with the gaps beside it."""
        insort(self._gaps, self._ranges.pop(request))
        joined: list[tuple[int, int]] = []
        for begin, end in self._gaps:
            if joined and joined[-1][1] == begin:
                joined[-1] = (joined[-1][0], end)
            else:
                joined.append((begin, end))
        self._gaps = joined

    def reserved_slots(self, running: Iterable[Sequence]) -> int:
        """All ranges."""
        del running
        return sum(end - begin for begin, end in self._ranges.values())
