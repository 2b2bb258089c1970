"""What one call to a tier moved and how long it took.

Owns: `Transfer`, and `TransferObserver`, who is told of every one. Invariant: a transfer is over when it is told.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Protocol

from attnstore_worker.cache.pool.tier import Tier


class TransferKind(enum.Enum):
    """What a tier was asked to do. The duration of a MATCH is a round trip, because it moves no page; so is that of an ATTEND,
    which names to a node the pages that later queries on an attend stream are about.
    """

    MATCH = "match"
    READ = "read"
    WRITE = "write"
    ATTEND = "attend"


@dataclass(frozen=True, slots=True)
class Transfer:
    """One call to a tier that has ended. `pages` of `pages_asked` were found, verified or kept, `bytes` of them moved.

    `first_byte_ms` is when the first bytes were known to be there, where the transport tells. A call has `failed` where it met an
    error or its deadline, or was not made because the tier had failed just before; it may have moved some pages nevertheless.
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
    """Is told of every transfer, from the thread that made it. Must be quick."""

    def transferred(self, transfer: Transfer) -> None:
        """A call to a tier has ended."""
        ...
