"""The small value types that the store, the client and the wire share."""

from __future__ import annotations

import enum
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple, Self

from attnstore.errors import Retryable


class Space(NamedTuple):
    """A namespace of one tenant, by which a node keeps pages: equal digests of two tenants are two spaces."""

    tenant: str
    namespace: bytes


class PageStatus(enum.IntEnum):
    """What became of one page of a batch. The numbers are those of the wire's `PageStatus`."""

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

    # Known to the client alone, never sent: what a read found wrong on this side of the network.
    CORRUPT = 100
    INCOMPLETE = 101

    @property
    def is_hit(self) -> bool:
        """The bytes are there and verified."""
        return self is PageStatus.OK

    @property
    def is_kept(self) -> bool:
        """After a write: the store holds the page."""
        return self in (PageStatus.STORED, PageStatus.ALREADY_PRESENT)


class PageEventKind(enum.IntEnum):
    """What happened to a page; the numbers are those of the wire's `PageEvent.Kind`."""

    SEALED = 1
    EVICTED = 2
    DELETED = 3
    LAGGED = 4


class PageEvent(NamedTuple):
    """One event of `watch`. `hash` is empty and `dropped` counts the lost events when `kind` is LAGGED."""

    kind: PageEventKind
    hash: bytes
    sequence: int
    dropped: int = 0


@dataclass(frozen=True, slots=True)
class Lease:
    """A time-bounded pin of the pages that one `match` hit."""

    lease_id: bytes
    lease_ms: int


@dataclass(frozen=True, slots=True)
class MatchResult:
    """`hits[i]`: how many leading pages of prefix i are on the node. `lease` is None where none was asked for or nothing hit.

    `error` says why a cluster's nodes were not asked, or that none of them answered: nothing is known of the pages then. One node
    that does not answer raises instead.
    """

    hits: tuple[int, ...]
    lease: Lease | None
    error: Retryable | None = None


@dataclass(frozen=True, slots=True)
class ReadResult:
    """Status of each page in the order asked for. The buffer of a page that is not a hit has unspecified content.

    `error` is None where the read ran to its end; otherwise it says what broke it off (deadline, lost connection, no node that
    could be asked), and the pages that were not complete by then are INCOMPLETE. Once a result is returned, nothing is written into
    the buffers any more.
    `transport` is the one that carried the pages; a cluster's nodes may use several, which are joined by commas.
    """

    statuses: tuple[PageStatus, ...]
    bytes_read: int
    error: Retryable | None = None
    transport: str = "grpc"

    @property
    def leading_hits(self) -> int:
        """How many pages from the first on were read and verified."""
        for index, status in enumerate(self.statuses):
            if not status.is_hit:
                return index
        return len(self.statuses)


@dataclass(frozen=True, slots=True)
class WriteResult:
    """Verdict on each page in the order given."""

    verdicts: tuple[PageStatus, ...]
    bytes_written: int


class DeleteResult(tuple[PageStatus, ...]):
    """OK, MISSING or PINNED for each page in the order given. `unreached` are the nodes of a cluster that did not answer: what they
    had they have still, until their cluster's directory tells them, within a heartbeat of being back.
    """

    unreached: tuple[str, ...]

    def __new__(cls, statuses: Iterable[PageStatus], unreached: tuple[str, ...] = ()) -> Self:
        result = super().__new__(cls, statuses)
        result.unreached = unreached
        return result


@dataclass(frozen=True, slots=True)
class AttendLimits:
    """What a node that answers queries allows: rows and their bytes in one query, pages in one set, sets on one stream."""

    rows_max: int
    bytes_max: int
    hashes_max: int
    sets_max: int


@dataclass(frozen=True, slots=True)
class NodeDescription:
    """What a node says of itself. A new `epoch` means that it was restarted with an empty arena. `attend` is None where the node
    answers no queries. `tenant` is who asked, as the node takes it from the token.
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
