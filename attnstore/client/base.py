"""The contract of a transport, which moves pages between a client and one node.

Owns: `Transport`, which gRPC, the page channel and shm implement, and the checked requests that it executes (the plans). Invariant:
a verb sends nothing; the call that it returns does, and has ended for good when it returns or raises.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Protocol, Self

from attnstore.client.calls import Call, Runner, Transfer
from attnstore.client.landing import Landing
from attnstore.clock import Clock, Deadline
from attnstore.copying import checksums
from attnstore.core.hashing import page_checksum, range_checksum
from attnstore.core.layout import PageLayout
from attnstore.errors import ProtocolError, Unavailable
from attnstore.types import Lease, MatchResult, PageStatus, WriteResult
from attnstore.wire.attend import AttendShape
from attnstore.wire.chunks import Buffer
from attnstore.wire.messages import lease_from_wire

OnLayer = Callable[[int, int], None]
"""`on_layer(layer, pages)`: this layer of the first `pages` pages has arrived and is verified. Called for each layer once, in
order, even if `pages` is 0; for fewer layers if the read breaks off. Runs on the transferring thread, which waits for it.
"""

OpenChannel = Callable[[str, Deadline], tuple[str, bytes]]
"""`open_channel(transport, deadline)` requests the address and a one-time token of a bulk connection from the node over gRPC.

