"""The disk format of spilled pages. Pure: bytes in, values out.

Owns: every byte that a spill directory contains, and the version rule. A directory has one file `superblock` and one file per
segment. All of them consist of blocks of 4,096 B, little-endian, each with its own XXH3-64 in its last 8 bytes:

    superblock  magic 8s | version u32 | flags u32 | sequence u64 | store 16s | life u64 | deletions_seen u64
    segment     magic 8s | generation u64 | store 16s | page_bytes u64 | records u32 | tenant_bytes u32 | tenant
    bitmap      magic 8s | generation u64 | sequence u64 | bits, one per record: deleted
    footer      magic 8s | generation u64 | first u32 | count u32 | count entries of 128 B
    record      magic 8s | generation u64 | index u32 | 0 u32 | one entry of 128 B

An entry is namespace 32s | hash 32s | layout 28s | length u32 | checksum u64 | sequence u64 | key_id u64 | 0 u64, where `key_id`
is reserved. A segment file is: segment block, bitmaps A and B, footer blocks, then `records` times a record block and the page,
padded to whole blocks.

Invariants: a block that is torn, rotten or of another kind decodes to None, never to a wrong value. A block of another generation
of the same segment is told apart by its number. Version rule: a reader refuses every version but its own and every flag that it
does not know; the superblock's first 16 bytes and its checksum keep their places in all versions.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple, Self

from attnstore.core.hashing import page_checksum
from attnstore.limits import HASH_BYTES, MIB

VERSION: Final = 1
BLOCK_BYTES: Final = 4096
_BODY_BYTES: Final = BLOCK_BYTES - 8
_CHECKSUM: Final = struct.Struct("<Q")

_SUPERBLOCK: Final = struct.Struct("<8sIIQ16sQQ")
_SEGMENT: Final = struct.Struct("<8sQ16sQII")
_BITMAP: Final = struct.Struct("<8sQQ")
_FOOTER: Final = struct.Struct("<8sQII")
_RECORD: Final = struct.Struct("<8sQI4x")
_ENTRY: Final = struct.Struct("<32s32s28sIQQ16x")
assert _ENTRY.size == 128

SUPERBLOCK_MAGIC: Final = b"ATTNSPIL"
SEGMENT_MAGIC: Final = b"ATTNSEGM"
BITMAP_MAGIC: Final = b"ATTNDELE"
FOOTER_MAGIC: Final = b"ATTNFOOT"
RECORD_MAGIC: Final = b"ATTNPAGE"

ENTRIES_PER_FOOTER: Final = (_BODY_BYTES - _FOOTER.size) // _ENTRY.size
RECORDS_MAX: Final = 8 * (_BODY_BYTES - _BITMAP.size)
TENANT_BYTES_MAX: Final = _BODY_BYTES - _SEGMENT.size
SEGMENT_BYTES_MIN: Final = 16 * MIB
SEGMENT_BYTES_MAX: Final = 256 * MIB
_SEGMENTS: Final = 64
_BITMAP_BLOCKS: Final = (1, 2)
_FOOTER_BLOCK: Final = 3


class Entry(NamedTuple):
    """A page on disk: `layout` is `PageLayout.canonical()`, `checksum` the page's XXH3-64, `length` its bytes, and `sequence` rises
    with every record of a directory. A footer's entry of length 0 is a place without a record.
    """

    namespace: bytes
    hash: bytes
    layout: bytes
    checksum: int
    length: int
    sequence: int = 0

    @property
    def identity(self) -> bytes:
        """What two records of the same page share."""
        return self.namespace + self.hash


EMPTY_ENTRY: Final = Entry(bytes(HASH_BYTES), bytes(HASH_BYTES), bytes(28), 0, 0)


@dataclass(frozen=True, slots=True)
class Superblock:
    """The state of a directory. Two copies alternate; the valid one with the higher `sequence` counts."""

    store: bytes
    life: int
    deletions_seen: int
    sequence: int
    version: int = VERSION
    flags: int = 0

    def encode(self) -> bytes:
        """Returns one block."""
        fields = (self.version, self.flags, self.sequence, self.store, self.life, self.deletions_seen)
        return _sealed(_SUPERBLOCK.pack(SUPERBLOCK_MAGIC, *fields))

    @classmethod
    def decode(cls, block: bytes | memoryview) -> Self | None:
        """Returns the superblock, of any version, or None."""
        if not _is_intact(block, SUPERBLOCK_MAGIC):
            return None
        _, version, flags, sequence, store, life, seen = _SUPERBLOCK.unpack_from(block)
        return cls(store, life, seen, sequence, version, flags)


@dataclass(frozen=True, slots=True)
class SegmentHeader:
    """One generation of a segment: at most `records` pages of `page_bytes` of one tenant. An empty generation has no records."""

    generation: int
    store: bytes
    tenant: str
    page_bytes: int
    records: int

    def encode(self) -> bytes:
        """Returns one block."""
        tenant = self.tenant.encode()
        assert len(tenant) <= TENANT_BYTES_MAX
        fields = (self.generation, self.store, self.page_bytes, self.records, len(tenant))
        return _sealed(_SEGMENT.pack(SEGMENT_MAGIC, *fields) + tenant)

    @classmethod
    def decode(cls, block: bytes | memoryview) -> Self | None:
        """Returns the header, or None."""
        if not _is_intact(block, SEGMENT_MAGIC):
            return None
        _, generation, store, page_bytes, records, tenant_bytes = _SEGMENT.unpack_from(block)
        tenant = bytes(block[_SEGMENT.size : _SEGMENT.size + tenant_bytes])
        return cls(generation, store, tenant.decode(), page_bytes, records)

    @property
    def footer_blocks(self) -> int:
        """Blocks of the footer."""
        return -(-self.records // ENTRIES_PER_FOOTER)

    @property
    def head_blocks(self) -> int:
        """Blocks before the first record."""
        return _FOOTER_BLOCK + self.footer_blocks

    @property
    def footer_offset_bytes(self) -> int:
        """Where the footer begins."""
        return _FOOTER_BLOCK * BLOCK_BYTES

    @property
    def record_bytes(self) -> int:
        """Bytes from one record to the next."""
        return record_bytes(self.page_bytes)

    def record_offset_bytes(self, index: int) -> int:
        """Where the record block of `index` begins."""
        return self.head_blocks * BLOCK_BYTES + index * self.record_bytes

    @property
    def file_bytes(self) -> int:
        """The least size of its file."""
        return self.record_offset_bytes(self.records)


def record_bytes(page_bytes: int) -> int:
    """Returns the bytes of a record block and a page, padded to whole blocks."""
    return BLOCK_BYTES + -(-page_bytes // BLOCK_BYTES) * BLOCK_BYTES


def segment_bytes_for(capacity_bytes: int) -> int:
    """Returns the size of a directory's segments: a 64th of the capacity, between 16 MiB and 256 MiB, in whole blocks."""
    size_bytes = min(max(capacity_bytes // _SEGMENTS, SEGMENT_BYTES_MIN), SEGMENT_BYTES_MAX)
    return size_bytes - size_bytes % BLOCK_BYTES


def records_in(segment_bytes: int, page_bytes: int) -> int:
    """Returns how many pages a segment file holds beside its head; 0 if it is too small for one."""
    blocks, of_record = segment_bytes // BLOCK_BYTES - _FOOTER_BLOCK, record_bytes(page_bytes) // BLOCK_BYTES
    records = min(max(blocks, 0) // of_record, RECORDS_MAX)
    while records > 0 and records * of_record + -(-records // ENTRIES_PER_FOOTER) > blocks:
        records -= 1
    return records


class Deletions:
    """The deleted records of one generation, in memory. `encode` gives the next block and says where it goes."""

    def __init__(self, generation: int, bits: bytes = b"", sequence: int = 0) -> None:
        self.generation = generation
        self.sequence = sequence
        self._bits = bytearray(bits.ljust(RECORDS_MAX // 8, b"\0"))

    def __contains__(self, index: int) -> bool:
        return bool(self._bits[index >> 3] & 1 << (index & 7))

    def add(self, index: int) -> None:
        """Marks a record as deleted."""
        self._bits[index >> 3] |= 1 << (index & 7)

    def encode(self) -> tuple[int, bytes]:
        """Returns the offset and the bytes of the next bitmap. Two places alternate, so that a torn write leaves the other one."""
        self.sequence += 1
        head = _BITMAP.pack(BITMAP_MAGIC, self.generation, self.sequence)
        return _BITMAP_BLOCKS[self.sequence % 2] * BLOCK_BYTES, _sealed(head + bytes(self._bits))

    @classmethod
    def decode(cls, head: bytes | memoryview, generation: int) -> Self:
        """Returns the latest deletions of the generation in a segment's head; none if neither bitmap belongs to it."""
        latest = cls(generation)
        for number in _BITMAP_BLOCKS:
            block = head[number * BLOCK_BYTES : (number + 1) * BLOCK_BYTES]
            if not _is_intact(block, BITMAP_MAGIC):
                continue
            _, of_generation, sequence = _BITMAP.unpack_from(block)
            if is_generation(of_generation, generation) and sequence > latest.sequence:
                latest = cls(generation, bytes(block[_BITMAP.size : _BODY_BYTES]), sequence)
        return latest


def is_generation(found: int, expected: int) -> bool:
    """Returns whether a block belongs to the generation that its segment has now."""
    return found == expected


def encode_footer(generation: int, entries: Sequence[Entry]) -> bytes:
    """Returns the blocks of a footer of all the segment's places."""
    blocks = []
    for first in range(0, len(entries), ENTRIES_PER_FOOTER):
        part = entries[first : first + ENTRIES_PER_FOOTER]
        head = _FOOTER.pack(FOOTER_MAGIC, generation, first, len(part))
        blocks.append(_sealed(head + b"".join(map(_packed, part))))
    return b"".join(blocks)


def decode_footer(data: bytes | memoryview, header: SegmentHeader) -> list[Entry] | None:
    """Returns the entries of all places of a sealed segment, or None if a block is not an intact one of the header's generation."""
    entries: list[Entry] = []
    for begin in range(0, header.footer_blocks * BLOCK_BYTES, BLOCK_BYTES):
        block = data[begin : begin + BLOCK_BYTES]
        if not _is_intact(block, FOOTER_MAGIC):
            return None
        _, generation, first, count = _FOOTER.unpack_from(block)
        due = min(ENTRIES_PER_FOOTER, header.records - len(entries))
        if not is_generation(generation, header.generation) or first != len(entries) or count != due:
            return None
        entries.extend(map(_entry, _ENTRY.iter_unpack(block[_FOOTER.size : _FOOTER.size + count * _ENTRY.size])))
    return entries


def encode_record(generation: int, index: int, entry: Entry) -> bytes:
    """Returns the block before a page."""
    return _sealed(_RECORD.pack(RECORD_MAGIC, generation, index) + _packed(entry))


def decode_record(block: bytes | memoryview, generation: int, index: int) -> Entry | None:
    """Returns the entry of the record at `index`, or None if the block is not an intact one of this generation and place."""
    if not _is_intact(block, RECORD_MAGIC):
        return None
    _, of_generation, of_index = _RECORD.unpack_from(block)
    if not is_generation(of_generation, generation) or of_index != index:
        return None
    return _entry(_ENTRY.unpack_from(block, _RECORD.size))


def is_page_intact(entry: Entry, page: bytes | memoryview) -> bool:
    """Returns whether the bytes are those that the entry describes."""
    return page_checksum(page) == entry.checksum


def _packed(entry: Entry) -> bytes:
    return _ENTRY.pack(entry.namespace, entry.hash, entry.layout, entry.length, entry.checksum, entry.sequence)


def _entry(fields: tuple[bytes, bytes, bytes, int, int, int]) -> Entry:
    namespace, page_hash, layout, length, checksum, sequence = fields
    return Entry(namespace, page_hash, layout, checksum, length, sequence)


def _sealed(body: bytes) -> bytes:
    body = body.ljust(_BODY_BYTES, b"\0")
    return body + _CHECKSUM.pack(page_checksum(body))


def _is_intact(block: bytes | memoryview, magic: bytes) -> bool:
    if len(block) != BLOCK_BYTES or block[:8] != magic:
        return False
    (checksum,) = _CHECKSUM.unpack_from(block, _BODY_BYTES)
    return bool(checksum == page_checksum(block[:_BODY_BYTES]))
