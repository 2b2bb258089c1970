"""An extent of the node's shared memory, mapped into this process, and pages used in place.

Owns: the mapping, which lives as long as anyone holds a view of it.
Invariant: nothing here can write to the node's memory; bytes count only if the stamp of their page is unchanged *after* they were
used.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from attnstore import memory_files
from attnstore.clock import Deadline
from attnstore.copying import Checksums, address_of, copy
from attnstore.core.hashing import page_checksum
from attnstore.fences import read_fence
from attnstore.types import PageStatus
from attnstore.wire.shm import ExtentLayout, Place


class MappedExtent:
    """One extent, read-only: the `size_bytes` at `offset_bytes` of a file.

    Errors as in `memory_files.map_read_only`; `shared_path` is the file that the user trusts.
    """

    def __init__(self, descriptor: int, layout: ExtentLayout, offset_bytes: int, size_bytes: int, shared_path: Path | None) -> None:
        self._stamp_index = layout.stamp_index
        self._bytes = memory_files.map_read_only(descriptor, offset_bytes, size_bytes, shared_path)
        self._intact: dict[int, int] = {}  # stamp index -> the stamp under which the page was found intact
        self.stamps = self._bytes[layout.stamps_offset_bytes : layout.file_bytes].cast("Q")
        self.address = address_of(self._bytes)
        """The address of the mapping in this process; valid as long as this object lives."""

    @property
    def size_bytes(self) -> int:
        """The size of the whole mapping, stamps included."""
        return len(self._bytes)

    def stamp_index(self, place: Place) -> int:
        """Returns the index in `stamps` for the place."""
        return self._stamp_index(place.offset_bytes)

    def holds(self, place: Place) -> bool:
        """Returns whether the bytes there, and what was read of them before, still belong to the page that was located there."""
        read_fence()
        return self.stamps[self._stamp_index(place.offset_bytes)] == place.stamp

    def view(self, begin: int, end: int) -> memoryview:
        """Returns bytes `[begin, end)` of the extent, read-only."""
        return self._bytes[begin:end]

    def status_of(self, place: Place, deadline: Deadline) -> PageStatus:
        """Returns OK for a whole page that has its checksum, else CORRUPT; MISSING if it was recycled. A page is hashed once.

        Raises `DeadlineExceeded` instead of hashing a page after the deadline.
        """
        index = self._stamp_index(place.offset_bytes)
        intact = self._intact.get(index) == place.stamp
        if not intact:
            deadline.left_ms()
            page = self.view(place.offset_bytes, place.offset_bytes + place.size_bytes)
            intact = page_checksum(page) == place.checksum
            if intact:
                self._intact[index] = place.stamp
        read_fence()
        if self.stamps[index] != place.stamp:
            return PageStatus.MISSING
        return PageStatus.OK if intact else PageStatus.CORRUPT

    def copy(self, begin: int, destination: memoryview, layer_bytes: int) -> Checksums:
        """Fills `destination` with the bytes from `begin` on. Returns their checksums. See `attnstore.copying.copy`."""
        assert 0 <= begin <= begin + len(destination) <= len(self._bytes)
        return copy(destination, self.address + begin, layer_bytes)


MappedPage = tuple[Place, MappedExtent]
"""A page's place, and the mapped extent that contains it."""
Located = MappedPage | PageStatus
"""A mapped page, or the status that says why it is not mapped."""


class PageViews:
    """Pages used in place, without a copy: `with transport.view(plan) as pages: ...`.

    `pages[i]` is a read-only memoryview of bytes `[begin, end)` of page i, or None if `statuses[i]` is not OK. A page is hashed the
    first time that this process uses it in place; later uses cost nothing that depends on its size. The bytes of a page change
    while they are read if the page is recycled, or found to be corrupt by others. So take the lease that covers the pages, use them
    within it, and call `verify` (or `valid`) *after* use: results computed from a page that is not valid then must be discarded. At
    the end of the `with` block the views are released; an array made from one keeps the memory mapped, but its content is
    undefined.
    """

    def __init__(self, located: Sequence[Located], begin: int, end: int) -> None:
        self.located = tuple(located)
        """Place and mapping of each page, for callers that read pages by address or check many stamps at once."""
        self.statuses = tuple(page if isinstance(page, PageStatus) else PageStatus.OK for page in located)
        self.pages = tuple(
            None if isinstance(page, PageStatus) else page[1].view(page[0].offset_bytes + begin, page[0].offset_bytes + end)
            for page in located
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        for page in self.pages:
            if page is not None:
                try:  # cheaper than `suppress`, for each page
                    page.release()
                except BufferError:  # an array made from it still exists
                    continue

    def valid(self, index: int) -> bool:
        """Returns whether page `index` was found and has not been recycled so far."""
        page = self.located[index]
        return not isinstance(page, PageStatus) and page[1].holds(page[0])

    def verify(self) -> tuple[PageStatus, ...]:
        """Returns the current statuses: a page that was recycled since is MISSING."""
        return tuple(
            PageStatus.MISSING if status is PageStatus.OK and not self.valid(index) else status
            for index, status in enumerate(self.statuses)
        )
