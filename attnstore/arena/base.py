"""The contract of an arena: the preallocated bytes that the slots of `attnstore.core.slots` point into.

Owns: the tenant boundary in memory. Which slot is whose is decided elsewhere; an arena only sees slots.
Invariants: capacity is fixed at construction; a window is exactly its slot; bytes of one tenant are never seen through a slot
of another one. The last is enforced here and cannot be forgotten by a caller: a slot carries the tenancy of its extent, and
the first slot of a new tenancy makes the arena replace the extent's bytes by zeros before the window is handed out. From then
on slots of an earlier tenancy are refused.
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from typing import ClassVar

from attnstore.core.slots import Slot
from attnstore.errors import InvalidArgument


class Arena(ABC):
    """`capacity_bytes // extent_bytes` extents of zeros.

    Raises `InvalidArgument` where the sizes make no extent or the memory cannot be had. `view` may be called from any thread:
    of two threads that bring the same new tenancy, one replaces the bytes and the other waits for it.
    """

    descriptors_per_extent: ClassVar[int] = 0

    def __init__(self, capacity_bytes: int, extent_bytes: int) -> None:
        if not 1 <= extent_bytes <= capacity_bytes:
            raise InvalidArgument(
                f"extent_bytes is {extent_bytes}; it must be between 1 and the arena's capacity_bytes = {capacity_bytes}"
            )
        self.capacity_bytes = capacity_bytes
        self.extent_bytes = extent_bytes
        self.extents = capacity_bytes // extent_bytes
        self._tenancies = [0] * self.extents
        self._changing = threading.Lock()

    def view(self, slot: Slot) -> memoryview:
        """The writable window of a taken slot, exactly `slot.size_bytes` long.

        The window stays mapped for as long as anybody holds it; whether its content is still the page is known by the slot
        being taken (`PageTable.pin`). A slot of an earlier tenancy raises `AssertionError`: its page is gone.
        """
        end_bytes = slot.offset_bytes + slot.size_bytes
        assert end_bytes <= self.extent_bytes, f"slot {slot} passes the end of its extent of {self.extent_bytes} bytes"
        if slot.tenancy != self._tenancies[slot.extent]:
            with self._changing:
                self._hand_over(slot)
        return self._extent(slot.extent)[slot.offset_bytes : end_bytes]

    @abstractmethod
    def withdraw(self, slot: Slot) -> None:
        """Whoever uses the bytes of a taken slot in place learns that they are not to be used any more."""

    @abstractmethod
    def close(self) -> None:
        """Gives the memory back, as soon as no window into it is held. Closing twice is allowed; `view` then raises
        `ValueError`.
        """

    @abstractmethod
    def _extent(self, extent: int) -> memoryview:
        """All bytes of an extent."""

    @abstractmethod
    def _replace(self, extent: int) -> None:
        """Makes an extent all zeros, so that whoever saw its old bytes cannot see what comes next."""

    def _hand_over(self, slot: Slot) -> None:
        known = self._tenancies[slot.extent]
        if slot.tenancy == known:
            return  # another thread was first
        assert slot.tenancy > known, f"slot {slot} belongs to an earlier tenant of its extent, whose tenancy is now {known}"
        if known:
            self._replace(slot.extent)
        self._tenancies[slot.extent] = slot.tenancy
