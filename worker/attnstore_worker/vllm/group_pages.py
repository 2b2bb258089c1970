"""Where the pages of one group lie: vLLM's blocks, the staging memory of loads, and the pages that wait to be written.

Owns: `GroupLoads` and `GroupSaves`, the seam between pages and blocks. A page is some blocks one after the other, so its copies are
those of blocks to and from as many slots. Invariants: staging memory is used by one load at a time; a slot is used again only when
its page was written.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from attnstore.core.hashing import BlockHash
from attnstore.core.layout import PageLayout
from attnstore.types import PageStatus
from attnstore_worker.cache.store.remote import RemoteTier
from attnstore_worker.device.base import After, Device, EngineCopies, Event
from attnstore_worker.device.engine_blocks import EngineBlocks
from attnstore_worker.device.pages import HostPages
from attnstore_worker.vllm.plan import NO_BLOCK


class GroupStore(NamedTuple):
    """A group's pages in the store, and its blocks in vLLM. `block_layout`: that of a block; `layout`: that of a page, which has
    `page_blocks`. A step completes at most `step_pages`. A load takes only one of `page_parts` equal parts of a page's heads, and
    `block_layout` is that of this part.
    """

    tier: RemoteTier
    blocks: EngineBlocks
    block_layout: PageLayout
    layout: PageLayout
    page_blocks: int
    step_pages: int
    page_part: int = 0
    page_parts: int = 1


@dataclass(eq=False, slots=True)
class Staging:
    """Memory of a load, in two halves: one part arrives in one half while the other is copied into blocks. `pages` arrive; `blocks`
    are copied, in the same memory unless a load takes a part of each page. `copied`: the last copy of each half.
    """

    pages: HostPages
    blocks: Tensor
    copied: list[Event | None] = field(default_factory=lambda: [None, None])


class GroupLoads:
    """Brings pages into blocks of `device`, in parts of `part_bytes`."""

    def __init__(self, own: GroupStore, device: Device, copies: EngineCopies, *, part_bytes: int) -> None:
        self.tier = own.tier
        self.layout = own.layout
        self.part_pages = max(1, part_bytes // own.layout.page_bytes)
        self._own = own
        self._device = device
        self._copies = copies
        self._staging: deque[Staging] = deque()  # of the loads that have ended: new memory must be zeroed first

    def take_staging(self) -> Staging:
        """Returns memory for a load."""
        if self._staging:
            return self._staging.pop()
        own, pages = self._own, 2 * self.part_pages
        if own.page_parts == 1:
            arrive = self._device.host_pages(own.layout, pages * own.layout.page_bytes)
            return Staging(arrive, by_block(arrive, own))
        taken = self._device.host_pages(own.block_layout, pages * own.page_blocks * own.block_layout.page_bytes)
        return Staging(HostPages(own.layout, pages * own.layout.page_bytes), taken.tensor)

    def put_staging(self, staging: Staging) -> None:
        """Takes memory back from a load that has ended."""
        self._staging.append(staging)

    def half(self, staging: Staging, half: int) -> list[memoryview]:
        """Returns the pages of one half."""
        return [staging.pages.page(half * self.part_pages + index) for index in range(self.part_pages)]

    def half_of(self, part: range) -> int:
        """Returns the half that a part of a load arrives in."""
        return part.start // self.part_pages % 2

    def arrives(self, staging: Staging, part: range) -> None:
        """Tells the device that the host writes a part."""
        if self._device.accesses is not None:
            self._device.accesses.host(staging.blocks, self._slots(part), writes=True)

    def arrived(self, staging: Staging, part: range) -> None:
        """Takes the rank's heads out of the pages of a part, if they have those of other ranks too."""
        own = self._own
        if own.page_parts > 1:
            slots = slice(self._slots(part)[0], self._slots(part)[-1] + 1)
            rows, layers = len(staging.blocks), own.layout.layers
            whole = staging.pages.tensor.view(torch.uint8).view(rows, layers, own.page_parts, -1)
            taken = staging.blocks.view(torch.uint8).view(rows, layers, -1)
            taken[slots].copy_(whole[slots, :, own.page_part])

    def load(self, staging: Staging, part: range, block_ids: Sequence[int], *, after: Sequence[After]) -> Event | None:
        """Copies a part into its blocks, but for `NO_BLOCK`. Returns None if there are none. See `EngineCopies.load`."""
        wanted = [(slot, block_id) for slot, block_id in zip(self._slots(part), block_ids, strict=True) if block_id != NO_BLOCK]
        if not wanted:
            return None
        slots, block_ids = zip(*wanted, strict=True)
        event = self._copies.load(staging.blocks, slots, block_ids, after=after)
        staging.copied[self.half_of(part)] = event
        return event

    def _slots(self, part: range) -> Sequence[int]:
        begin = self.half_of(part) * self.part_pages
        return block_slots(range(begin, begin + len(part)), self._own)


class GroupSaves:
    """Copies pages out of blocks of `device`, and writes them. Pages that wait have `save_bytes`, and room for at least one."""

    def __init__(self, own: GroupStore, device: Device, copies: EngineCopies, *, save_bytes: int) -> None:
        self._own = own
        self._device = device
        self._copies = copies
        save_bytes = max(save_bytes, own.layout.page_bytes)
        # Without a registration, memory that no page has used yet need not be there.
        self._pages = HostPages(own.layout, save_bytes) if device.addressable else device.host_pages(own.layout, save_bytes)
        self._blocks = by_block(self._pages, own)
        self._free = list(range(self._pages.capacity - 1, -1, -1))

    @property
    def pages_max(self) -> int:
        """How many pages may wait to be written."""
        return self._pages.capacity

    def take_slots(self, pages: int) -> list[int]:
        """Returns slots for pages that are saved, as many as are free."""
        return [self._free.pop() for _ in range(min(pages, len(self._free)))]

    def free_slots(self, slots: Sequence[int]) -> None:
        """Takes slots back."""
        self._free += slots

    def save(self, block_ids: Sequence[int], slots: Sequence[int]) -> Event:
        """Copies the blocks of pages into slots. See `EngineCopies.save`."""
        return self._copies.save(block_ids, self._blocks, block_slots(slots, self._own))

    def write(self, names: Sequence[BlockHash], slots: Sequence[int], *, deadline_ms: float) -> set[PageStatus]:
        """Writes saved pages. Returns the verdicts of those that the store did not keep."""
        if self._device.accesses is not None:
            self._device.accesses.host(self._blocks, block_slots(slots, self._own), writes=False)
        verdicts = self._own.tier.write(names, [self._pages.page(slot) for slot in slots], deadline_ms=deadline_ms).verdicts
        return {verdict for verdict in verdicts if not verdict.is_kept} - {PageStatus.ARRIVING}


def by_block(pages: HostPages, own: GroupStore) -> Tensor:
    """Returns the memory of pages, a row for each block."""
    return pages.tensor.view(-1, *own.block_layout.shape)


def block_slots(slots: Sequence[int], own: GroupStore) -> Sequence[int]:
    """Returns the rows of the blocks of pages in these slots."""
    each = own.page_blocks
    return slots if each == 1 else [slot * each + block for slot in slots for block in range(each)]
