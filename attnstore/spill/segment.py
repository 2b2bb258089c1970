"""One segment: a file of records of one tenant and page size, and the order in which its blocks are written.

Owns: the write order of a segment, its deletions, and the aligned memory through which blocks pass. Invariants: a header is durable
before a record of its generation is written; records are durable before a footer names them; a deletion is durable when
`mark_deleted` returns; a generation is never used twice. A page is copied only if its address or its length is not aligned.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Sequence
from typing import Final, NamedTuple, NewType

from attnstore.copying import address_of
from attnstore.limits import MIB
from attnstore.spill import format as disk_format
from attnstore.spill.device import ALIGNMENT_BYTES, Device, aligned_buffer
from attnstore.spill.format import BLOCK_BYTES, EMPTY_ENTRY, Deletions, Entry, SegmentHeader, encode_footer, encode_record

CHUNK_BYTES_MAX: Final = 2 * MIB
"""One write, so that a read beside it does not wait long."""
_HEAD_BLOCKS_MIN: Final = 3
_HEAD_BLOCKS_FIRST: Final = 16
_INDEX_BITS: Final = 16
_SEGMENT_BITS: Final = 24
assert disk_format.RECORDS_MAX <= 1 << _INDEX_BITS

Location = NewType("Location", int)
"""Where a record is: its segment's generation and number, and its index, in one integer, because a node keeps one for each page."""


def location(generation: int, segment: int, index: int) -> Location:
    """Returns the location of a record."""
    return Location((generation << _SEGMENT_BITS | segment) << _INDEX_BITS | index)


def segment_of(place: Location) -> int:
    """Returns the number of the segment."""
    return place >> _INDEX_BITS & (1 << _SEGMENT_BITS) - 1


def index_of(place: Location) -> int:
    """Returns the index in the segment."""
    return place & (1 << _INDEX_BITS) - 1


def generation_of(place: Location) -> int:
    """Returns the generation that the segment had when the record was written."""
    return place >> _INDEX_BITS + _SEGMENT_BITS


class Target(NamedTuple):
    """A page in memory, and the index of its record. `page` has as many bytes as the segment's pages."""

    record: int
    page: memoryview


class Segment:
    """A segment file. The caller serializes writes; `read` may run beside them."""

    def __init__(self, device: Device, number: int, name: str, file_bytes: int, header: SegmentHeader) -> None:
        self.number = number
        self.name = name
        self.file_bytes = file_bytes
        self.header = header
        self.deletions = Deletions(header.generation)
        self.entries: list[Entry] = []
        """Of an open segment, in the order of its records."""
        self.read_failures = 0
        self._device = device

    @property
    def is_full(self) -> bool:
        """Whether there is no place for another record."""
        return len(self.entries) == self.header.records

    def start(self, header: SegmentHeader) -> None:
        """Begins a generation, which ends the previous one with all of its records. Durable. Raises `OSError`."""
        self.header = header
        self.deletions = Deletions(header.generation)
        self.entries = []
        self._write(0, header.encode())
        self._device.flush(self.name)

    def append(self, entries: Sequence[Entry], pages: Sequence[memoryview]) -> None:
        """Writes records after those that are there; not durable. Raises `OSError`."""
        first = len(self.entries)
        buffers: list[memoryview] = []
        staging = _Staging()
        for index, (entry, page) in enumerate(zip(entries, pages, strict=True), first):
            block = staging.take(BLOCK_BYTES)
            block[:] = encode_record(self.header.generation, index, entry)
            buffers += [block, *self._page_buffers(page, staging, copy=True)]
        for at, part in _chunks(buffers):
            self._device.write(self.name, self.header.record_offset_bytes(first) + at, part)
        self.entries += entries

    def flush(self) -> None:
        """Makes the records durable. Raises `OSError`."""
        self._device.flush(self.name)

    def seal(self) -> None:
        """Writes the footer, after which the segment is read only. Durable. Raises `OSError`."""
        self._device.flush(self.name)
        entries = self.entries + [EMPTY_ENTRY] * (self.header.records - len(self.entries))
        self._write(self.header.footer_offset_bytes, encode_footer(self.header.generation, entries))
        self._device.flush(self.name)

    def mark_deleted(self, indices: Iterable[int]) -> None:
        """Deletes records, durably. Raises `OSError`."""
        for index in indices:
            self.deletions.add(index)
        self._write(*self.deletions.encode())
        self._device.flush(self.name)

    def read(self, targets: Sequence[Target]) -> list[Entry | None]:
        """Reads adjacent records in one call into their pages. Returns the entry of each record, None for one that is not an intact
        record of this generation and place; pages are not verified. Raises `OSError`.
        """
        header = self.header
        staging = _Staging()
        blocks, buffers, copies = [], [], []
        for target in targets:
            block = staging.take(BLOCK_BYTES)
            pages = self._page_buffers(target.page, staging, copy=False)
            blocks.append(block)
            buffers += [block, *pages]
            if pages[0] is not target.page:
                copies.append((target.page, pages[0]))
        self._device.read(self.name, header.record_offset_bytes(targets[0].record), buffers)
        for page, staged in copies:
            page[:] = staged[: len(page)]
        placed = zip(blocks, targets, strict=True)
        return [disk_format.decode_record(block, header.generation, target.record) for block, target in placed]

    def _page_buffers(self, page: memoryview, staging: _Staging, *, copy: bool) -> list[memoryview]:
        """Returns aligned buffers of a page and its padding: the page itself where it can be used, else a staged one."""
        padded_bytes = self.header.record_bytes - BLOCK_BYTES
        if len(page) % ALIGNMENT_BYTES or address_of(page) % ALIGNMENT_BYTES:
            staged = staging.take(padded_bytes)
            if copy:
                staged[: len(page)] = page
                staged[len(page) :] = bytes(padded_bytes - len(page))
            return [staged]
        rest = padded_bytes - len(page)
        if rest == 0:
            return [page]
        padding = staging.take(BLOCK_BYTES)[:rest]
        padding[:] = bytes(rest)
        return [page, padding]

    def _write(self, offset_bytes: int, data: bytes) -> None:
        staged = _Staging().take(len(data))
        staged[:] = data
        self._device.write(self.name, offset_bytes, [staged])


