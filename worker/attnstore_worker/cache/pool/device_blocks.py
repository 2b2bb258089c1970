"""The block pool of a device with memory of its own, and what the next copy or step has to wait for.

Owns: the blocks, their copies, and the events of copies between the pool and the tiers inside the worker. Invariants: a step runs
after the copies up of blocks that it may read and after the copies down of evicted blocks that it may overwrite; a copy up into a
block runs after the last step that used the block and after the copy down of its last page; a copy down runs after the steps and
the copies up so far. Loads and writers wait on threads of their own, by events that they get here.

Only the engine's thread calls it, except for `copies` and `times`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence

from torch import Tensor

from attnstore.core.layout import PageLayout
from attnstore_worker.cache.pool.copy_times import CopyTime, CopyTimes
from attnstore_worker.cache.pool.tier import Tier
from attnstore_worker.device.base import After, Device, Event, Wait
from attnstore_worker.device.pages import page_capacity
from attnstore_worker.errors import DeviceLost

_LOG = logging.getLogger(__name__)


def _ignore(time: CopyTime) -> None:
    del time


class DeviceBlocks:
    """`pool_bytes // layout.page_bytes` blocks of `device`; `told` of copies up, as in `CopyTimes`. Raises `PoolTooSmall`, or
    `OutOfDeviceMemory`.
    """

    def __init__(self, device: Device, layout: PageLayout, pool_bytes: int, told: Callable[[CopyTime], None] = _ignore) -> None:
        self.device = device
        self.layout = layout
        self.capacity = page_capacity(layout, pool_bytes)
        self.tensor: Tensor = device.blocks(layout, self.capacity)
        self.attended = self.tensor
        self.copies = device.copies(self.tensor)
        self.times = CopyTimes(told)
        self._computed: Event | None = None
        self._up: Event | None = None
        self._down: dict[int, tuple[int, Event]] = {}  # by evicted block, with the number of the copy
        self._copied_down = 0

    def before_step(self) -> None:
        """Lets `compute` wait for the copies that the next step could meet. Called before every step."""
        self.times.tell()
        if self._up is not None:
            self.device.compute.wait(self._up, Wait.COMPUTE_AFTER_UP)
            self._up = None
        if self._down:
            _, last = max(self._down.values(), key=_number)
            self.device.compute.wait(last, Wait.COMPUTE_AFTER_DOWN)
            self._down.clear()
        self._computed = None

    def computed(self) -> Event:
        """Returns an event after all steps so far."""
        if self._computed is None:
            self._computed = self.device.compute.record()
        return self._computed

    def overwriting(self, block_ids: Iterable[int]) -> list[After]:
        """Returns what a copy up into these blocks waits for. The blocks were allocated, and no later step uses them."""
        after = [(Wait.UP_AFTER_COMPUTE, self.computed())]
        copied = [self._down[block_id] for block_id in block_ids if block_id in self._down]
        if copied:
            after.append((Wait.UP_AFTER_DOWN, max(copied, key=_number)[1]))
        return after

    def copy_up(self, host: Tensor, slots: Sequence[int], block_ids: Sequence[int], after: Iterable[After]) -> None:
        """Copies slots of HOST to blocks that the next step may read. Raises `DeviceLost`."""
        self._up = copy = self.copies.up(host, slots, block_ids, after=after)
        self.times.submitted(copy, Tier.HOST, len(slots))

    def copy_down(self, block_id: int, host: Tensor, slot: int) -> Event | None:
        """Copies an evicted block to a slot. Both may be used again at once. Returns None if the device is lost."""
        after = [(Wait.DOWN_AFTER_COMPUTE, self.computed())]
        if self._up is not None:  # no step has waited for it: it may write this block, or read this slot
            after.append((Wait.HOST_REUSE_AFTER_UP, self._up))
        try:
            event = self.copies.down([block_id], host, [slot], after=after)
        except DeviceLost:
            _LOG.exception("an evicted page was not copied down")
            return None
        self._copied_down += 1
        self._down[block_id] = self._copied_down, event
        return event


def _number(copied: tuple[int, Event]) -> int:
    return copied[0]
