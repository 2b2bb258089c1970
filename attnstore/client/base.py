"""Bulk transports: the seam between the client and whatever moves page bytes faster than gRPC.

Owns: what a bulk transport is asked to do (`ReadPlan`, `WritePlan`), how it is cancelled (`Transfer`), and the choice among those
that a node offers (`BulkChoice`).
Invariant: a bulk transport blocks the thread it is called on until no more byte can land in the caller's buffers, however it ends.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextvars
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, TypeVar

from attnstore.client.landing import Landing
from attnstore.clock import Clock, Deadline
from attnstore.copying import checksums
from attnstore.core.hashing import page_checksum, range_checksum
from attnstore.core.layout import PageLayout
from attnstore.errors import AttnStoreError, InvalidArgument, ProtocolError, Unavailable
from attnstore.limits import CHANNEL_READ_HASHES_MAX
from attnstore.logs import get_logger
from attnstore.types import MatchResult, PageStatus, WriteResult
from attnstore.wire.attend import AttendShape
from attnstore.wire.messages import lease_from_wire

T = TypeVar("T")

TransportName = Literal["auto", "grpc", "tcp", "shm"]
TRANSPORT_NAMES: tuple[TransportName, ...] = ("auto", "grpc", "tcp", "shm")

OnLayer = Callable[[int, int], None]
"""`on_layer(layer, pages)`: this layer of the first `pages` pages is there and verified. Each layer once, in order, also where
`pages` is 0; fewer where the read breaks off. Runs on the transferring thread, which waits for it.
"""

_SUSPENDED_MS = 30_000
_log = get_logger(__name__)


class BulkUnavailable(Unavailable):
    """The transport could not be opened; nothing was transferred."""


class Transfer:
    """A handle to stop a running transfer from another thread: each connection in use adds how to break it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._breakers: set[Callable[[], None]] = set()
        self._aborted = False

    @property
    def is_aborted(self) -> bool:
        """`abort` was called: there is nobody left to begin anything for."""
        return self._aborted

    @contextmanager
    def breakable(self, breaker: Callable[[], None]) -> Iterator[None]:
        """For the `with` block `abort` calls `breaker`; at once if the transfer was aborted already. Not a moment longer: the
        connection may serve another transfer then.
        """
        with self._lock:
            self._breakers.add(breaker)
            if self._aborted:
                breaker()
        try:
            yield
        finally:
            with self._lock:
                self._breakers.discard(breaker)

    def abort(self) -> None:
        """Breaks every connection in use; the transfer's thread ends soon, with an error."""
        with self._lock:
            self._aborted = True
            for breaker in self._breakers:
                breaker()


@dataclass(frozen=True, slots=True)
class ReadPlan:
    """A checked read: what to ask for and where it lands. `is_whole`: the layers are all that there are."""

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
        """Whether what landed is what the node sealed: `sealed` guards the whole page, or the layers that are read of it."""
        if self.is_whole:
            return page_checksum(landed) == sealed
        return range_checksum(checksums(landed, self.layer_bytes)[1]) == sealed


@dataclass(frozen=True, slots=True)
class WritePlan:
    """A checked write: `pages[i]` are the bytes of `hashes[i]`. Where a node hands pages over, `sealed[i]` is the checksum that the
    page was sealed with there, and `ages_ms[i]` how long ago a client wrote it.
    """

    namespace: bytes
    hashes: Sequence[bytes]
    pages: Sequence[memoryview]
    deadline: Deadline
    sealed: Sequence[int] | None = None
    ages_ms: Sequence[int] = ()
    transfer: Transfer = field(default_factory=Transfer)

    def age_ms(self, index: int) -> int:
        """Of page `index`; 0 where a client writes it now."""
        return self.ages_ms[index] if self.ages_ms else 0

    def checksum(self, index: int) -> int:
        """What the node must find that page `index` has."""
        return page_checksum(self.pages[index]) if self.sealed is None else self.sealed[index]


@dataclass(frozen=True, slots=True)
class MatchPlan:
    """A checked match: how many leading pages of each prefix there are, with a lease on them where `lease_ms` is not 0."""

    namespace: bytes
    prefixes: Sequence[Sequence[bytes]]
    lease_ms: int
    deadline: Deadline
    transfer: Transfer = field(default_factory=Transfer)

    @property
    def hashes(self) -> int:
        """Of all prefixes together."""
        return sum(map(len, self.prefixes))


