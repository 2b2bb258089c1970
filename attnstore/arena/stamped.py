"""The common part of arenas that readers on this host map: stamps next to the bytes, and extents to hand out.

Owns: when stamps change. The subclass decides where the stamp words are: behind the data of each extent, as in
`attnstore.wire.shm.ExtentLayout`.
Invariants: a slot's stamp changes before the first byte of a new generation can be written, because only `view` returns the slot's
bytes; a withdrawn slot has a stamp with which no page was ever located. (Each generation has one stamp for either state.)

Stamps are in the file so that a reader can check without a call that a page used in place is still the page. Both sides use memory
fences (`attnstore.fences`), because two processes share no lock.
"""

from __future__ import annotations

from abc import abstractmethod
from array import array
from typing import NamedTuple

from attnstore.arena.base import Arena
from attnstore.core.slots import Slot
from attnstore.fences import write_fence
from attnstore.wire.shm import ExtentLayout


class Span(NamedTuple):
    """The bytes of its file that an extent occupies. Both fields are multiples of the mapping granularity."""

    offset_bytes: int
    size_bytes: int


class StampedArena(Arena):
    """An arena whose extents other processes may map. `first_stamp` is the first stamp of this node's life, because memory that
    outlives the node must never show a stamp twice.
    """

    def __init__(self, capacity_bytes: int, extent_bytes: int, *, first_stamp: int = 0) -> None:
        super().__init__(capacity_bytes, extent_bytes)
        self.layout = ExtentLayout(extent_bytes)
        self._first_stamp = first_stamp
        self._slot_bytes = [0] * self.extents

    def view(self, slot: Slot) -> memoryview:
        """See `Arena.view`. The first view of a slot also invalidates every place that refers to older bytes of it."""
        window = super().view(slot)
        index = self.layout.stamp_index(slot.offset_bytes)
        if self._stamps(slot.extent)[index] < self._stamp_of(slot):
            with self._changing:
                self._stamp(slot, index)
        return window

    def withdraw(self, slot: Slot) -> None:
        """See `Arena.withdraw`: readers that have mapped the extent see it by the stamp."""
        stamps, index, stamp = self._stamps(slot.extent), self.layout.stamp_index(slot.offset_bytes), self._stamp_of(slot)
        with self._changing:
            if stamps[index] == stamp:
                stamps[index] = stamp + 1

    def stamp(self, slot: Slot) -> int:
        """Returns the slot's stamp word. Meaningful for a pinned page."""
        return self._stamps(slot.extent)[self.layout.stamp_index(slot.offset_bytes)]

    def descriptor(self, extent: int, tenancy: int) -> int | None:
        """Returns a new read-only descriptor of the extent's file, for the caller to close, or None if the tenancy has ended."""
        with self._changing:
            if not 0 <= extent < self.extents or self._tenancies[extent] != tenancy:
                return None
            return self._open(extent)

    @abstractmethod
    def span(self, extent: int) -> Span:
        """Returns the place of the extent in that file."""

    @abstractmethod
    def _open(self, extent: int) -> int:
        """Returns a new read-only descriptor."""

    @abstractmethod
    def _stamps(self, extent: int) -> memoryview:
        """Returns the extent's stamp words, writable, format `Q`."""

    def _stamp(self, slot: Slot, index: int) -> None:
        stamps, stamp = self._stamps(slot.extent), self._stamp_of(slot)
        if self._slot_bytes[slot.extent] != slot.size_bytes:
            # Slots of another size overlap several old ones, whose stamp words need not be those of the new slots.
            stamps[:] = memoryview(array("Q", (stamp,)) * len(stamps))
            self._slot_bytes[slot.extent] = slot.size_bytes
        elif stamps[index] < stamp:
            stamps[index] = stamp
        write_fence()

    def _stamp_of(self, slot: Slot) -> int:
        return self._first_stamp + 2 * slot.generation


def void(stamps: memoryview) -> None:
    """Invalidates every place in an extent, before any later write to it."""
    stamps[:] = memoryview(array("Q", bytes(stamps.nbytes)))
    write_fence()
