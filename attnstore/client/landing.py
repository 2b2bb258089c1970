"""Where the pages of one read land: caller-supplied buffers, filled and verified in place.

Owns: the status of every page of one `read`, whatever transport brings the bytes.
Invariant: a page is OK only when every byte arrived in order and the slice's checksum matched; whatever a node sends, nothing is
written outside the buffer of the page that it names.
"""

from __future__ import annotations

from collections.abc import Sequence

from attnstore.core.hashing import page_checksum
from attnstore.errors import BufferMismatch, ProtocolError, Retryable
from attnstore.types import PageStatus, ReadResult
from attnstore.wire.chunks import Buffer, ReadChunk


class Landing:
    """Buffers and statuses of one read.

    `buffers`: one writable bytes-like object for each page, of `slice_bytes` each. Raises `BufferMismatch` otherwise.
    """

    def __init__(self, pages: int, buffers: Sequence[bytearray | memoryview], slice_bytes: int) -> None:
        if len(buffers) != pages:
            raise BufferMismatch(f"{pages} pages are asked for and {len(buffers)} buffers are given; give one for each page")
        self._views = [_writable_view(index, buffer, slice_bytes) for index, buffer in enumerate(buffers)]
        self._slice_bytes = slice_bytes
        self._received_bytes = [0] * pages
        self._statuses: list[PageStatus | None] = [None] * pages

    def take(self, chunk: ReadChunk) -> None:
        """Puts one chunk in its place. Raises `ProtocolError` for a chunk that no correct node sends."""
        index = chunk.page_index
        if index >= len(self._views) or self._statuses[index] is not None:
            raise ProtocolError(f"the node answered page {index} of {len(self._views)}, which is unknown or already answered")
        if chunk.status is not PageStatus.OK:
            self._statuses[index] = chunk.status
            return
        if chunk.size_bytes != self._slice_bytes:
            raise ProtocolError(f"the node sends slices of {chunk.size_bytes} bytes where {self._slice_bytes} were asked for")
        begin = self._received_bytes[index]
        end = begin + len(chunk.payload)
        if chunk.offset_bytes != begin or end > self._slice_bytes:
            raise ProtocolError(f"page {index}: a chunk at {chunk.offset_bytes}..{end} came where {begin} was next")
        self._views[index][begin:end] = chunk.payload
        self._received_bytes[index] = end
        if end == self._slice_bytes:
            intact = page_checksum(self._views[index]) == chunk.checksum
            self._statuses[index] = PageStatus.OK if intact else PageStatus.CORRUPT

    def result(self, error: Retryable | None = None) -> ReadResult:
        """The outcome so far; pages that are not complete are INCOMPLETE."""
        statuses = tuple(PageStatus.INCOMPLETE if status is None else status for status in self._statuses)
        return ReadResult(statuses, statuses.count(PageStatus.OK) * self._slice_bytes, error)


def readable_view(index: int, page: Buffer, page_bytes: int) -> memoryview:
    """The bytes of a page to write. Raises `BufferMismatch` for a wrong size."""
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
    except TypeError as error:
        raise BufferMismatch(f"buffer {index} is not a contiguous bytes-like object: {error}") from None