@dataclass(frozen=True, slots=True)
class AttendPlan:
    """A checked attend: what streams of the namespace have in common. Each exchange on one ends within `deadline_ms`."""

    shape: AttendShape
    layout: PageLayout
    deadline_ms: float
    clock: Clock


def all_layers(plan: ReadPlan, on_layer: OnLayer) -> None:
    """Tells of every layer at once, where they did not come one by one."""
    for layer in range(plan.layer_begin, plan.layer_end):
        on_layer(layer, plan.landing.leading_open)


class BulkReader(Protocol):
    """Reads pages. Methods may be called from several threads at once."""

    @property
    def name(self) -> str:
        """The transport's name in `Describe`."""
        ...

    def read(self, plan: ReadPlan) -> None:
        """Fills `plan.landing`. Raises `BulkUnavailable` if a connection was not to be had, though parts that had one may have
        landed; other `Retryable` errors if it broke off.
        """
        ...

    def close(self) -> None:
        """Breaks what runs and lets everything go, without waiting: calls that run end soon, with `ClientClosed`."""
        ...


class BulkWriter(Protocol):
    """Writes pages. Methods may be called from several threads at once."""

    @property
    def name(self) -> str:
        """The transport's name in `Describe`."""
        ...

    def write(self, plan: WritePlan) -> tuple[PageStatus, ...]:
        """The verdict on each page. Errors as in `BulkReader.read`."""
        ...


class BulkMatcher(Protocol):
    """Matches prefixes. Methods may be called from several threads at once."""

    @property
    def name(self) -> str:
        """The transport's name in `Describe`."""
        ...

    def match(self, plan: MatchPlan) -> MatchResult:
        """What the node has of at most `CHANNEL_READ_HASHES_MAX` prefixes and hashes. Errors as in `BulkReader.read`."""
        ...


B = TypeVar("B", BulkWriter, BulkMatcher)

OpenChannel = Callable[[str, Deadline], tuple[str, bytes]]
"""`open_channel(transport, deadline)`: address and one-time token, asked of the node over gRPC. Blocks; from any thread but the
event loop's. Errors as those of any call.
"""


def wait_out(futures: Iterable[concurrent.futures.Future[Any]]) -> None:
    """Returns when all have ended. An interrupt meanwhile is dropped: until then somebody writes into the caller's buffers."""
    left = set(futures)
    while left:
        with suppress(KeyboardInterrupt):
            left = concurrent.futures.wait(left).not_done


