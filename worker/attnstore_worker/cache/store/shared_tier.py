"""The SHARED tier: pages in the memory of a store node on this host, used where they lie.

Owns: `SharedTier`, which turns pages of a store into blocks of the worker's `PageWindow`, and `SharedPages`, one sequence's hold on
such blocks. Invariant: a block id stands for its page as long as `SharedPages.intact` says so *after* the bytes were used; a
page that was recycled, a lease that was lost and a node that is gone make it False or leave it True with the right bytes in place.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Sequence
from typing import Any, Final, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from attnstore.client.transports.mapped import MappedExtent, PageViews
from attnstore.core.hashing import BlockHash, Namespace
from attnstore.fences import read_fence
from attnstore.types import Lease, PageStatus
from attnstore.wire.shared import Place
from attnstore_worker.cache.pool.page_window import PageWindow
from attnstore_worker.cache.store.leases import KeptLease, LeaseKeeper, LeaseStore
from attnstore_worker.cache.store.remote import LEASE_MARGIN_MS

_LOG = logging.getLogger(__name__)

RENEW_PERIOD_MS: Final = LEASE_MARGIN_MS / 2
"""Every lease that the worker takes is longer than the margin."""


@runtime_checkable
class SharedStore(LeaseStore, Protocol):
    """What the tier needs of a store, beside what REMOTE needs: `attnstore.Client` is one."""

    def view(self, namespace: bytes, hashes: Sequence[bytes], /, *, lease: Lease, deadline_ms: float) -> PageViews:
        """The pages where they lie. Raises where the node is not on this host or offers no shared memory."""
        ...


class SharedPages:
    """The pages of one sequence that lie in a node's memory. `block_ids` name them in the window until `SharedTier.release`."""

    def __init__(self, block_ids: tuple[int, ...], places: Sequence[tuple[Place, MappedExtent]], lease: KeptLease) -> None:
        self.block_ids = block_ids
        self.lease = lease
        by_extent: defaultdict[MappedExtent, list[Place]] = defaultdict(list)
        for place, extent in places:
            by_extent[extent].append(place)
        # The extents are what keeps the memory mapped.
        self._stamps = [(extent, *_stamps(extent, stamped)) for extent, stamped in by_extent.items()]

    def intact(self) -> bool:
        """Whether every page's bytes are still its own, and its lease not known to be lost. To be asked after use."""
        read_fence()
        return not self.lease.lost and all(bool((words[at] == stamps).all()) for _, words, at, stamps in self._stamps)


class SharedTier:
    """Pages of one namespace in the memory of `store`'s node. To be called from any thread."""

    def __init__(self, store: SharedStore, namespace: Namespace, window: PageWindow, page_bytes: int, *, deadline_ms: int) -> None:
        self._store = store
        self._namespace = namespace
        self._window = window
        self._page_bytes = page_bytes
        self._deadline_ms = deadline_ms
        self._leases = LeaseKeeper(store, period_ms=RENEW_PERIOD_MS)
        self._refusals: set[str] = set()

    def borrow(self, hashes: Sequence[BlockHash], lease: Lease) -> SharedPages | None:
        """The pages in place, all of them, and the lease's further life; None, and the lease is still the caller's, where that
        cannot be: the node is elsewhere or does not answer, a page is gone or lies off the window's grid.
        """
        try:
            views = self._store.view(self._namespace, hashes, lease=lease, deadline_ms=self._deadline_ms)
        except Exception as error:  # whatever a store does, the pages are copied or computed instead
            self._note(f"pages cannot be used in place: {error}")
            return None
        places = [page for page in views.located if not isinstance(page, PageStatus)]
        block_ids = [self._page_of(*page) for page in places]
        if len(places) < len(hashes) or None in block_ids:
            return None
        return SharedPages(tuple(page for page in block_ids if page is not None), places, self._leases.keep(lease))

    def release(self, pages: SharedPages) -> None:
        """Ends a sequence's hold; its lease is released soon."""
        self._leases.let_go(pages.lease)

    def close(self) -> None:
        """Releases all leases, soon."""
        self._leases.close()

    def _page_of(self, place: Place, extent: MappedExtent) -> int | None:
        return self._window.page_of(extent, place.offset_bytes) if place.size_bytes == self._page_bytes else None

    def _note(self, refusal: str) -> None:
        """Logs a reason once: it is usually where the node is, which does not change."""
        if refusal not in self._refusals:
            self._refusals.add(refusal)
            _LOG.warning("%s", refusal)


_Words = npt.NDArray[np.uint64]


def _stamps(extent: MappedExtent, places: Sequence[Place]) -> tuple[_Words, npt.NDArray[Any], _Words]:
    """The extent's stamp words, where among them those of the places are, and what these must still say."""
    words = np.frombuffer(extent.stamps, dtype=np.uint64)
    at = np.array([extent.stamp_index(place) for place in places], dtype=np.int64)
    return words, at, np.array([place.stamp for place in places], dtype=np.uint64)