class Head(NamedTuple):
    """What a segment file says of itself. `entries` has all places; None without a valid footer."""

    header: SegmentHeader
    deletions: Deletions
    entries: list[Entry] | None


def read_head(device: Device, name: str, file_bytes: int) -> Head | None:
    """Reads the blocks before the records. Returns None if the file has no valid header. Raises `OSError`."""
    blocks = min(_HEAD_BLOCKS_FIRST, file_bytes // BLOCK_BYTES)
    if blocks < _HEAD_BLOCKS_MIN:
        return None
    first = aligned_buffer(blocks * BLOCK_BYTES)
    device.read(name, 0, [first])
    header = SegmentHeader.decode(first[:BLOCK_BYTES])
    if header is None or header.file_bytes > file_bytes or header.records > disk_format.RECORDS_MAX:
        return None
    data = first
    if header.head_blocks * BLOCK_BYTES > len(first):
        data = aligned_buffer(header.head_blocks * BLOCK_BYTES)
        device.read(name, 0, [data])
    footer = data[header.footer_offset_bytes : header.head_blocks * BLOCK_BYTES]
    return Head(header, Deletions.decode(data, header.generation), disk_format.decode_footer(footer, header))


def scan(device: Device, name: str, header: SegmentHeader) -> Iterator[tuple[int, Entry]]:
    """Returns the intact records of a segment, with their pages verified. Raises `OSError`."""
    at_once = max(1, CHUNK_BYTES_MAX // header.record_bytes)
    buffer = aligned_buffer(at_once * header.record_bytes)
    for first in range(0, header.records, at_once):
        part = buffer[: min(at_once, header.records - first) * header.record_bytes]
        device.read(name, header.record_offset_bytes(first), [part])
        for begin in range(0, len(part), header.record_bytes):
            index = first + begin // header.record_bytes
            entry = disk_format.decode_record(part[begin : begin + BLOCK_BYTES], header.generation, index)
            page = part[begin + BLOCK_BYTES : begin + BLOCK_BYTES + header.page_bytes]
            if entry is not None and entry.length == header.page_bytes and disk_format.is_page_intact(entry, page):
                yield index, entry


class _Memory(threading.local):
    def __init__(self) -> None:
        self.buffer = aligned_buffer(CHUNK_BYTES_MAX + MIB)


_memory = _Memory()


class _Staging:
    """Aligned pieces of this thread's memory, in use until the next `_Staging` of the thread."""

    def __init__(self) -> None:
        self._used = 0

    def take(self, size_bytes: int) -> memoryview:
        begin = self._used
        end = begin + -(-size_bytes // BLOCK_BYTES) * BLOCK_BYTES
        if end > len(_memory.buffer):
            return aligned_buffer(size_bytes)
        self._used = end
        return _memory.buffer[begin : begin + size_bytes]


def _chunks(buffers: Sequence[memoryview]) -> Iterator[tuple[int, list[memoryview]]]:
    """Cuts consecutive bytes into writes of at most `CHUNK_BYTES_MAX`, with the offset of each."""
    at, part, part_bytes = 0, list[memoryview](), 0
    for whole in buffers:
        view = whole
        while len(view):
            piece = view[: CHUNK_BYTES_MAX - part_bytes]
            part.append(piece)
            part_bytes += len(piece)
            view = view[len(piece) :]
            if part_bytes == CHUNK_BYTES_MAX:
                yield at, part
                at, part, part_bytes = at + part_bytes, [], 0
    if part:
        yield at, part
