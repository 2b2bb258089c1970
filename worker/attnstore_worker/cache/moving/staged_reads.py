"""Reads of a load into the blocks of a device with memory of its own: a page is read into staging, verified, and copied up.

Owns: the copies up of running loads. Invariants: a page that is not complete and verified is never copied up; a read has ended
only when the copies of all its pages have, so a block that arrived has its page, and a block that a cancelled load gives back is
not written any more. While one part is copied up, the next is read.

A read by layers takes slots for all its pages, if half of staging has room for them. Each layer is copied up as soon as it has
arrived, and the engine lets a step wait for the copy of the layer that it needs. Without room the pages are read in parts, and
the layers are reported at the end, as transports without an order of layers do. Pages in the memory of a store node on this host
are copied up from there, all at once, where the device can reach it.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

from attnstore.clock import Clock
from attnstore.core.hashing import BlockHash
from attnstore.types import Lease, PageStatus, ReadResult
from attnstore_worker.cache.moving.load import Load
from attnstore_worker.cache.moving.staging import Staging, part_deadline_ms
from attnstore_worker.cache.pool.device_blocks import DeviceBlocks
from attnstore_worker.cache.pool.tier import Tier
from attnstore_worker.cache.store.base import OnLayer, PageSource
from attnstore_worker.cache.store.shared_copies import SharedCopies
from attnstore_worker.device.base import After, Event, Wait


class StagedReads:
    """Reads of loads into blocks of `pool`, through `staging`, or from a node's memory as `shared` does."""

    def __init__(self, pool: DeviceBlocks, staging: Staging, clock: Clock, shared: SharedCopies | None) -> None:
        self.pool = pool
        self.shared = shared
        self.staging = staging
        self.clock = clock

    def into(self, load: Load, block_ids: Sequence[int]) -> StagedBlocks:
        """Returns the blocks of a load as the target of its reads. Only the engine's thread calls it."""
        return StagedBlocks(self, load, block_ids, self.pool.overwriting(block_ids))


