"""Copies of small pages: one transfer of many pages into a buffer on the device, and one kernel that scatters them to their blocks.

Owns: `StagedCopies`, with a `PageBuffer` for each direction. Invariants: a buffer never holds more than `STAGED_BYTES` of pages.
All that reads or writes a buffer is on one stream, so nothing waits for it.

A transfer of a small page takes the copy engine about as long as its start. Pages in neighbouring slots are one transfer here,
whichever blocks they belong to. The kernel then moves them at the speed of the device's own memory, many times that of the bus.
Shape: the device buffer of LMCache's GPU connectors.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterable, Sequence
from typing import Final

import torch
from torch import Tensor

from attnstore.limits import MIB
from attnstore_worker.device.base import After, Copy, Event
from attnstore_worker.device.copies_direct import CopyStream, require_indices, transfer, wait_for

STAGED_BYTES: Final = 32 * MIB
"""Some hundred microseconds of transfer, beside which the starts of a transfer and a kernel are small."""


class PageBuffer:
    """A buffer for pages of `shape` and `dtype` on the device, at most `pages_max` of them, with the ids of their blocks."""

    def __init__(self, pages_max: int, shape: Sequence[int], dtype: torch.dtype, place: torch.device, stream: CopyStream) -> None:
        page_bytes = math.prod(shape) * dtype.itemsize
        capacity = min(pages_max, max(1, STAGED_BYTES // page_bytes))
        with stream.submitting():
            self.pages = torch.empty(capacity, *shape, dtype=dtype, device=place)
            self._ids = torch.empty(capacity, dtype=torch.int32, device=place)
        self.stream = stream
        self.lock = threading.Lock()

    def ids(self, block_ids: Sequence[int]) -> Tensor:
        """Submits the copy of these ids to the device, and returns them there as int32."""
        on_device = self._ids[: len(block_ids)]
        # torch keeps pinned memory of its own from being used again before the copy is done.
        pinned = torch.tensor(block_ids, dtype=torch.int32, pin_memory=on_device.is_cuda)
        return on_device.copy_(pinned, non_blocking=True)

    def up(
        self,
        host: Tensor,
        slots: Sequence[int],
        block_ids: Sequence[int],
        after: Iterable[After],
        scatter: Callable[[Tensor, Tensor], None],
    ) -> Copy:
        """Copies pages from slots to the buffer, from where `scatter(pages, ids)` writes them to their blocks."""

        def submit() -> None:
            for begin in range(0, len(slots), len(self.pages)):
                part = slice(begin, begin + len(self.pages))
                ids = self.ids(block_ids[part])
                transfer(host, slots[part], self.pages, range(len(ids)), None)
                scatter(self.pages[: len(ids)], ids)

        with self.lock:
            wait_for(self.stream, after)
            return self.stream.timed(submit)


class StagedCopies:
    """See `Copies`. `blocks` is `[capacity, *layout.shape]` in the memory of the device. `scatter(pages, block_ids, blocks)` writes
    packed pages to their blocks, `gather(blocks, block_ids, pages)` packs them; both are kernels of the current stream.
    """

    def __init__(
        self,
        blocks: Tensor,
        up: CopyStream,
        down: CopyStream,
        scatter: Callable[[Tensor, Tensor, Tensor], None],
        gather: Callable[[Tensor, Tensor, Tensor], Tensor],
    ) -> None:
        self._blocks = blocks
        self._up, self._down = (
            PageBuffer(len(blocks), blocks.shape[1:], blocks.dtype, blocks.device, stream) for stream in (up, down)
        )
        self._scatter = scatter
        self._gather = gather

    def up(
        self,
        host: Tensor,
        slots: Sequence[int],
        block_ids: Sequence[int],
        *,
        after: Iterable[After] = (),
        layers: range | None = None,
    ) -> Copy:
        """See `Copies.up`. Raises `IndexError`. Some layers of a page go to the block at once: they are apart in host memory, so
        the buffer would save no transfer.
        """
        require_indices(host, slots, self._blocks, block_ids)
        buffer = self._up
        if layers is None:
            return buffer.up(host, slots, block_ids, after, lambda pages, ids: self._scatter(pages, ids, self._blocks))
        with buffer.lock:
            wait_for(buffer.stream, after)
            return buffer.stream.timed(lambda: transfer(host, slots, self._blocks, block_ids, layers))

    def down(self, block_ids: Sequence[int], host: Tensor, slots: Sequence[int], *, after: Iterable[After] = ()) -> Event:
        """See `Copies.down`. Raises `IndexError`."""
        require_indices(host, slots, self._blocks, block_ids)
        buffer = self._down
        with buffer.lock:
            wait_for(buffer.stream, after)
            with buffer.stream.submitting():
                for begin in range(0, len(slots), len(buffer.pages)):
                    part = slice(begin, begin + len(buffer.pages))
                    ids = buffer.ids(block_ids[part])
                    self._gather(self._blocks, ids, buffer.pages[: len(ids)])
                    transfer(buffer.pages, range(len(ids)), host, slots[part], None)
            return buffer.stream.record()
