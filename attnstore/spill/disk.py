"""The disk of a node: pages appended, read, deleted and reclaimed, in segments of a directory.

Owns: which segment is open, sealed, free or abandoned, the life of the directory, and what a fault of the disk does. Invariants:

- a record that is not deleted or reclaimed is found again after any end of the process, once it was flushed;
- a deletion or a reclaim that returned is durable, also for older records of the same page (`Write.replaces`);
- no read answers OK with other bytes than those that were written;
- the files take at most the capacity; a segment that failed is abandoned as a whole and never written again.

Calls block. `read` may run in several threads beside one that writes; the other calls take turns.
"""

from __future__ import annotations

import errno
import secrets
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from enum import StrEnum
from itertools import count
from typing import Final, NamedTuple

from attnstore.errors import InvalidArgument
from attnstore.logs import get_logger
from attnstore.spill import format as disk_format
from attnstore.spill.device import Device, aligned_buffer
from attnstore.spill.errors import DiskReadOnly, DiskRefused, SegmentLost
from attnstore.spill.format import (
    BLOCK_BYTES,
    Entry,
    Superblock,
    segment_bytes_for,
)
from attnstore.spill.recovery import (
    SUPERBLOCK_NAME,
    SUPERBLOCK_PLACES,
    FoundSegment,
    find,
    our_names,
    read_superblock,
    segment_name,
    superseded,
)
from attnstore.spill.segment import (
    CHUNK_BYTES_MAX,
    Location,
    Segment,
    Target,
    index_of,
    location,
)
from attnstore.spill.segments import LIFE_BITS, Segments, no_records

_log = get_logger(__name__)

READ_FAILURES_MAX: Final = 3
"""Failed reads of one segment after which it is abandoned."""


class Verdict(StrEnum):
    """What a read of one record found. After CORRUPT or FAILED the caller deletes the location, and the page is a miss."""

    OK = "ok"
    MISSING = "missing"
    CORRUPT = "corrupt"
    FAILED = "failed"


class Write(NamedTuple):
    """A page to append. `replaces` is an older record of the same page, which is deleted with the new one."""

    entry: Entry
    page: memoryview
    replaces: Location | None = None


class Read(NamedTuple):
    """A record to read into `page`, which has `entry.length` bytes."""

    location: Location
    entry: Entry
    page: memoryview


class Record(NamedTuple):
    """A record that is on the disk."""

    tenant: str
    entry: Entry
    location: Location


