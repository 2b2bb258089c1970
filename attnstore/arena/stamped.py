"""What every arena has that readers on this host map: stamps beside the bytes, and extents to hand out.

Owns: the rule by which stamps change. Where the words lie is the subclass's: behind the data of each extent, as
`attnstore.wire.shm.ExtentLayout` says.
Invariants: a slot's stamp changes before the first byte of a new generation can be written, because nobody gets the slot's window
without it; a slot that is withdrawn has a stamp that no page was ever located with. (A generation has two stamps, one for each.)

Why stamps in the file: a reader needs no call to learn that a page it uses in place is still the page. Both sides fence
(`attnstore.fences`), because no lock lies between two processes.
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
    """Which bytes of its file an extent is. Both are multiples of what the file can be mapped at."""

    offset_bytes: int
    size_bytes: int


class StampedArena(Arena):
    """An arena whose extents other processes may map. `first_stamp` is what the stamps of this node's life begin at: memory that
    outlives the node must not show a stamp twice.
    """

    def __init__(self, capacity_bytes: int, extent_bytes: int, *, first_stamp: int = 0) -> None:
        super().__init__(capacity_bytes, extent_bytes)
        self.layout = ExtentLayout(extent_bytes)
        self._first_stamp = first_stamp
        self._slot_bytes = [0] * self.extents

    def view(self, slot: Slot) -> memoryview:
        """See `Arena.view`. The first view of a slot also makes every place that named older bytes of it worthless."""
        window = super().view(slot)
        index = self.layout.stamp_index(slot.offset_bytes)
        if self._stamps(slot.extent)[index] < self._stamp_of(slot):
            with self._changing:
                self._stamp(slot, index)
        return window

    def withdraw(self, slot: Slot) -> None:
        """See `Arena.withdraw`: readers that have the extent mapped learn it by the stamp."""
        stamps, index, stamp = self._stamps(slot.extent), self.layout.stamp_index(slot.offset_bytes), self._stamp_of(slot)
        with self._changing:
            if stamps[index] == stamp:
                stamps[index] = stamp + 1

    def stamp(self, slot: Slot) -> int:
        """What the stamp word of a slot says now. Meaningful for a page that is pinned."""
        return self._stamps(slot.extent)[self.layout.stamp_index(slot.offset_bytes)]

    def descriptor(self, extent: int, tenancy: int) -> int | None:
        """A new read-only descriptor of the extent's file, for the caller to close; None where the tenancy is no longer."""
        with self._changing:
            if not 0 <= extent < self.extents or self._tenancies[extent] != tenancy:
                return None
            return self._open(extent)

    @abstractmethod
    def span(self, extent: int) -> Span:
        """Where in that file the extent is."""

    @abstractmethod
    def _open(self, extent: int) -> int:
        """A new read-only descriptor."""

    @abstractmethod
    def _stamps(self, extent: int) -> memoryview:
        """The extent's stamp words, writable, format `Q`."""

    def _stamp(self, slot: Slot, index: int) -> None:
        stamps, stamp = self._stamps(slot.extent), self._stamp_of(slot)
        if self._slot_bytes[slot.extent] != slot.size_bytes:
            # Slots of another size lie across the old ones, whose stamp words need not be where the new ones begin.
            stamps[:] = memoryview(array("Q", (stamp,)) * len(stamps))
            self._slot_bytes[slot.extent] = slot.size_bytes
        elif stamps[index] < stamp:
            stamps[index] = stamp
        write_fence()

    def _stamp_of(self, slot: Slot) -> int:
        return self._first_stamp + 2 * slot.generation


def void(stamps: memoryview) -> None:
    """Makes every place in an extent worthless, before anything that is written to it from now on."""
    stamps[:] = memoryview(array("Q", bytes(stamps.nbytes)))
    write_fence()
