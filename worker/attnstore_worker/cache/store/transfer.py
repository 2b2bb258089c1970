"""The size and duration of one call to a tier.

Owns: `Transfer`, and `TransferObserver`, which receives every one. Invariant: a transfer is over when it is reported.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Protocol

from attnstore_worker.cache.pool.tier import Tier


class TransferKind(enum.Enum):
    """The kind of a call to a tier. The duration of a MATCH is a round trip, because it moves no page. So is that of an ATTEND,
    which opens the pages for later queries on an attend stream. A COPY is one up to the blocks of a device: of pages that lay in
    HOST, or that a READ from REMOTE has put into staging. A COPY_LAYERS is one of some layers of pages only.
    """

    MATCH = "match"
    READ = "read"
    WRITE = "write"
    ATTEND = "attend"
    COPY = "copy"
    COPY_LAYERS = "copy_layers"


@dataclass(frozen=True, slots=True)
class Transfer:
    """One finished call to a tier. `pages` of `pages_asked` were found, verified or stored, `bytes` of them moved.

    `first_byte_ms` is when the first bytes had arrived, if the transport reports it. A call has `failed` if it met an error or its
    deadline, or was skipped because the tier had failed just before; it may have moved some pages nevertheless.

    A READ from SHARED lasted as long as finding the pages and copying them to a device; pages of a node on this host that came
    through the transport are READ from REMOTE. The copies of both are timed by the device, without what they waited for; a copy is
    told some time after its end, and `ended_ms` is when it was told.
    """

    tier: Tier
    kind: TransferKind
    started_ms: float
    ended_ms: float
    pages_asked: int
    pages: int
    bytes: int
    failed: bool
    first_byte_ms: float | None = None


class TransferObserver(Protocol):
    """Receives every transfer on the thread that made it. Must be fast."""

    def transferred(self, transfer: Transfer) -> None:
        """A call to a tier has ended."""
        ...
