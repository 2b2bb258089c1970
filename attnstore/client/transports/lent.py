"""Memory that a writer lends a node: the place of pages until the node has stored them.

Owns: the memory file and the allocation of its places. Invariant: no page overwrites another one whose verdict has not arrived.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

from attnstore import memory_files
from attnstore.copying import address_of, copy
from attnstore.limits import MIB, SHM_TAKE_PAGES_MAX

_LENT_BYTES = 8 * MIB
"""Small enough to stay in the cache that both processes share, so that the node copies from the cache, not from memory."""
_ALIGNMENT_BYTES = 4096


class LentMemory:
    """Room for at least two pages of `page_bytes`, used as a ring. Raises `OSError` if there is no memory."""

    def __init__(self, page_bytes: int) -> None:
        self._stride_bytes = -(-page_bytes // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES
        self._slots = max(2, _LENT_BYTES // self._stride_bytes)
        self.page_bytes = page_bytes
        self.size_bytes = self._slots * self._stride_bytes
        self.file, self._bytes = memory_files.create("attnstore-lent", self.size_bytes)
        self._next = 0
        self._used = 0

    def groups(self, pages: int) -> Iterator[int]:
        """Returns the sizes of the groups in which pages are offered: small at first, so that the node begins soon, then as large
        as leaves room for others while the node copies. Each message may have to wake its receiver, which takes as long as copying
        a page or two.
        """
        largest = min(max(1, self._slots // 3), SHM_TAKE_PAGES_MAX)
        group = 1
        while pages:
            group = min(group, pages)
            yield group
            pages -= group
            group = min(2 * group, largest)

    @property
    def free(self) -> int:
        """The number of pages for which there is room."""
        return self._slots - self._used

    def put(self, page: memoryview) -> tuple[int, int]:
        """Copies a page to a free place. Returns the checksum of the copy and its offset in bytes."""
        assert len(page) == self.page_bytes
        assert self._used < self._slots
        begin = self._next * self._stride_bytes
        self._next = (self._next + 1) % self._slots
        self._used += 1
        return copy(self._bytes[begin : begin + len(page)], address_of(page), len(page), soon_used=True)[0], begin

    def give_back(self, pages: int) -> None:
        """Frees the places of the oldest `pages` pages, which the node has answered."""
        assert 0 <= pages <= self._used
        self._used -= pages

    def close_file(self) -> None:
        """Closes the descriptor once the node has it: the mapping is enough for us."""
        os.close(self.file)
