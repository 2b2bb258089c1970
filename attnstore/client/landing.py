"""The destination of one read: caller-supplied buffers, filled and verified in place.

Owns: the status of every page of one `read`, for every transport.
Invariant: a page is OK only if every byte arrived in order and the slice's checksum matched; whatever a node sends, nothing is
written outside the buffer of the page that it names.
"""

from __future__ import annotations

from collections.abc import Sequence

from attnstore.core.hashing import page_checksum
from attnstore.errors import BufferMismatch, ProtocolError, Retryable
from attnstore.types import PageStatus, ReadResult
from attnstore.wire.chunks import Buffer, ReadChunk

_MISSES = (PageStatus.MISSING, PageStatus.LEASE_EXPIRED)


class Landing:
    """Buffers and statuses of one read. `views` are the buffers as flat memoryviews.

    `buffers`: one writable bytes-like object for each page, of `slice_bytes` each. Raises `BufferMismatch` otherwise.
    """

    def __init__(self, pages: int, buffers: Sequence[bytearray | memoryview], slice_bytes: int) -> None:
        if len(buffers) != pages:
            raise BufferMismatch(f"{pages} pages are asked for and {len(buffers)} buffers are given; give one for each page")
        self.views = [_writable_view(index, buffer, slice_bytes) for index, buffer in enumerate(buffers)]
        self.slice_bytes = slice_bytes
        self._received_bytes = [0] * pages
        self._statuses: list[PageStatus | None] = [None] * pages
        self.transport = "grpc"
        """The transport that fills the buffers."""

    @property
    def leading_open(self) -> int:
        """The number of leading pages that are neither missing nor corrupt so far."""
        for index, status in enumerate(self._statuses):
            if status not in (None, PageStatus.OK):
                return index
        return len(self._statuses)

    @property
    def lacking(self) -> list[int]:
        """Returns the pages that have not arrived, or are not complete and verified, so far."""
        return [index for index, status in enumerate(self._statuses) if status is not PageStatus.OK]

    def begin(self, transport: str) -> None:
        """Begins the read over this transport, and forgets what has landed over another one or before a restart of the node."""
        self.transport = transport
        self._received_bytes = [0] * len(self.views)
        self._statuses = [None] * len(self.views)

    def miss(self, index: int, status: PageStatus) -> None:
        """Marks page `index` as a miss. Raises `ProtocolError` for an unknown or answered page, or a status that is not a miss."""
        self._require_open(index)
        if status not in _MISSES:
            raise ProtocolError(f"the node answered a read of page {index} with {status.name}")
        self._statuses[index] = status

    def window(self, index: int, offset_bytes: int, size_bytes: int) -> memoryview | None:
        """Returns where the next `size_bytes` of page `index` go; None if they are useless because the page is already corrupt.

        Raises `ProtocolError` for bytes that no correct node sends.
        """
        worthless = 0 <= index < len(self.views) and self._statuses[index] is PageStatus.CORRUPT
        if not worthless:
            self._require_open(index)
        begin = self._received_bytes[index]
        end = begin + size_bytes
        if offset_bytes != begin or size_bytes <= 0 or end > self.slice_bytes:
            raise ProtocolError(
                f"page {index}: {size_bytes} bytes at {offset_bytes} came where {begin} of {self.slice_bytes} was next"
            )
        return None if worthless else self.views[index][begin:end]

    def whole(self, index: int) -> memoryview:
        """Returns where all of page `index` goes, for a transport that brings it at once and then calls `settle`. Raises as
        `window` does.
        """
        self._require_open(index)
        return self.views[index]

    def settle(self, index: int, intact: bool) -> None:
        """Sets the status of page `index`, which has arrived completely."""
        self._received_bytes[index] = self.slice_bytes
        self._statuses[index] = PageStatus.OK if intact else PageStatus.CORRUPT

    def landed(self, index: int, size_bytes: int) -> bool:
        """Counts bytes that arrived, useful or not. Returns whether the slice of the page is complete and must be passed to
        `judge`.
        """
        self._received_bytes[index] += size_bytes
        return self._received_bytes[index] == self.slice_bytes

    def judge(self, index: int, intact: bool) -> None:
        """Sets the status of a complete page, or of one whose bytes are known to be wrong; corrupt stays corrupt."""
        if self._statuses[index] is None:
            self._statuses[index] = PageStatus.OK if intact else PageStatus.CORRUPT

    def take(self, chunk: ReadChunk) -> None:
        """Copies one gRPC chunk into its place; its checksum is that of the whole slice."""
        index = chunk.page_index
        if chunk.status is not PageStatus.OK:
            self.miss(index, chunk.status)
            return
        if chunk.size_bytes != self.slice_bytes:
            raise ProtocolError(f"the node sends slices of {chunk.size_bytes} bytes where {self.slice_bytes} were asked for")
        window = self.window(index, chunk.offset_bytes, len(chunk.payload))
        if window is not None:
            window[:] = chunk.payload
            if self.landed(index, len(window)):
                self.judge(index, page_checksum(self.views[index]) == chunk.checksum)

    def require_complete(self) -> None:
        """Raises `ProtocolError` if a page has no status although the node has ended the read."""
        unanswered = self._statuses.count(None)
        if unanswered:
            raise ProtocolError(f"the node ended the read with {unanswered} of {len(self._statuses)} pages unanswered")

    def result(self, error: Retryable | None = None) -> ReadResult:
        """Returns the outcome so far; incomplete pages are INCOMPLETE."""
        statuses = tuple(PageStatus.INCOMPLETE if status is None else status for status in self._statuses)
        return ReadResult(statuses, statuses.count(PageStatus.OK) * self.slice_bytes, error, self.transport)

    def _require_open(self, index: int) -> None:
        if not 0 <= index < len(self.views) or self._statuses[index] is not None:
            raise ProtocolError(f"the node answered page {index} of {len(self.views)}, which is unknown or already answered")


def readable_view(index: int, page: Buffer, page_bytes: int) -> memoryview:
    """Returns the bytes of a page to write. Raises `BufferMismatch` for a wrong size."""
    view = _flat_view(index, page)
    if view.nbytes != page_bytes:
        raise BufferMismatch(f"page {index} has {view.nbytes} bytes; the layout's pages have {page_bytes}")
    return view


def _writable_view(index: int, buffer: bytearray | memoryview, slice_bytes: int) -> memoryview:
    view = _flat_view(index, buffer)
    if view.readonly:
        raise BufferMismatch(f"buffer {index} is read-only")
    if view.nbytes != slice_bytes:
        raise BufferMismatch(f"buffer {index} has {view.nbytes} bytes; the slice asked for has {slice_bytes}")
    return view


def _flat_view(index: int, buffer: Buffer) -> memoryview:
    try:
        return memoryview(buffer).cast("B")
    except (TypeError, ValueError) as error:
        raise BufferMismatch(f"buffer {index} is not a contiguous bytes-like object: {error}") from None