class StagedBlocks:
    """The blocks that one load reads into. `block_ids[i]` is that of the page `i` of the load. Copies up wait for `after`."""

    def __init__(self, reads: StagedReads, load: Load, block_ids: Sequence[int], after: Sequence[After]) -> None:
        self._pool = reads.pool
        self._staging = reads.staging
        self._shared = reads.shared
        self._clock = reads.clock
        self._load = load
        self._block_ids = block_ids
        self._after = after
        self._layers: list[Event | None] = []
        self._last: Event | None = None

    def read(
        self, source: PageSource, hashes: Sequence[BlockHash], part: slice, lease: Lease | None, on_layer: OnLayer | None
    ) -> ReadResult:
        """Reads the pages with these names into this part of the blocks. Pages for which the load found no slots in time are
        INCOMPLETE. `on_layer` as in `PageStore.read`. Raises `DeviceLost`.
        """
        block_ids = self._block_ids[part]
        try:
            result = self._read_shared(hashes, block_ids, lease)
            if result is not None and on_layer is None:
                return result
            if on_layer is None:
                return self._read_parts(source, hashes, block_ids, lease)
            if result is None and (slots := self._staging.take_at_once(len(block_ids))):
                return self._read_layers(source, hashes, block_ids, slots, lease, on_layer)
            result = result or self._read_parts(source, hashes, block_ids, lease)
        finally:
            self._wait_copied()
            self._pool.times.tell()
        for layer in range(self._pool.layout.layers):
            on_layer(layer, result.leading_hits)
        return result

    def order_layer(self, layer: int) -> None:
        """Lets the step that runs now wait for the copy of a layer that has arrived."""
        if layer < len(self._layers) and (event := self._layers[layer]) is not None:
            self._pool.device.compute.wait(event, Wait.COMPUTE_AFTER_UP)

    def _read_shared(self, hashes: Sequence[BlockHash], block_ids: Sequence[int], lease: Lease | None) -> ReadResult | None:
        """Returns None if the pages do not lie in memory that the device can reach."""
        if self._shared is None or lease is None:
            return None
        deadline_ms = max(1.0, self._load.due_ms - self._clock.now_ms())
        return self._shared.read(
            hashes, block_ids, lease, deadline_ms=deadline_ms, after=self._after, is_wanted=lambda: self._load.running
        )

    def _read_parts(
        self, source: PageSource, hashes: Sequence[BlockHash], block_ids: Sequence[int], lease: Lease | None
    ) -> ReadResult:
        statuses: list[PageStatus] = []
        result, bytes_read = ReadResult((), 0), 0
        while len(statuses) < len(hashes) and self._load.running:
            part = slice(len(statuses), len(statuses) + self._staging.part_pages)
            slots = self._staging.take(len(hashes[part]), self._gives_up)
            if not slots:
                break
            result = self._read_part(source, hashes[part], block_ids[part], slots, lease)
            statuses += result.statuses
            bytes_read += result.bytes_read
            if not any(status.is_hit for status in result.statuses):  # further reads would only wait
                break
        statuses += [PageStatus.INCOMPLETE] * (len(hashes) - len(statuses))
        return ReadResult(tuple(statuses), bytes_read, result.error, result.transport)

    def _read_part(
        self,
        source: PageSource,
        hashes: Sequence[BlockHash],
        block_ids: Sequence[int],
        slots: Sequence[int],
        lease: Lease | None,
    ) -> ReadResult:
        copied = None
        try:
            buffers = [self._staging.pages.page(slot) for slot in slots]
            result = source.read(hashes, buffers, lease, deadline_ms=self._deadline_ms(len(slots)))
            hits = [index for index, status in enumerate(result.statuses) if status.is_hit]
            if hits and self._load.running:
                copied = self._submit([slots[hit] for hit in hits], [block_ids[hit] for hit in hits])
            return result
        finally:
            self._staging.give_back(slots, copied)

    def _read_layers(
        self,
        source: PageSource,
        hashes: Sequence[BlockHash],
        block_ids: Sequence[int],
        slots: Sequence[int],
        lease: Lease | None,
        on_layer: OnLayer,
    ) -> ReadResult:
        layers = self._pool.layout.layers
        copied: list[int] = []  # the number of leading pages of which each layer was copied

        def copy_layer(layer: int, pages: int) -> None:
            event = self._submit(slots[:pages], block_ids[:pages], range(layer, layer + 1)) if pages else None
            copied.append(pages)
            self._layers.append(event)
            on_layer(layer, pages)

        try:
            buffers = [self._staging.pages.page(slot) for slot in slots]
            deadline_ms = self._deadline_ms(len(slots))
            result = source.read(hashes, buffers, lease, deadline_ms=deadline_ms, on_layer=copy_layer)
            copied += [0] * (layers - len(copied))
            hits = [index for index, status in enumerate(result.statuses) if status.is_hit]
            for pages, same in groupby(range(layers), copied.__getitem__):  # not again, because a step may read what was copied
                lacking, run = [hit for hit in hits if hit >= pages], list(same)
                if lacking:
                    layers_lacking = range(run[0], run[-1] + 1)
                    self._submit([slots[hit] for hit in lacking], [block_ids[hit] for hit in lacking], layers_lacking)
            return result
        finally:
            self._staging.give_back(slots, self._last)

    def _submit(self, slots: Sequence[int], block_ids: Sequence[int], layers: range | None = None) -> Event:
        """Submits copies up, the first ones after what the blocks wait for: later ones of the load follow them in order."""
        self._last = copy = self._pool.copies.up(self._staging.pages.tensor, slots, block_ids, after=self._after, layers=layers)
        self._after = ()
        self._pool.times.submitted(copy, Tier.REMOTE, len(slots), None if layers is None else len(layers))
        return copy

    def _wait_copied(self) -> None:
        if self._last is not None:
            self._last.wait(Wait.ARRIVED_AFTER_UP if self._load.running else Wait.RELEASED_AFTER_UP)

    def _deadline_ms(self, pages: int) -> float:
        left_ms = self._load.due_ms - self._clock.now_ms()
        return max(1.0, min(left_ms, part_deadline_ms(pages * self._pool.layout.page_bytes)))

    def _gives_up(self) -> bool:
        return not self._load.running or self._clock.now_ms() > self._load.due_ms