class SpillDisk:
    """See the module. Made by `open`."""

    def __init__(self, device: Device, capacity_bytes: int, segment_bytes: int, superblock: Superblock) -> None:
        self._device = device
        self._superblock = superblock
        self._lock = threading.RLock()
        self._segments = Segments(device, superblock.store, capacity_bytes, segment_bytes)
        self._recovered: list[FoundSegment] = []
        self._sequences = count()

    @classmethod
    def open(
        cls,
        device: Device,
        capacity_bytes: int,
        *,
        segment_bytes: int | None = None,
        reset: bool = False,
        now_s: Callable[[], float] = time.monotonic,
    ) -> SpillDisk:
        """Locks the device, checks its version and recovers what is there; `reset` wipes it first.

        Raises `DiskRefused` if it is another node's, another version's, or cannot be read or written, and `InvalidArgument` for a
        capacity below one segment.
        """
        size_bytes = segment_bytes_for(capacity_bytes) if segment_bytes is None else segment_bytes
        if capacity_bytes < size_bytes:
            raise InvalidArgument(f"the spill capacity is {capacity_bytes} bytes; it must be at least {size_bytes}, one segment")
        try:
            device.lock()
            if reset:
                # The superblock goes last: a wipe that was interrupted is refused until it is repeated.
                for name in sorted(our_names(device.names()), key=lambda name: name == SUPERBLOCK_NAME):
                    device.unlink(name)
            disk = cls(device, capacity_bytes, size_bytes, _next_life(device))
            disk._segments.now_s = now_s
            disk._recover()
        except OSError as error:
            device.close()
            raise DiskRefused(f"spill directory {device.name}: {error.strerror or error}") from None
        except BaseException:
            device.close()
            raise
        return disk

    @property
    def deletions_seen(self) -> int:
        """The position in the directory's log of deletions up to which this disk has none of the deleted pages."""
        return self._superblock.deletions_seen

    @property
    def used_bytes(self) -> int:
        """Bytes of all segment files."""
        return self._segments.used_bytes

    @property
    def segments_abandoned(self) -> int:
        """Segments that failed; their files are never used again."""
        return len(self._segments.bad_bytes)

    @property
    def is_read_only(self) -> bool:
        """Whether the disk accepts no writes."""
        return self._segments.is_read_only

    def note_deletions(self, position: int) -> None:
        """Stores `deletions_seen`, durably. Raises `DiskReadOnly`."""
        with self._lock:
            self._segments.require_writable()
            block = replace(self._superblock, deletions_seen=position, sequence=self._superblock.sequence + 1)
            try:
                _write_superblock(self._device, block)
            except OSError as error:
                raise self._segments.stopped(error) from None
            self._superblock = block

    def recovered(self) -> Iterator[Record]:
        """Returns the records found by `open`, once: no page twice, none deleted. Their pages are verified when they are read."""
        while self._recovered:
            found = self._recovered.pop()
            for place, entry in found.live():
                yield Record(found.segment.header.tenant, entry, place)

    def append(self, tenant: str, writes: Sequence[Write]) -> list[Location]:
        """Writes pages of one size. Returns the locations of the leading ones that fit into the open segment, at least one.

        They are durable after `FLUSH_BYTES` more or `flush_due`. Raises `DiskFull`, `DiskReadOnly`, `SegmentLost`, and
        `InvalidArgument` for a page or a tenant's name that no segment can hold.
        """
        with self._lock:
            self._segments.require_writable()
            segment = self._segments.writable(tenant, writes[0].entry.length)
            part = writes[: segment.header.records - len(segment.entries)]
            entries = [write.entry._replace(sequence=next(self._sequences)) for write in part]
            first = len(segment.entries)
            with self._segments.guarded(segment):
                segment.append(entries, [write.page for write in part])
                since_s, unflushed_bytes = self._segments.unflushed.get(segment.number, (self._segments.now_s(), 0))
                self._segments.unflushed[segment.number] = (since_s, unflushed_bytes + len(part) * segment.header.record_bytes)
                places = [location(segment.header.generation, segment.number, first + index) for index in range(len(part))]
                for place, write in zip(places, part, strict=True):
                    if write.replaces is not None:
                        self._segments.replaced[place] = write.replaces
                if segment.is_full:
                    self._segments.seal(segment)
                else:
                    self._segments.flush_due(segment)
            return places

    def read(self, reads: Sequence[Read]) -> list[Verdict]:
        """Reads pages, adjacent records in one call. Never raises for a fault of the disk. The bytes of a page that is not OK are
        unspecified.
        """
        verdicts = [Verdict.MISSING] * len(reads)
        for run in _runs(reads):
            for index, verdict in zip(run, self._read([reads[index] for index in run]), strict=True):
                verdicts[index] = verdict
        return verdicts

    def delete(self, locations: Sequence[Location]) -> None:
        """Deletes records and the older ones that they replace; durable when it returns.

        Raises `DiskReadOnly` if that is impossible, and `SegmentLost`, after all deletions are durable, if it cost a segment.
        """
        with self._lock:
            self._segments.delete(locations)

    def flush_due(self) -> None:
        """Makes records older than `FLUSH_S` durable and abandons a segment whose reads fail. Raises `SegmentLost`, for one segment
        a call, and `DiskReadOnly`.
        """
        with self._lock:
            for number in list(self._segments.failing):
                self._segments.failing.discard(number)
                if number in self._segments.all:
                    self._segments.require_writable()
                    raise self._segments.abandon(self._segments.all[number], OSError(errno.EIO, "its reads fail"))
            for segment in list(self._segments.open.values()):
                with self._segments.guarded(segment):
                    self._segments.flush_due(segment)

    def oldest(self) -> list[Record]:
        """Returns the live records of the segment that `reclaim` would discard; empty without one. Raises `SegmentLost`."""
        with self._lock:
            segment = self._segments.oldest()
            if segment is None:
                return []
            header = segment.header
            data = aligned_buffer(header.footer_blocks * BLOCK_BYTES)
            with self._segments.guarded(segment):
                self._device.read(segment.name, header.footer_offset_bytes, [data])
                entries = disk_format.decode_footer(data, header)
                if entries is None:
                    raise OSError(errno.EIO, "its footer is damaged")
            assert entries is not None
            live = FoundSegment(segment, entries, is_sealed=True).live()
            return [Record(segment.header.tenant, entry, place) for place, entry in live]

    def reclaim(self) -> int | None:
        """Discards the oldest segment with its records, durably, and returns its number; None if there is none.

        Raises `DiskReadOnly`, `SegmentLost`.
        """
        with self._lock:
            self._segments.require_writable()
            segment = self._segments.oldest()
            if segment is None:
                return None
            # A record that was reinserted must be durable before the older one goes.
            self._segments.flush_all()
            self._segments.discard(segment)
            return segment.number

    def close(self) -> None:
        """Seals the open segments and gives the device up. A segment that cannot be sealed is verified at the next start."""
        with self._lock:
            for segment in list(self._segments.open.values()):
                with suppress(SegmentLost, DiskReadOnly), self._segments.guarded(segment):
                    self._segments.seal(segment)
            self._device.close()

    def _read(self, reads: Sequence[Read]) -> list[Verdict]:
        """Reads adjacent records of one segment."""
        segment = self._segments.current(reads[0].location)
        live = [
            read
            for read in reads
            if segment is not None
            and index_of(read.location) not in segment.deletions
            and read.entry.length == len(read.page) == segment.header.page_bytes
        ]
        if segment is None or len(live) < len(reads):
            return [Verdict.MISSING] if len(reads) == 1 else [self._read([read])[0] for read in reads]
        try:
            found = segment.read([Target(index_of(read.location), read.page) for read in reads])
        except OSError:
            if len(reads) > 1:
                return [self._read([read])[0] for read in reads]
            segment.read_failures += 1
            if segment.read_failures >= READ_FAILURES_MAX:
                self._segments.failing.add(segment.number)
            return [Verdict.FAILED]
        return [
            Verdict.OK if _is_same(entry, read.entry) and disk_format.is_page_intact(read.entry, read.page) else Verdict.CORRUPT
            for entry, read in zip(found, reads, strict=True)
        ]

    def _recover(self) -> None:
        found = find(self._device, self._device.names(), self._superblock.store)
        self._segments.bad_bytes = found.bad_bytes
        # The life is too low if the latest superblock was damaged and the one before it counts.
        generations = [segment.header.generation for segment in (*found.free, *(each.segment for each in found.full))]
        sequences = [entry.sequence for each in found.full for entry in each.entries]
        first = max(self._superblock.life << LIFE_BITS, max(generations, default=0) + 1, max(sequences, default=0) + 1)
        self._segments.generations = self._sequences = count(first)
        for segment in found.headless:
            # Its begin was interrupted or its header is damaged: nothing in it can be trusted, nor whose it was.
            self._device.unlink(segment.name)
        for segment in found.free:
            self._segments.all[segment.number] = self._segments.free[segment.number] = segment
        for each in found.full:
            self._segments.all[each.segment.number] = self._segments.sealed[each.segment.number] = each.segment
        for number, error in found.unreadable.items():
            file_bytes = self._device.size_bytes(segment_name(number))
            header = no_records(self._superblock.store, "")
            self._segments.abandon(Segment(self._device, number, segment_name(number), file_bytes, header), error)
        self._segments.shrink()
        kept = [each for each in found.full if self._current_is(each.segment)]
        for each in kept:
            if each.is_sealed:
                continue
            with suppress(SegmentLost), self._segments.guarded(each.segment):
                if not any(entry.length for entry in each.entries):
                    self._segments.discard(each.segment)
                    continue
                each.segment.entries = each.entries
                each.segment.seal()
                each.segment.entries = []
        # After sealing: the later record must be durable before the older one goes.
        for number, indices in superseded([each for each in kept if self._current_is(each.segment)]).items():
            with suppress(SegmentLost), self._segments.guarded(self._segments.all[number]):
                self._segments.all[number].mark_deleted(indices)
        self._recovered = [each for each in kept if each.segment.number in self._segments.sealed]

    def _current_is(self, segment: Segment) -> bool:
        return self._segments.all.get(segment.number) is segment


