"""Memory that a writer lends a node: where pages lie until the node has taken them.

Owns: the memory file and which part of it comes next. Invariant: no page is put where another lies on which the node's verdict has
not come.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

from attnstore import memory_files
from attnstore.copying import address_of, copy
from attnstore.limits import MIB, SHM_TAKE_PAGES_MAX

_LENT_BYTES = 8 * MIB
"""Small enough to stay in the cache that both processes share: the node copies out of that, not out of memory."""
_ALIGNMENT_BYTES = 4096


class LentMemory:
    """Room for at least two pages of `page_bytes`, used round and round. Raises `OSError` where there is no memory."""

    def __init__(self, page_bytes: int) -> None:
        self._stride_bytes = -(-page_bytes // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES
        self._slots = max(2, _LENT_BYTES // self._stride_bytes)
        self.page_bytes = page_bytes
        self.size_bytes = self._slots * self._stride_bytes
        self.file, self._bytes = memory_files.create("attnstore-lent", self.size_bytes)
        self._next = 0
        self._used = 0

    def groups(self, pages: int) -> Iterator[int]:
        """How many of so many pages to offer at a time: few at first, so that the node begins soon, then as many as leave room for
        others while the node takes them. Each message may have to wake its receiver, which takes as long as copying a page or two.
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
        """How many pages there is room for."""
        return self._slots - self._used

    def put(self, page: memoryview) -> tuple[int, int]:
        """Copies a page to where there is room; the checksum of what is there, and the offset in bytes."""
        assert len(page) == self.page_bytes
        assert self._used < self._slots
        begin = self._next * self._stride_bytes
        self._next = (self._next + 1) % self._slots
        self._used += 1
        return copy(self._bytes[begin : begin + len(page)], address_of(page), len(page), soon_used=True)[0], begin

    def give_back(self, pages: int) -> None:
        """The node is done with the `pages` that have been here longest."""
        assert 0 <= pages <= self._used
        self._used -= pages

    def close_file(self) -> None:
        """Once the node has it: the mapping is enough for us."""
        os.close(self.file)
