"""What a directory contains after any end of the process or of the power.

Owns: the reading of segments at start. Invariants: a footer of its header's generation is trusted, because every read verifies; a
segment without one is read whole, and only records whose page is intact count. Of records of the same page the one with the highest
sequence counts, and the caller deletes the others before it serves anything. Nothing is written here.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Final

from attnstore.spill.device import Device, aligned_buffer
from attnstore.spill.errors import DiskRefused
from attnstore.spill.format import BLOCK_BYTES, EMPTY_ENTRY, VERSION, Entry, SegmentHeader, Superblock
from attnstore.spill.segment import Location, Segment, location, read_head, scan

SUPERBLOCK_NAME: Final = "superblock"
SUPERBLOCK_PLACES: Final = 2
_SEGMENT_NAME = re.compile(r"(segment|bad)-([0-9]{7})")
_THREADS: Final = 4


def segment_name(number: int) -> str:
    """Returns the name of a segment's file."""
    return f"segment-{number:07}"


def bad_name(number: int) -> str:
    """Returns the name of an abandoned segment's file, which is never read again."""
    return f"bad-{number:07}"


@dataclass(slots=True)
class FoundSegment:
    """A segment file with records. `entries` has all places, with `EMPTY_ENTRY` where no record is; a place that was never written
    and one whose record is damaged look alike. `is_sealed` is False if it has no valid footer.
    """

    segment: Segment
    entries: list[Entry]
    is_sealed: bool

    def live(self) -> list[tuple[Location, Entry]]:
        """Returns the records that are not deleted."""
        segment = self.segment
        return [
            (location(segment.header.generation, segment.number, index), entry)
            for index, entry in enumerate(self.entries)
            if entry.length and index not in segment.deletions
        ]


@dataclass(slots=True)
class Found:
    """The files of a directory: segments with records, those without, those without a valid header, and the numbers of files that
    cannot be read or were abandoned.
    """

    full: list[FoundSegment] = field(default_factory=list)
    free: list[Segment] = field(default_factory=list)
    headless: list[Segment] = field(default_factory=list)
    unreadable: dict[int, OSError] = field(default_factory=dict)
    bad_bytes: dict[int, int] = field(default_factory=dict)


def our_names(names: Sequence[str]) -> list[str]:
    """Returns the names of files that a node made. A directory may contain others, such as `lost+found`; they are never touched."""
    return [name for name in names if name == SUPERBLOCK_NAME or _SEGMENT_NAME.fullmatch(name)]


def read_superblock(device: Device, names: Sequence[str]) -> Superblock | None:
    """Returns the valid superblock with the highest sequence, or None for a directory without a store.

    Raises `DiskRefused` for another version's store and for segments without a valid superblock.
    """
    found: list[Superblock] = []
    if SUPERBLOCK_NAME in names:
        data = memoryview(bytearray())
        if device.size_bytes(SUPERBLOCK_NAME) >= SUPERBLOCK_PLACES * BLOCK_BYTES:
            data = device_read(device, SUPERBLOCK_NAME, SUPERBLOCK_PLACES * BLOCK_BYTES)
        blocks = [data[begin : begin + BLOCK_BYTES] for begin in range(0, len(data), BLOCK_BYTES)]
        found = [block for block in map(Superblock.decode, blocks) if block is not None]
    for block in found:
        if block.version != VERSION or block.flags:
            raise DiskRefused(
                f"spill directory {device.name} is of version {block.version} with flags {block.flags:#x}, and this is version "
                f"{VERSION}; use another directory, or wipe it"
            )
    if not found and any(map(_SEGMENT_NAME.fullmatch, names)):
        raise DiskRefused(f"spill directory {device.name} has segments but no valid superblock; use another directory, or wipe it")
    return max(found, key=lambda block: block.sequence, default=None)


def device_read(device: Device, name: str, size_bytes: int) -> memoryview:
    """Returns the first bytes of a file. Raises `OSError`."""
    data = aligned_buffer(size_bytes)
    device.read(name, 0, [data])
    return data


def find(device: Device, names: Sequence[str], store: bytes) -> Found:
    """Reads every segment, several at once. A file that cannot be read is reported, not raised.

    Raises `DiskRefused` for a segment of another store, such as one that was copied into the directory.
    """
    found = Found()
    numbers: list[int] = []
    for name in names:
        match = _SEGMENT_NAME.fullmatch(name)
        if match is None:
            continue
        number = int(match[2])
        if match[1] == "bad":
            found.bad_bytes[number] = device.size_bytes(name)
        else:
            numbers.append(number)

    def one(number: int) -> FoundSegment | Segment | OSError:
        try:
            return _found(device, number, store)
        except OSError as error:
            return error

    if len(numbers) == 1:
        results = [one(numbers[0])]
    else:
        with ThreadPoolExecutor(_THREADS, "spill-recovery") as threads:
            results = list(threads.map(one, numbers))
    for number, result in zip(numbers, results, strict=True):
        if isinstance(result, OSError):
            found.unreadable[number] = result
        elif isinstance(result, Segment):
            (found.free if result.header.generation else found.headless).append(result)
        else:
            found.full.append(result)
    return found


def superseded(found: Sequence[FoundSegment]) -> dict[int, list[int]]:
    """Returns the indices, by segment number, of live records of which another segment or place has a later one."""
    latest: dict[tuple[str, bytes], tuple[int, int, int]] = {}
    losers: dict[int, list[int]] = {}
    for each in found:
        segment = each.segment
        for index, entry in enumerate(each.entries):
            if not entry.length or index in segment.deletions:
                continue
            key = (segment.header.tenant, entry.identity)
            mine = (entry.sequence, segment.number, index)
            other = latest.get(key)
            winner, loser = (mine, other) if other is None or mine > other else (other, mine)
            latest[key] = winner
            if loser is not None:
                losers.setdefault(loser[1], []).append(loser[2])
    return losers


def _found(device: Device, number: int, store: bytes) -> FoundSegment | Segment:
    name = segment_name(number)
    file_bytes = device.size_bytes(name)
    head = read_head(device, name, file_bytes)
    if head is not None and head.header.store != store:
        raise DiskRefused(f"spill directory {device.name}: {name} belongs to another store; move it away, or wipe the directory")
    if head is None:
        return Segment(device, number, name, file_bytes, SegmentHeader(0, store, "", 0, 0))
    segment = Segment(device, number, name, file_bytes, head.header)
    segment.deletions = head.deletions
    if head.header.records == 0:
        return segment
    if head.entries is not None:
        return FoundSegment(segment, head.entries, is_sealed=True)
    entries = [EMPTY_ENTRY] * head.header.records
    for index, entry in scan(device, name, head.header):
        entries[index] = entry
    return FoundSegment(segment, entries, is_sealed=False)
