"""Copies from the blocks of an engine through a ring of pages on the device, so that the engine may use its blocks again at once.

Owns: `RingCopies`, and `RunCopies` for blocks that lie in runs. Invariants: the ring never grows; a place of it is written only
after its last page was copied down. The host waits for nothing: a save that is larger than the ring delays the engine's stream by
the copies that do not fit.

The gather is work of the engine's own stream, between the step that completes the blocks and the next one. It moves pages at the
speed of the device's memory; the bus, which is far slower, is used by the copies down beside the next steps.
Shape: the device buffer of LMCache's GPU connectors.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Final, Protocol

import torch
from torch import Tensor

from attnstore_worker.device.base import After, Copies, Event, Stream, Wait
from attnstore_worker.device.copies_direct import CopyStream, require_indices
from attnstore_worker.device.copies_staged import PageBuffer
from attnstore_worker.device.engine_blocks import EngineBlocks

RING_PARTS: Final = 8
"""Parts of a ring that are gathered and copied at a time."""

Gather = Callable[[Sequence[int], range], None]
"""Submits the copies of blocks to these places of the ring, as work of the engine's stream."""
CopyRuns = Callable[[Tensor, Tensor, int, Tensor, Tensor], None]
"""As `attention.triton.gather_runs`."""


class Load(Protocol):
    """As `EngineCopies.load`."""

    def __call__(self, host: Tensor, slots: Sequence[int], block_ids: Sequence[int], *, after: Iterable[After]) -> Event:
        """See `EngineCopies.load`."""
        ...


@dataclass(slots=True)
class _Part:
    places: range
    copied: Event | None = None


class RingCopies:
    """See `EngineCopies`. `ring`: the copies of the ring, which has `places` pages. Raises `IndexError` for a block or slot that
    does not exist.
    """

    def __init__(self, blocks: EngineBlocks, compute: Stream, ring: Copies, places: int, gather: Gather, load: Load) -> None:
        size = max(1, places // RING_PARTS)
        self._blocks = blocks
        self._compute = compute
        self._ring = ring
        self._gather = gather
        self._load = load
        self._part_pages = size
        self._parts = deque(_Part(range(begin, begin + size)) for begin in range(0, places - size + 1, size))

    def load(self, host: Tensor, slots: Sequence[int], block_ids: Sequence[int], *, after: Iterable[After] = ()) -> Event:
        """See `EngineCopies.load`."""
        require_indices(host, slots, self._blocks.parts[0], block_ids)
        return self._load(host, slots, block_ids, after=after)

    def save(self, block_ids: Sequence[int], host: Tensor, slots: Sequence[int]) -> Event:
        """See `EngineCopies.save`."""
        assert block_ids
        require_indices(host, slots, self._blocks.parts[0], block_ids)
        event: Event | None = None
        try:
            for begin in range(0, len(slots), self._part_pages):
                own = slice(begin, begin + self._part_pages)
                event = self._save_part(block_ids[own], host, slots[own])
        except BaseException:
            if event is not None:
                event.wait(Wait.WRITTEN_AFTER_DOWN)
            raise
        assert event is not None
        return event

    def _save_part(self, block_ids: Sequence[int], host: Tensor, slots: Sequence[int]) -> Event:
        part = self._parts[0]
        if part.copied is not None:
            self._compute.wait(part.copied, Wait.GATHER_AFTER_DOWN)
        places = part.places[: len(slots)]
        self._gather(block_ids, places)
        gathered = self._compute.record()
        part.copied = self._ring.down(places, host, slots, after=[(Wait.DOWN_AFTER_GATHER, gathered)])
        self._parts.rotate(-1)
        return part.copied


def ring_places(step_pages: int, page_bytes: int, ring_bytes_max: int) -> int:
    """Returns the pages of a ring: those of a step in whole parts, as far as `ring_bytes_max` allows; at least one page."""
    wanted = -(-step_pages // RING_PARTS) * RING_PARTS
    return max(1, min(wanted, ring_bytes_max // page_bytes))


class RunCopies:
    """Gathers blocks into `ring` and loads them, by kernels: `gather_runs` packs blocks, `scatter_runs` unpacks pages."""

    def __init__(
        self,
        blocks: EngineBlocks,
        ring: Tensor,
        compute: CopyStream,
        up: CopyStream,
        gather_runs: CopyRuns,
        scatter_runs: CopyRuns,
    ) -> None:
        self._compute = compute
        self._buffer = PageBuffer(blocks.blocks, ring.shape[1:], ring.dtype, ring.device, up)
        runs = blocks.runs()
        with compute.submitting():
            self._runs = runs._replace(table=runs.table.to(ring.device))
        compute.record().wait(Wait.UP_AFTER_COMPUTE)  # the table is read on both streams
        self._ring = self._words(ring)
        self._gather_runs = gather_runs
        self._scatter_runs = scatter_runs

    def gather(self, block_ids: Sequence[int], places: range) -> None:
        """See `Gather`."""
        with self._compute.submitting():
            pinned = torch.tensor(block_ids, dtype=torch.int32, pin_memory=self._ring.is_cuda)
            ids = pinned.to(self._ring.device, non_blocking=True)
            self._gather_runs(*self._runs, ids, self._ring[places.start : places.stop])

    def load(self, host: Tensor, slots: Sequence[int], block_ids: Sequence[int], *, after: Iterable[After]) -> Event:
        """See `EngineCopies.load`."""
        return self._buffer.up(host, slots, block_ids, after, self._scatter)

    def _scatter(self, pages: Tensor, ids: Tensor) -> None:
        self._scatter_runs(*self._runs, ids, self._words(pages))

    def _words(self, pages: Tensor) -> Tensor:
        return pages.view(len(pages), -1).view(self._runs.cache.dtype)
