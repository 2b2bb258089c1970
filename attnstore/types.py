"""The value types shared by the store, the client and the wire."""

from __future__ import annotations

import enum
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple, Self

from attnstore.errors import Retryable


class Space(NamedTuple):
    """A namespace of one tenant. Nodes store pages by space: equal digests of two tenants are two spaces."""

    tenant: str
    namespace: bytes


class PageStatus(enum.IntEnum):
    """The result for one page of a batch. The numbers are those of the wire's `PageStatus`."""

    OK = 1
    MISSING = 2
    LEASE_EXPIRED = 3
    STORED = 4
    ALREADY_PRESENT = 5
    ARRIVING = 6
    NO_SPACE = 7
    CHECKSUM_MISMATCH = 8
    WRONG_SIZE = 9
    PINNED = 10
    DELETED = 11

    # Known only to the client, never sent: errors that a read found on this side of the network.
    CORRUPT = 100
    INCOMPLETE = 101

    @property
    def is_hit(self) -> bool:
        """True if the bytes were read and verified."""
        return self is PageStatus.OK

    @property
    def is_kept(self) -> bool:
        """True if the store holds the page after a write."""
        return self in (PageStatus.STORED, PageStatus.ALREADY_PRESENT)


class PageEventKind(enum.IntEnum):
    """The kind of a page event; the numbers are those of the wire's `PageEvent.Kind`."""

    SEALED = 1
    EVICTED = 2
    DELETED = 3
    LAGGED = 4


class PageEvent(NamedTuple):
    """One event of `watch`. For LAGGED, `hash` is empty and `dropped` counts the lost events."""

    kind: PageEventKind
    hash: bytes
    sequence: int
    dropped: int = 0


@dataclass(frozen=True, slots=True)
class Lease:
    """A time-bounded pin of the pages found by one `match`."""

    lease_id: bytes
    lease_ms: int


@dataclass(frozen=True, slots=True)
class MatchResult:
    """`hits[i]` is the number of leading pages of prefix i that are stored. `lease` is None if none was requested or nothing was
    found.

    `error` says why no node of a cluster was asked or answered; the result then says nothing about the pages. If a single node does
    not answer, the call raises instead.
    """

    hits: tuple[int, ...]
    lease: Lease | None
    error: Retryable | None = None


@dataclass(frozen=True, slots=True)
class ReadResult:
    """The status of each page in the requested order. The content of the buffer of a page that is not a hit is unspecified.

    `error` is None if the read was completed. Otherwise it says what interrupted the read (deadline, lost connection, no node that
    could be asked), and pages that were not complete then are INCOMPLETE. After a result is returned, nothing is written into the
    buffers any more. `transport` is the transport of the pages; if the nodes of a cluster use several, they are joined by commas.
    """

    statuses: tuple[PageStatus, ...]
    bytes_read: int
    error: Retryable | None = None
    transport: str = "grpc"

    @property
    def leading_hits(self) -> int:
        """The number of leading pages that were read and verified."""
        for index, status in enumerate(self.statuses):
            if not status.is_hit:
                return index
        return len(self.statuses)


@dataclass(frozen=True, slots=True)
class WriteResult:
    """The verdict on each page, in the given order."""

    verdicts: tuple[PageStatus, ...]
    bytes_written: int


class DeleteResult(tuple[PageStatus, ...]):
    """OK, MISSING or PINNED for each page in the given order. `unreached` are the nodes of a cluster that did not answer. They keep
    the pages until their cluster's directory tells them, within a heartbeat after they are back.
    """

    unreached: tuple[str, ...]

    def __new__(cls, statuses: Iterable[PageStatus], unreached: tuple[str, ...] = ()) -> Self:
        result = super().__new__(cls, statuses)
        result.unreached = unreached
        return result


@dataclass(frozen=True, slots=True)
class AttendLimits:
    """The limits of a node that attends: rows per query and their bytes, pages per set, sets per stream. `latents`: it attends to
    latent pages; `windows`: to the keys of a set from a row's own first one on.
    """

    rows_max: int
    bytes_max: int
    hashes_max: int
    sets_max: int
    latents: bool = False
    windows: bool = False


@dataclass(frozen=True, slots=True)
class NodeDescription:
    """A node's description of itself. A new `epoch` means that it was restarted with an empty arena. `attend` is None if the node
    does not attend. `tenant` is the caller's tenant, by its token.
    """

    node_id: str
    epoch: bytes
    version: str
    capacity_bytes: int
    used_bytes: int
    in_flight: int
    draining: bool
    transports: dict[str, str]
    hashes_max: int
    lease_ms_max: int
    page_bytes_max: int
    attend: AttendLimits | None = None
    tenant: str = ""