def _next_life(device: Device) -> Superblock:
    """Begins another life of the directory, or its first. Raises `OSError`, `DiskRefused`."""
    names = device.names()
    last = read_superblock(device, names)
    if last is None:
        if SUPERBLOCK_NAME not in names:
            device.create(SUPERBLOCK_NAME, SUPERBLOCK_PLACES * BLOCK_BYTES)
        last = Superblock(secrets.token_bytes(16), life=0, deletions_seen=0, sequence=1)
        _write_superblock(device, last)  # so that both places are valid from the first life on
    block = replace(last, life=last.life + 1, sequence=last.sequence + 1)
    _write_superblock(device, block)
    return block


def _write_superblock(device: Device, block: Superblock) -> None:
    staged = aligned_buffer(BLOCK_BYTES)
    staged[:] = block.encode()
    device.write(SUPERBLOCK_NAME, block.sequence % SUPERBLOCK_PLACES * BLOCK_BYTES, [staged])
    device.flush(SUPERBLOCK_NAME)


def _is_same(found: Entry | None, expected: Entry) -> bool:
    """Returns whether a record is the expected one. A node need not remember sequences."""
    return found is not None and found[:-1] == expected[:-1]


def _runs(reads: Sequence[Read]) -> Iterator[list[int]]:
    """Returns the positions of adjacent records, of at most `CHUNK_BYTES_MAX` together."""
    run: list[int] = []
    run_bytes = 0
    for position in sorted(range(len(reads)), key=lambda position: reads[position].location):
        read_bytes = disk_format.record_bytes(reads[position].entry.length)
        adjacent = run and reads[position].location == reads[run[-1]].location + 1
        if run and not (adjacent and run_bytes + read_bytes <= CHUNK_BYTES_MAX):
            yield run
            run, run_bytes = [], 0
        run.append(position)
        run_bytes += read_bytes
    if run:
        yield run
