"""The first bytes of an arena that outlives its node: they identify our file and locate the old stamps.

Owns: the format. A superblock is 64 bytes, little-endian, at the beginning of the file; extents begin at `EXTENTS_AT_BYTES`:

    magic 8s | version u32 | 0 u32 | extents u64 | span_bytes u64 | stamps_offset_bytes u64 | stamps u64 | 0 u64 | checksum u64

Extent `i` is `span_bytes` long and begins at `EXTENTS_AT_BYTES + i * span_bytes`; its `stamps` words begin at `stamps_offset_bytes`
in it. The checksum is the XXH3-64 of the bytes before it.

Invariant: a node that can read a superblock can void every stamp of the file, so later versions must keep this format.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import astuple, dataclass
from typing import Final, Self

from attnstore.core.hashing import page_checksum
from attnstore.memory_files import HUGE_PAGE_BYTES
from attnstore.wire.chunks import Buffer

VERSION: Final = 1
EXTENTS_AT_BYTES: Final = HUGE_PAGE_BYTES
"""A CXL memory device can be mapped at multiples of this."""
_MAGIC: Final = b"ATTNAREN"
_FIELDS: Final = struct.Struct("<8sI4xQQQQ8x")
_CHECKSUM: Final = struct.Struct("<Q")
SUPERBLOCK_BYTES: Final = _FIELDS.size + _CHECKSUM.size
assert SUPERBLOCK_BYTES == 64
_STAMP_BYTES: Final = 8


@dataclass(frozen=True, slots=True)
class Superblock:
    """The places of the extents and of their stamps in the file of an arena."""

    version: int
    extents: int
    span_bytes: int
    stamps_offset_bytes: int
    stamps: int

    @classmethod
    def decode(cls, data: Buffer) -> Self | None:
        """Returns the superblock at the beginning of the bytes, or None if there is none or it is damaged."""
        head = bytes(data[:SUPERBLOCK_BYTES])
        if len(head) < SUPERBLOCK_BYTES or not head.startswith(_MAGIC):
            return None
        (checksum,) = _CHECKSUM.unpack_from(head, _FIELDS.size)
        if checksum != page_checksum(head[: _FIELDS.size]):
            return None
        return cls(*_FIELDS.unpack_from(head)[1:])

    def encode(self) -> bytes:
        """The inverse of `decode`."""
        fields = _FIELDS.pack(_MAGIC, *astuple(self))
        return fields + _CHECKSUM.pack(page_checksum(fields))

    @property
    def file_bytes(self) -> int:
        """The size of the whole arena."""
        return EXTENTS_AT_BYTES + self.extents * self.span_bytes

    def stamps_in(self, file_bytes: int) -> Iterator[tuple[int, int]]:
        """Returns `[begin, end)` of the stamp words of each extent, as far as a file of that size contains them."""
        for extent in range(self.extents):
            begin = EXTENTS_AT_BYTES + extent * self.span_bytes + self.stamps_offset_bytes
            if begin >= file_bytes:
                return
            yield begin, min(begin + self.stamps * _STAMP_BYTES, file_bytes)
