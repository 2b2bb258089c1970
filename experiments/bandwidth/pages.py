"""The pages that every lane moves: their number, size and memory.

Owns: `Shape` and `PageBuffers`. Standard library only, because a peer's client runs in an environment without AttnStore. Invariant:
all lanes of a run get the same kind of memory (anonymous, huge pages if available, faulted in), so that all are timed under the
same conditions.
"""

from __future__ import annotations

import mmap
from contextlib import suppress
from dataclasses import dataclass

_PATTERN_BYTES = 256


@dataclass(frozen=True, slots=True)
class Shape:
    """`pages` pages of `page_bytes` each, cycled through in batches. `page_bytes` is a multiple of 256."""

    page_bytes: int
    pages: int

    @property
    def total_bytes(self) -> int:
        """Bytes of all pages together."""
        return self.page_bytes * self.pages


class PageBuffers:
    """One mapping divided into pages: `views[i]` is page i, writable; `whole` is all of them."""

    def __init__(self, shape: Shape) -> None:
        mapping = mmap.mmap(-1, shape.total_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        with suppress(AttributeError, OSError):  # no huge pages on this system
            mapping.madvise(mmap.MADV_HUGEPAGE)
        for offset in range(0, shape.total_bytes, mmap.PAGESIZE):
            mapping[offset] = 0
        self.whole = memoryview(mapping)
        self.views = [self.whole[begin : begin + shape.page_bytes] for begin in range(0, shape.total_bytes, shape.page_bytes)]

    @classmethod
    def filled(cls, shape: Shape) -> PageBuffers:
        """Returns buffers with the content of `expected`."""
        buffers = cls(shape)
        for index, view in enumerate(buffers.views):
            view[:] = expected(index, shape.page_bytes)
        return buffers


def expected(index: int, page_bytes: int) -> bytes:
    """Returns the content of page `index`: a pattern of 256 bytes that differs for each page."""
    pattern = (index * 2_654_435_761 & 0xFFFF_FFFF).to_bytes(4, "little") + bytes(range(4, _PATTERN_BYTES))
    return pattern * (page_bytes // _PATTERN_BYTES)
