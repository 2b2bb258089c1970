"""Views of pages in the arena that cannot be evicted while they are read or written.

Owns: the views of a pinned page and of an arriving page, and the `with` blocks that pin and unpin. Invariant: a block unpins
everything that it pinned, however it ends, even if entering it fails.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from attnstore.core.page import ArrivingPage, PinnedPage
from attnstore.types import PageStatus, Space

_PINS_PER_LOCK = 64
"""Pins per hold of the store's lock, which bounds how long metadata calls wait."""


class Pinning(Protocol):
    """The interface that pins and unpins: the `Store`."""

    def pin_all(self, space: Space, page_hashes: Sequence[bytes], lease_id: bytes | None) -> list[PageView | PageStatus]: ...

    def unpin(self, *views: PageView) -> None: ...


class PageView:
    """The bytes of a pinned page and the checksums with which it was sealed."""

    __slots__ = ("data", "page")

    def __init__(self, data: memoryview, page: PinnedPage) -> None:
        self.data = data
        self.page = page

    def slice(self, begin: int, end: int) -> tuple[memoryview, int]:
        """Returns bytes `[begin, end)`, whole layers, and the checksum that a reader compares: see `PinnedPage.guard`."""
        return self.data[begin:end], self.page.guard(begin, end)


class Arrival:
    """The writable bytes of an arriving page. Looked up once, because that takes as long as hashing a small page."""

    __slots__ = ("data", "page")

    def __init__(self, data: memoryview, page: ArrivingPage) -> None:
        self.data = data
        self.page = page


class ReadingAll:
    """The `with` block of `Store.reading_all`. A class, because the overhead of a generator exceeds that of the look-up."""

    __slots__ = ("_asked", "_pinned", "_store")

    def __init__(self, store: Pinning, space: Space, page_hashes: Sequence[bytes], lease_id: bytes | None) -> None:
        self._store = store
        self._asked = (space, page_hashes, lease_id)
        self._pinned: list[PageView] = []

    def __enter__(self) -> list[PageView | PageStatus]:
        space, page_hashes, lease_id = self._asked
        found: list[PageView | PageStatus] = []
        try:
            for at in range(0, len(page_hashes), _PINS_PER_LOCK):
                pages = self._store.pin_all(space, page_hashes[at : at + _PINS_PER_LOCK], lease_id)
                self._pinned += [page for page in pages if isinstance(page, PageView)]
                found += pages
        except BaseException:
            self.__exit__()
            raise
        return found

    def __exit__(self, *_: object) -> None:
        for at in range(0, len(self._pinned), _PINS_PER_LOCK):
            self._store.unpin(*self._pinned[at : at + _PINS_PER_LOCK])