Blocks; call it from any thread but the event loop's. Raises the errors of any call.
"""


class BulkUnavailable(Unavailable):
    """A bulk transport could not be opened; nothing was transferred."""


@dataclass(frozen=True, slots=True)
class ReadPlan:
    """A checked read: the requested pages and their buffers. `is_whole` means all layers of the page."""

    namespace: bytes
    hashes: Sequence[bytes]
    layer_begin: int
    layer_end: int
    layer_bytes: int
    is_whole: bool
    lease_id: bytes | None
    landing: Landing
    deadline: Deadline
    on_layer: OnLayer | None = None
    transfer: Transfer = field(default_factory=Transfer)

    def is_intact(self, landed: memoryview, sealed: int) -> bool:
        """Returns whether the received bytes have the checksum `sealed`: of the whole page, or of the layers that are read."""
        if self.is_whole:
            return page_checksum(landed) == sealed
        return range_checksum(checksums(landed, self.layer_bytes)[1]) == sealed

    def tell_all_layers(self) -> None:
        """Calls `on_layer` for every layer, if the layers did not arrive one by one."""
        if self.on_layer is not None:
            for layer in range(self.layer_begin, self.layer_end):
                self.on_layer(layer, self.landing.leading_open)


@dataclass(frozen=True, slots=True)
class WritePlan:
    """A checked write: `pages[i]` are the bytes of `hashes[i]`. For a hand-over, `sealed[i]` is the checksum with which the page
    was sealed, and `ages_ms[i]` the time since a client wrote it.
    """

    namespace: bytes
    hashes: Sequence[bytes]
    pages: Sequence[memoryview]
    deadline: Deadline
    sealed: Sequence[int] | None = None
    ages_ms: Sequence[int] = ()
    transfer: Transfer = field(default_factory=Transfer)

    def age_ms(self, index: int) -> int:
        """Returns the age of page `index`; 0 if a client writes it now."""
        return self.ages_ms[index] if self.ages_ms else 0

    def checksum(self, index: int) -> int:
        """Returns the checksum that the node must find for page `index`."""
        return page_checksum(self.pages[index]) if self.sealed is None else self.sealed[index]

    def result(self, verdicts: tuple[PageStatus, ...]) -> WriteResult:
        """Returns the outcome. Raises `ProtocolError` unless there is one verdict per page."""
        if len(verdicts) != len(self.hashes):
            raise ProtocolError(f"the node gave {len(verdicts)} verdicts on {len(self.hashes)} pages")
        stored = (len(page) for page, verdict in zip(self.pages, verdicts, strict=True) if verdict is PageStatus.STORED)
        return WriteResult(verdicts, sum(stored))


@dataclass(frozen=True, slots=True)
class MatchPlan:
    """A checked match: count the leading pages of each prefix, with a lease on them unless `lease_ms` is 0."""

    namespace: bytes
    prefixes: Sequence[Sequence[bytes]]
    lease_ms: int
    deadline: Deadline
    transfer: Transfer = field(default_factory=Transfer)

    @property
    def hashes(self) -> int:
        """The number of hashes of all prefixes together."""
        return sum(map(len, self.prefixes))

    def result(self, hits: Sequence[int], lease_id: bytes | None, lease_ms: int) -> MatchResult:
        """Returns the outcome. Raises `ProtocolError` for hits that do not fit the prefixes, or a malformed lease."""
        if len(hits) != len(self.prefixes) or any(count > len(prefix) for count, prefix in zip(hits, self.prefixes, strict=True)):
            raise ProtocolError("the node's hits do not fit the prefixes asked for")
        return MatchResult(tuple(hits), lease_from_wire(lease_id, lease_ms) if lease_id else None)


@dataclass(frozen=True, slots=True)
class ViewPlan:
    """A checked request to use bytes `[begin, end)` of pages in place. The lease keeps the pages there."""

    namespace: bytes
    hashes: tuple[bytes, ...]
    begin: int
    end: int
    lease_id: bytes
    deadline: Deadline
    transfer: Transfer = field(default_factory=Transfer)


@dataclass(frozen=True, slots=True)
class AttendPlan:
    """A checked attend: the parameters that streams of the namespace share. Each exchange on a stream ends within `deadline_ms`."""

    shape: AttendShape
    layout: PageLayout
    deadline_ms: float
    clock: Clock
    transfer: Transfer = field(default_factory=Transfer)


class AttendStream(Protocol):
    """One stream to one node, used by one thread at a time; every exchange ends within the stream's deadline.

    Errors of all methods but `close`: `LeaseExpired` (match again), `Overloaded`, `DeadlineExceeded`, `Unavailable`, `Unsupported`,
    `InvalidArgument` for exceeding a limit of `attnstore.limits.ATTEND_*`, `ProtocolError`. Close the stream after any error.
    """

    @property
    def closed(self) -> bool:
        """True after `close`, by the caller or by the client that the stream belongs to: no set is open any more."""
        ...

    def open(self, hashes: Sequence[bytes], lease: Lease) -> int:
        """Makes the node keep these pages in place while the lease is alive. Returns the number of the new set."""
        ...

    def send_open(self, hashes: Sequence[bytes], lease: Lease) -> int:
        """The first half of `open`: sends the request and returns the number of the set. `receive_opened` must follow."""
        ...

    def receive_opened(self, set_id: int) -> None:
        """The second half of `open`: waits until the node has opened the set."""
        ...

    def ask(self, layer: int, sets: Sequence[tuple[int, int]], rows: Buffer, firsts: Sequence[int] = ()) -> None:
        """Sends rows, fp32 `[total rows, q_heads, head_dim]`: the next `count` rows for each `(set, count)`. `receive` must follow.

        `firsts`: for each row the first key of its set that it sees, counted from the set's first key
        (`attnstore.core.windows.first_keys`); empty if every row sees all keys. Rows that see no key of the set are not sent. Only
        nodes with `AttendLimits.windows` answer such rows. With latent pages a row has `PageLayout.row_dim` elements for each head.
        """
        ...

    def receive(self, out: memoryview, lse: memoryview) -> None:
        """Waits for the answer: fp32 `[total rows, q_heads, head_dim]` and `[total rows, q_heads]` as bytes, writable. Latent pages
        answer with `value_dim` elements for each head.
        """
        ...

    def close_set(self, set_id: int) -> None:
        """Closes a set that is not needed any more."""
        ...

    def close(self) -> None:
        """Closes the stream. Safe from any thread, any number of times."""
        ...

    def __enter__(self) -> Self: ...

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None: ...


class Transport(Protocol):
    """One way to a node. From any thread: each verb returns a `Call`, or None if this transport cannot carry the plan.

    Calls of a bulk transport (tcp, shm) raise `BulkUnavailable` if no connection could be opened; parts of a read with a connection
    may have landed. All calls raise other `Retryable` errors if they broke off, and `ClientClosed` once the transport is closed.
    The creator of a transport closes it.
    """

    @property
    def name(self) -> str:
        """The transport's name in `Describe`; `grpc` for gRPC itself, which carries every plan."""
        ...

    def read(self, plan: ReadPlan) -> Call[None] | None:
        """Fills `plan.landing` from its beginning."""
        ...

    def write(self, plan: WritePlan) -> Call[WriteResult] | None:
        """Stores pages."""
        ...

    def match(self, plan: MatchPlan) -> Call[MatchResult] | None:
        """Counts the pages that the node has."""
        ...

    def attend(self, plan: AttendPlan, run: Runner) -> Call[AttendStream] | None:
        """Opens an attend stream; the thread that uses it runs coroutines on the client's event loop through `run`."""
        ...
