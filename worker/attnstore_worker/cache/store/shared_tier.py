"""The SHARED tier: pages in the memory of a store node on this host, used in place.

Owns: `SharedTier`, which turns pages of a store into blocks of the worker's `PageWindow`, and `SharedPages`, one sequence's use of
such blocks. Invariant: the used bytes are those of their pages if `SharedPages.intact` is true *after* the use, even if a page was
recycled, a lease was lost or the node ended meanwhile.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from attnstore.client.transports.mapped import MappedExtent, MappedPage
from attnstore.core.hashing import BlockHash, Namespace
from attnstore.fences import read_fence
from attnstore.types import Lease, PageStatus
from attnstore_worker.cache.pool.page_window import PageWindow
from attnstore_worker.cache.store.base import SharedStore
from attnstore_worker.cache.store.leases import KeptLease, LeaseKeeper
from attnstore_worker.cache.store.remote import LEASE_MARGIN_MS

_LOG = logging.getLogger(__name__)

RENEW_PERIOD_MS: Final = LEASE_MARGIN_MS / 2
"""Shorter than any lease of the worker, because a lease is longer than the margin."""


class SharedPages:
    """The pages of one sequence in a node's memory: `LentBlocks` of the window. `let_go` ends the lease."""

    def __init__(
        self, block_ids: tuple[int, ...], pages: Sequence[MappedPage], lease: KeptLease, let_go: Callable[[KeptLease], None]
    ) -> None:
        self.block_ids = block_ids
        self.lease = lease
        self._let_go = let_go
        by_extent: defaultdict[MappedExtent, list[MappedPage]] = defaultdict(list)
        for page in pages:
            by_extent[page[1]].append(page)
        # The extents keep the memory mapped.
        self._stamps = [(extent, *_stamps(extent, stamped)) for extent, stamped in by_extent.items()]

    def intact(self) -> bool:
        """Returns whether every page's bytes are still its own, and its lease is not known to be lost. Called after use."""
        read_fence()
        return not self.lease.lost and all(bool((words[at] == stamps).all()) for _, words, at, stamps in self._stamps)

    def release(self) -> None:
        """Ends the sequence's use; the lease is released soon."""
        self._let_go(self.lease)


class SharedTier:
    """Pages of one namespace in the memory of `store`'s node. Thread-safe."""

    def __init__(self, store: SharedStore, namespace: Namespace, window: PageWindow, page_bytes: int, *, deadline_ms: int) -> None:
        self._store = store
        self._namespace = namespace
        self._window = window
        self._page_bytes = page_bytes
        self._deadline_ms = deadline_ms
        self._leases = LeaseKeeper(store, period_ms=RENEW_PERIOD_MS)
        self._refusals: set[str] = set()

    def borrow(self, hashes: Sequence[BlockHash], lease: Lease) -> SharedPages | None:
        """Returns all the pages in place; the lease is kept until they are released. Returns None, and the caller keeps the lease,
        if the node is on another host or does not answer, or a page is gone or not aligned to the window's blocks.
        """
        try:
            views = self._store.view(self._namespace, hashes, lease=lease, deadline_ms=self._deadline_ms)
        except Exception as error:  # whatever a store does, the pages are copied or computed instead
            self._note(f"pages cannot be used in place: {error}")
            return None
        pages = [page for page in views.located if not isinstance(page, PageStatus)]
        block_ids = [block_id for page in pages if (block_id := self._block_id_of(page)) is not None]
        if len(block_ids) < len(hashes):
            return None
        return SharedPages(tuple(block_ids), pages, self._leases.keep(lease), self._leases.let_go)

    def close(self) -> None:
        """Releases all leases, soon."""
        self._leases.close()

    def _block_id_of(self, page: MappedPage) -> int | None:
        place, extent = page
        return self._window.page_of(extent, place.offset_bytes) if place.size_bytes == self._page_bytes else None

    def _note(self, refusal: str) -> None:
        """Logs each reason once. The usual one, a node on another host, does not change."""
        if refusal not in self._refusals:
            self._refusals.add(refusal)
            _LOG.warning("%s", refusal)


_Words = npt.NDArray[np.uint64]


def _stamps(extent: MappedExtent, pages: Sequence[MappedPage]) -> tuple[_Words, npt.NDArray[Any], _Words]:
    """Returns the extent's stamp words, the indices of the pages' stamps in them, and the expected values."""
    words = np.frombuffer(extent.stamps, dtype=np.uint64)
    at = np.array([extent.stamp_index(place) for place, _ in pages], dtype=np.int64)
    return words, at, np.array([place.stamp for place, _ in pages], dtype=np.uint64)
