"""Copies from the memory of a store node on this host to the blocks of a device, without staging.

Owns: `SharedCopies`, which registers the mapped extents of the node with the device. Invariants: a page counts only if its stamp is
unchanged after its copy has ended; the lease and the mapping outlive every copy. An extent that the device does not register, or
whose registration has not ended, is read through staging, as are pages of a store that lends none.
"""

from __future__ import annotations

import ctypes
import logging
import math
import threading
import weakref
from collections import defaultdict
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from attnstore.client.transports.mapped import MappedExtent, MappedPage
from attnstore.core.hashing import BlockHash, Namespace
from attnstore.errors import InvalidArgument
from attnstore.types import Lease, PageStatus, ReadResult
from attnstore_worker.cache.pool.device_blocks import DeviceBlocks
from attnstore_worker.cache.pool.tier import Tier
from attnstore_worker.cache.store.base import SharedStore
from attnstore_worker.cache.store.remote import RemoteTier
from attnstore_worker.device.base import After, Copy, Wait
from attnstore_worker.dtypes import TORCH_DTYPES

_LOG = logging.getLogger(__name__)

_Located = tuple[Tensor, int, MappedPage]


class SharedCopies:
    """Copies of pages of one namespace in `store`'s node to `pool`. `remote` counts them. Thread-safe."""

    def __init__(self, store: SharedStore, namespace: Namespace, pool: DeviceBlocks, remote: RemoteTier) -> None:
        self._store = store
        self._namespace = namespace
        self._pool = pool
        self._remote = remote
        self._refused = False
        self._lock = threading.Lock()
        self._extents: weakref.WeakKeyDictionary[MappedExtent, Tensor | None] = weakref.WeakKeyDictionary()

    def read(
        self,
        hashes: Sequence[BlockHash],
        block_ids: Sequence[int],
        lease: Lease,
        *,
        deadline_ms: float,
        after: Sequence[After],
        is_wanted: Callable[[], bool],
    ) -> ReadResult | None:
        """Copies all pages up, and returns when the copies have ended; pages that `is_wanted` then denies are INCOMPLETE. Returns
        None, without effect, if not all of them lie in registered memory. The read counts as long as finding the pages and the
        copies take, without what the copies wait for. Raises `DeviceLost`.
        """
        started_ms = self._remote.now_ms()
        pages = self._located(hashes, lease, deadline_ms)
        if pages is None:
            return None
        by_memory: defaultdict[Tensor, list[int]] = defaultdict(list)
        for index, (memory, _, _) in enumerate(pages):
            by_memory[memory].append(index)
        found_ms = self._remote.now_ms()
        statuses = [PageStatus.INCOMPLETE] * len(hashes)
        copies: list[Copy] = []
        try:
            for memory, indices in by_memory.items():
                slots, targets = [pages[index][1] for index in indices], [block_ids[index] for index in indices]
                copies.append(self._pool.copies.up(memory, slots, targets, after=after))
            if copies and is_wanted():
                copies[-1].wait(Wait.STAMPS_AFTER_UP)
                for index, (_, _, (place, extent)) in enumerate(pages):
                    statuses[index] = PageStatus.OK if extent.holds(place) else PageStatus.MISSING
        finally:
            if copies:
                copies[-1].wait(Wait.SHARED_RELEASED_AFTER_UP)
        hits = sum(status.is_hit for status in statuses)
        result = ReadResult(tuple(statuses), hits * self._pool.layout.page_bytes, transport="shm")
        copied_ms = sum(copy.elapsed_ms() or 0.0 for copy in copies)
        self._remote.note_read(started_ms, result, tier=Tier.SHARED, ended_ms=found_ms + copied_ms)
        return result

    def _located(
        self, hashes: Sequence[BlockHash], lease: Lease, deadline_ms: float
    ) -> list[tuple[Tensor, int, MappedPage]] | None:
        """Returns for each page its memory, its slot there, and its place."""
        if self._refused:
            return None
        try:
            views = self._store.view(self._namespace, hashes, lease=lease, deadline_ms=deadline_ms)
        except Exception as error:  # whatever a store does, the pages are read through staging instead
            self._refused = isinstance(error, InvalidArgument)  # the node is not on this host, or offers no memory
            _LOG.info("pages are not copied from a node's memory: %s", error)
            return None
        pages: list[_Located] = []
        page_bytes = self._pool.layout.page_bytes
        for located in views.located:
            if isinstance(located, PageStatus) or located[0].size_bytes != page_bytes or located[0].offset_bytes % page_bytes:
                return None
            memory = self._registered(located[1])
            if memory is None:
                return None
            pages.append((memory, located[0].offset_bytes // page_bytes, located))
        return pages

    def _registered(self, extent: MappedExtent) -> Tensor | None:
        """Returns the pages of an extent, `[slots, *layout.shape]`; None if the device refuses it, or registers it just now."""
        with self._lock:
            if extent in self._extents:
                return self._extents[extent]
            self._extents[extent] = None
        layout, device = self._pool.layout, self._pool.device
        slots = extent.size_bytes // layout.page_bytes
        mapped = (ctypes.c_char * (slots * layout.page_bytes)).from_address(extent.address)
        flat = torch.frombuffer(mapped, dtype=TORCH_DTYPES[layout.dtype], count=slots * math.prod(layout.shape))
        memory = flat.view(slots, *layout.shape)
        if not device.register(memory):
            _LOG.warning("%s does not register a node's memory; its pages are read through staging", device.name)
            return None
        weakref.finalize(extent, device.unregister, memory).atexit = False  # runs before the extent is unmapped
        with self._lock:
            self._extents[extent] = memory
        return memory
