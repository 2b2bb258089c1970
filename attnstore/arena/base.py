"""The contract of an arena: the preallocated bytes that the slots of `attnstore.core.slots` refer to.

Owns: the isolation of tenants in memory. The page table decides which slot belongs to whom; an arena only sees slots.
Invariants: capacity is fixed at construction; a view is exactly its slot; bytes of one tenant are never visible through a slot of
another. The arena enforces the last by itself, so no caller can forget it: a slot carries the tenancy of its extent, and the first
slot of a new tenancy makes the arena replace the extent's bytes by zeros before it returns the view. Slots of an earlier tenancy
are refused from then on.
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from typing import ClassVar

from attnstore.core.slots import Slot
from attnstore.errors import InvalidArgument


class Arena(ABC):
    """`capacity_bytes // extent_bytes` extents of zeros.

    Raises `InvalidArgument` if the sizes give no extent or the memory cannot be allocated. `view` may be called from any thread: if
    two threads present the same new tenancy, one replaces the bytes and the other waits.
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
        """Returns the writable view of a taken slot, exactly `slot.size_bytes` long.

        The view stays mapped while anyone holds it. Its content is the page's only while the slot is taken (`PageTable.pin`). A
        slot of an earlier tenancy raises `AssertionError`, because its page no longer exists.
        """
        end_bytes = slot.offset_bytes + slot.size_bytes
        assert end_bytes <= self.extent_bytes, f"slot {slot} passes the end of its extent of {self.extent_bytes} bytes"
        if slot.tenancy != self._tenancies[slot.extent]:
            with self._changing:
                self._hand_over(slot)
        return self._extent(slot.extent)[slot.offset_bytes : end_bytes]

    @abstractmethod
    def withdraw(self, slot: Slot) -> None:
        """Tells readers that use the bytes of a taken slot in place that they must not use them any more."""

    @abstractmethod
    def close(self) -> None:
        """Frees the memory as soon as no view of it is held. Closing twice is allowed; `view` then raises `ValueError`."""

    @abstractmethod
    def _extent(self, extent: int) -> memoryview:
        """Returns all bytes of an extent."""

    @abstractmethod
    def _replace(self, extent: int) -> None:
        """Makes an extent all zeros, so that a reader of its old bytes cannot see the new ones."""

    def _hand_over(self, slot: Slot) -> None:
        known = self._tenancies[slot.extent]
        if slot.tenancy == known:
            return  # another thread was first
        assert slot.tenancy > known, f"slot {slot} belongs to an earlier tenant of its extent, whose tenancy is now {known}"
        if known:
            self._replace(slot.extent)
        self._tenancies[slot.extent] = slot.tenancy