class BulkChoice:
    """Which transport a call uses: the first of those offered that is not suspended, or gRPC.

    A transport that cannot be opened (a blocked port, say) is suspended for half a minute with a warning, and the call goes on over
    the next one; a transport that the user forced is never replaced.
    """

    def __init__(self, wanted: TransportName, clock: Clock) -> None:
        self._wanted = wanted
        self._clock = clock
        self._readers: tuple[BulkReader, ...] = ()
        self._writers: tuple[BulkWriter, ...] = ()
        self._matchers: tuple[BulkMatcher, ...] = ()
        self._suspended_until_ms: dict[str, float] = {}
        self._negotiated = wanted == "grpc"

    def is_negotiated(self) -> bool:
        """The node's offer is known, or of no interest."""
        return self._negotiated

    def offer(self, readers: Sequence[BulkReader], writers: Sequence[BulkWriter], matchers: Sequence[BulkMatcher] = ()) -> None:
        """Takes what the node offers, best first. Raises `InvalidArgument` if the forced transport is not among it."""
        if self._wanted != "auto":
            readers = [reader for reader in readers if reader.name == self._wanted]
            writers = [writer for writer in writers if writer.name == self._wanted]
            if not readers:
                raise InvalidArgument(f"transport={self._wanted!r} is asked for and the node does not offer it")
        self._readers, self._writers, self._matchers = tuple(readers), tuple(writers), tuple(matchers)
        self._negotiated = True

    @property
    def has_readers(self) -> bool:
        """The next read need not go over gRPC."""
        return any(self._is_open(reader.name) for reader in self._readers)

    @property
    def has_writers(self) -> bool:
        """The next write need not go over gRPC."""
        return any(self._is_open(writer.name) for writer in self._writers)

    def read(self, plan: ReadPlan) -> bool:
        """Reads over the best transport that opens; False where none does and gRPC is left. Blocks; errors as in `BulkReader`."""
        for reader in self._readers:
            if self._is_open(reader.name):
                plan.landing.transport = reader.name
                try:
                    reader.read(plan)
                    return True
                except BulkUnavailable as error:
                    self._suspend(reader.name, error)
                    plan.landing.restart()  # some parts may have had a connection
        plan.landing.transport = "grpc"
        return False

    def write(self, plan: WritePlan) -> tuple[PageStatus, ...] | None:
        """Writes as `read` reads: the verdict on each page, or None where gRPC is left.

        Pages that a node hands over do not go through shared memory, whose requests have no place for their age.
        """
        writers = [writer for writer in self._writers if writer.name != "shm"] if plan.ages_ms else self._writers
        return self._over_first(writers, lambda writer: writer.write(plan))

    def match(self, plan: MatchPlan) -> MatchResult | None:
        """Matches as `read` reads: the answer, or None where gRPC is left, as for what is too long for a frame."""
        if max(plan.hashes, len(plan.prefixes)) > CHANNEL_READ_HASHES_MAX:
            return None
        return self._over_first(self._matchers, lambda matcher: matcher.match(plan))

    def _over_first(self, transports: Sequence[B], call: Callable[[B], T]) -> T | None:
        for transport in transports:
            if self._is_open(transport.name):
                try:
                    return call(transport)
                except BulkUnavailable as error:
                    self._suspend(transport.name, error)
        return None

    def _suspend(self, name: str, error: AttnStoreError) -> None:
        if self._wanted == name:
            raise error
        self._suspended_until_ms[name] = self._clock.now_ms() + _SUSPENDED_MS
        _log.warning("transport unavailable, using the next one", transport=name, retry_after_ms=_SUSPENDED_MS, reason=str(error))

    def _is_open(self, name: str) -> bool:
        return self._suspended_until_ms.get(name, 0.0) <= self._clock.now_ms()


def checked_transport(transport: str) -> TransportName:
    """`transport` itself; raises `InvalidArgument` unless it is one of `TRANSPORT_NAMES`."""
    for name in TRANSPORT_NAMES:
        if transport == name:
            return name
    raise InvalidArgument(f"transport is {transport!r}; it must be one of {', '.join(TRANSPORT_NAMES)}")


def written(plan: WritePlan, verdicts: tuple[PageStatus, ...]) -> WriteResult:
    """The outcome of a write. Raises `ProtocolError` unless there is one verdict for each page."""
    if len(verdicts) != len(plan.hashes):
        raise ProtocolError(f"the node gave {len(verdicts)} verdicts on {len(plan.hashes)} pages")
    return WriteResult(
        verdicts, sum(len(page) for page, verdict in zip(plan.pages, verdicts, strict=True) if verdict is PageStatus.STORED)
    )


def matched(plan: MatchPlan, hits: Sequence[int], lease_id: bytes | None, lease_ms: int) -> MatchResult:
    """The outcome of a match. Raises `ProtocolError` for hits that do not fit the prefixes, or a lease that is none."""
    if len(hits) != len(plan.prefixes) or any(count > len(prefix) for count, prefix in zip(hits, plan.prefixes, strict=True)):
        raise ProtocolError("the node's hits do not fit the prefixes asked for")
    return MatchResult(tuple(hits), lease_from_wire(lease_id, lease_ms) if lease_id else None)


async def in_thread(function: Callable[[], T], transfer: Transfer) -> T:
    """Runs a blocking transfer on a thread; when cancelled, breaks it and waits for its end before it lets go."""
    # A future, not a task: whoever cancels all tasks of a loop would be told that it has ended, and it would go on.
    running = asyncio.get_running_loop().run_in_executor(None, contextvars.copy_context().run, function)
    try:
        return await asyncio.shield(running)
    except asyncio.CancelledError:
        transfer.abort()
        # Cancelled once more or not: until the thread has ended it may write into the caller's buffers.
        while not running.done():
            with suppress(asyncio.CancelledError):
                await asyncio.wait([running])
        running.exception()
        raise
