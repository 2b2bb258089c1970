"""A first measurement of the link, so that the gate knows it before the first request does.

Owns: one page of zeros in the namespace of this engine's own pages, under a name that no block has, so that no tenant depends on
what another tenant may do. The page is written once and read a few times. The first read opens the connection and, over shm, maps
an extent. No later read has to, so the first one says nothing about the link and is left out. A slow link is read once more only,
because the engine computes meanwhile.
"""

from __future__ import annotations

from typing import Final

from attnstore.clock import Clock, Deadline
from attnstore.core.hashing import BlockHash, Namespace, block_hash
from attnstore.core.layout import PageLayout
from attnstore_worker.cache.planning.observation import Unobserved
from attnstore_worker.cache.store.base import PageStore
from attnstore_worker.cache.store.remote import RemoteTier
from attnstore_worker.cache.store.transfer import Transfer, TransferKind

_READS: Final = 3
_SLOW_MS: Final = 300.0
"""One read that takes so long says enough."""
_NAME: Final = b"attnstore-link-probe"


class _Reads(Unobserved):
    """Records the reads that found their page."""

    def __init__(self) -> None:
        self.found: list[Transfer] = []

    def transferred(self, transfer: Transfer) -> None:
        """Records the transfer if it is one."""
        if transfer.kind is TransferKind.READ and transfer.pages:
            self.found.append(transfer)


def probe_link(store: PageStore, space: Namespace, layout: PageLayout, clock: Clock, *, deadline_ms: float) -> tuple[Transfer, ...]:
    """Returns a few reads of a page, without the first one; none if the store fails. `deadline_ms` bounds all calls together."""
    deadline, reads = Deadline(clock, deadline_ms), _Reads()
    tier = RemoteTier(store, space, layout, deadline_ms=deadline_ms, clock=clock, observer=reads)
    names = [BlockHash(block_hash(space, (), (_NAME,)))]
    pages = [memoryview(bytearray(layout.page_bytes))]
    tier.write(names, pages)
    while len(reads.found) <= _READS and not deadline.is_over:
        before = len(reads.found)
        tier.read(names, pages, None, deadline_ms=deadline.left_ms())
        if len(reads.found) == before or (before and _took_ms(reads.found[-1]) > _SLOW_MS):
            break
    return tuple(reads.found[1:])


def _took_ms(read: Transfer) -> float:
    return read.ended_ms - read.started_ms
