"""Staging: the pinned host memory through which pages reach a device with memory of its own.

Owns: a fixed number of slots, and their order among loads. Invariants: a slot is free, or taken by exactly one load; a free slot
is given out only after its last copy up. A load has slots only while it reads one part: it gives them back when it has submitted
the copy, with the copy's event, so no load waits for slots while it keeps others.

Slots are given out in the order of the requests, and a request gets all its slots or none, so each part waits for those before it
only. A part is read within the time that a node fairly needs for it (`part_deadline_ms`): a store that stalls keeps the slots of
each load for that long at most, and the load ends then.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from typing import Final

from attnstore.core.layout import PageLayout
from attnstore.limits import MIB, NODE_FAIR_BYTES_PER_MS, NODE_FAIR_MS
from attnstore_worker.device.base import Device, Event, Wait

PART_BYTES: Final = 16 * MIB
PART_PAGES_MAX: Final = 32
"""Pages that a load reads at a time: enough to fill a link, few enough that several loads find room."""
STAGING_PARTS: Final = 8
"""Parts that are read or copied at a time. One load alone uses two: one is copied while the next is read."""
_POLL_S: Final = 0.02
"""How often a request for slots asks whether to give up."""


def part_pages(page_bytes: int) -> int:
    """Returns how many pages of this size a part has, if the pool has as many blocks."""
    return max(1, min(PART_BYTES // page_bytes, PART_PAGES_MAX))


def part_deadline_ms(size_bytes: int) -> float:
    """Returns how long the read of a part of this size may take."""
    return NODE_FAIR_MS + size_bytes / NODE_FAIR_BYTES_PER_MS


class Staging:
    """Slots of `device` for pages of `layout`, on the way to a pool of `blocks`. Thread-safe."""

    def __init__(self, device: Device, layout: PageLayout, blocks: int) -> None:
        self.part_pages = max(1, min(part_pages(layout.page_bytes), blocks))
        self.slots = STAGING_PARTS * self.part_pages
        self.pages = device.host_pages(layout, self.slots * layout.page_bytes)
        self._accesses = device.accesses
        self._free: deque[tuple[int, Event | None]] = deque((slot, None) for slot in range(self.slots))
        self._taken: set[int] = set()
        self._waiting: deque[object] = deque()
        self._changed = threading.Condition()

    @property
    def taken(self) -> int:
        """Slots that loads read into."""
        return len(self._taken)

    @property
    def waiting(self) -> int:
        """Requests that wait for slots."""
        return len(self._waiting)

    def take(self, pages: int, give_up: Callable[[], bool]) -> list[int]:
        """Returns slots for a part of `pages` pages, at most `part_pages`, after the loads that asked before. Returns none if
        `give_up()` is true first. Raises `DeviceLost`.
        """
        assert 0 < pages <= self.part_pages
        request = object()
        with self._changed:
            self._waiting.append(request)
            try:
                while self._waiting[0] is not request or len(self._free) < pages:
                    if give_up():
                        return []
                    self._changed.wait(_POLL_S)
                taken = self._take(pages)
            finally:
                self._waiting.remove(request)
                self._changed.notify_all()
        return self._copied(taken)

    def take_at_once(self, pages: int) -> list[int]:
        """Returns slots for `pages` pages that are read in one piece. Returns none unless they are free now, nobody waits, and half
        of the slots remain for others. Raises `DeviceLost`.
        """
        with self._changed:
            if self._waiting or pages > min(len(self._free), self.slots // 2):
                return []
            taken = self._take(pages)
        return self._copied(taken)

    def give_back(self, slots: Sequence[int], event: Event | None) -> None:
        """Ends the use of slots. They are used again after `event`, of the last copy that reads them."""
        with self._changed:
            self._taken.difference_update(slots)
            self._free.extend((slot, event) for slot in slots)
            self._changed.notify_all()

    def check(self) -> None:
        """Asserts the conservation of slots."""
        with self._changed:
            slots = [*self._taken, *(slot for slot, _ in self._free)]
            assert sorted(slots) == list(range(self.slots)), "free + taken != slots"

    def _take(self, pages: int) -> list[tuple[int, Event | None]]:
        taken = [self._free.popleft() for _ in range(pages)]  # the longest free, whose copies ended first
        self._taken.update(slot for slot, _ in taken)
        return taken

    def _copied(self, taken: Sequence[tuple[int, Event | None]]) -> list[int]:
        """Waits for the last copies of the slots, and returns the slots."""
        slots = [slot for slot, _ in taken]
        try:
            for event in {id(event): event for _, event in taken if event is not None}.values():
                event.wait(Wait.STAGING_AFTER_UP)
            if self._accesses is not None:
                self._accesses.host(self.pages.tensor, slots, writes=True)
        except BaseException:
            self.give_back(slots, None)
            raise
        return slots
