"""The disk tier against the bare disk, in one run.

Owns: the measured calls. Invariant: bare and ours move the same bytes of the same files, or of files made alike, in alternating
rounds, an even number, because the first call of a round may meet another disk than the second; a ratio is the median of the
rounds' ratios. The bare calls are `preadv` and `pwritev` with O_DIRECT on aligned memory.
"""

from __future__ import annotations

import os
import random
import shutil
import statistics
import time
import tracemalloc
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final

from attnstore.core.hashing import page_checksum
from attnstore.core.layout import DType, PageLayout
from attnstore.limits import MIB
from attnstore.spill.device import DirectoryDevice, aligned_buffer
from attnstore.spill.disk import Read, SpillDisk, Verdict, Write
from attnstore.spill.format import BLOCK_BYTES, Entry, SegmentHeader, encode_footer, record_bytes, records_in
from attnstore.spill.recovery import read_superblock
from attnstore.spill.segment import Location, index_of, segment_of
from attnstore.spill.segments import FLUSH_BYTES

LAYOUT: Final = PageLayout(layers=30, kv_heads=3, head_dim=64, dtype=DType.BF16)
PAGES_AT_ONCE: Final = 8
READERS: Final = 3
SEGMENT_BYTES: Final = 256 * MIB
GB: Final = 1e9
_Placed = tuple[Location, Entry]


@dataclass(frozen=True, slots=True)
class Rate:
    """Of one round, or the medians of several."""

    gb_per_s: float
    cpu_s_per_gb: float


@dataclass(frozen=True, slots=True)
class Compared:
    """Medians of both, and of the ratio of ours to bare, whose values `ratios` has in the order of the rounds."""

    bare: Rate
    ours: Rate
    ratio: float
    ratios: tuple[float, ...]


def entries(first: int, number: int, checksum: int = 0) -> list[Entry]:
    """Returns entries of pages with distinct hashes."""
    canonical = LAYOUT.canonical()
    names = [key.to_bytes(32, "little") for key in range(first, first + number)]
    return [Entry(bytes(32), name, canonical, checksum, LAYOUT.page_bytes) for name in names]


class Bench:
    """A directory that is filled with random pages, and measured."""

    def __init__(self, directory: Path, pages: int) -> None:
        self._directory = directory
        self._memory = aligned_buffer(PAGES_AT_ONCE * LAYOUT.page_bytes)
        self._memory[:] = os.urandom(len(self._memory))
        cuts = range(0, len(self._memory), LAYOUT.page_bytes)
        self._pages = [self._memory[begin : begin + LAYOUT.page_bytes] for begin in cuts]
        self._checksums = [page_checksum(page) for page in self._pages]
        self._rounded = pages - pages % PAGES_AT_ONCE

    def write(self, rounds: int) -> Compared:
        """Appends pages to a fresh directory, and writes as many bytes to fresh files, each round."""
        compared = []
        for number in range(rounds):
            calls = (self._write_bare, self._write_ours)
            results = [call() for call in (calls if number % 2 else calls[::-1])]
            compared.append(results if number % 2 else results[::-1])
        return _medians(compared)

    def read(self, rounds: int) -> Compared:
        """Reads pages at random, with `READERS` threads, from the files of the last written round."""
        disk = SpillDisk.open(DirectoryDevice(self._directory / "ours"), 1 << 40, segment_bytes=SEGMENT_BYTES)
        places = [(record.location, record.entry) for record in disk.recovered()]
        header = SegmentHeader(0, bytes(16), "t", LAYOUT.page_bytes, records_in(SEGMENT_BYTES, LAYOUT.page_bytes))
        files = {
            number: os.open(self._directory / "ours" / f"segment-{number:07}", os.O_RDONLY | os.O_DIRECT)
            for number in {segment_of(place) for place, _ in places}
        }

        def bare(chosen: list[_Placed]) -> None:
            buffer = aligned_buffer(record_bytes(LAYOUT.page_bytes))
            for place, _ in chosen:
                offset_bytes = header.record_offset_bytes(index_of(place))
                assert os.preadv(files[segment_of(place)], [buffer], offset_bytes) == len(buffer)

        def ours(chosen: list[_Placed]) -> None:
            page = aligned_buffer(LAYOUT.page_bytes)
            for place, entry in chosen:
                assert disk.read([Read(place, entry, page)]) == [Verdict.OK]

        draw = random.Random(1)
        compared = []
        with ThreadPoolExecutor(READERS) as threads:
            for number in range(rounds):
                results = []
                for call in (bare, ours) if number % 2 else (ours, bare):
                    draw.shuffle(places)
                    parts = [places[reader::READERS] for reader in range(READERS)]
                    results.append(_rate(partial(_all, threads, call, parts), len(places) * LAYOUT.page_bytes))
                compared.append(results if number % 2 else results[::-1])
        for file in files.values():
            os.close(file)
        disk.close()
        return _medians(compared)

    def _write_ours(self) -> Rate:
        disk = SpillDisk.open(DirectoryDevice(self._directory / "ours"), 1 << 40, segment_bytes=SEGMENT_BYTES, reset=True)
        batches = []
        for first in range(0, self._rounded, PAGES_AT_ONCE):
            described = zip(entries(first, PAGES_AT_ONCE), self._checksums, self._pages, strict=True)
            batches.append([Write(entry._replace(checksum=checksum), page) for entry, checksum, page in described])

        def append() -> None:
            for batch in batches:
                left = batch
                while left:
                    left = left[len(disk.append("t", left)) :]
            disk.close()

        return _rate(append, self._rounded * LAYOUT.page_bytes)

    def _write_bare(self) -> Rate:
        directory = self._directory / "bare"
        directory.mkdir()
        of_page = record_bytes(LAYOUT.page_bytes)
        buffer = aligned_buffer(PAGES_AT_ONCE * of_page)
        buffer[: len(self._memory)] = self._memory

        def write() -> None:
            at, unflushed, file, number = SEGMENT_BYTES, 0, -1, 0
            for _ in range(0, self._rounded, PAGES_AT_ONCE):
                if at + len(buffer) > SEGMENT_BYTES:
                    if file >= 0:
                        os.fdatasync(file)
                        os.close(file)
                    file, number = os.open(directory / str(number), os.O_RDWR | os.O_CREAT | os.O_DIRECT, 0o600), number + 1
                    os.posix_fallocate(file, 0, SEGMENT_BYTES)
                    at = unflushed = 0
                assert os.pwritev(file, [buffer], at) == len(buffer)
                at, unflushed = at + len(buffer), unflushed + len(buffer)
                if unflushed >= FLUSH_BYTES:
                    os.fdatasync(file)
                    unflushed = 0
            os.fdatasync(file)
            os.close(file)

        rate = _rate(write, self._rounded * LAYOUT.page_bytes)
        shutil.rmtree(directory)
        return rate


@dataclass(frozen=True, slots=True)
class Restart:
    """Opening a directory that has so many pages, and listing them. `index_bytes_per_page` is the memory of the disk and of a table
    from hash to location, together.
    """

    pages: int
    seconds: float
    index_bytes_per_page: float


def restart(directory: Path, pages: int) -> Restart:
    """Makes a directory with the heads of full segments (their records are holes, which a restart does not read) and opens it."""
    SpillDisk.open(DirectoryDevice(directory), 1 << 40, segment_bytes=SEGMENT_BYTES).close()
    store = _store_of(directory)
    records = records_in(SEGMENT_BYTES, LAYOUT.page_bytes)
    made = 0
    for number in range(-(-pages // records)):
        header = SegmentHeader(1 + number, store, "t", LAYOUT.page_bytes, records)
        described = [entry._replace(sequence=made + index) for index, entry in enumerate(entries(made, records))]
        made += records
        path = directory / f"segment-{number:07}"
        path.write_bytes(header.encode() + bytes(2 * BLOCK_BYTES) + encode_footer(header.generation, described))
        os.truncate(path, SEGMENT_BYTES)
    os.sync()
    began = time.perf_counter()
    disk = SpillDisk.open(DirectoryDevice(directory), 1 << 40, segment_bytes=SEGMENT_BYTES)
    listed = sum(1 for _ in disk.recovered())
    seconds = time.perf_counter() - began
    disk.close()
    assert listed == made
    tracemalloc.start()
    disk = SpillDisk.open(DirectoryDevice(directory), 1 << 40, segment_bytes=SEGMENT_BYTES)
    table = {record.entry.hash: record.location for record in disk.recovered()}
    index_bytes = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    disk.close()
    return Restart(len(table), seconds, index_bytes / len(table))


def _store_of(directory: Path) -> bytes:
    device = DirectoryDevice(directory, read_only=True)
    block = read_superblock(device, device.names())
    device.close()
    assert block is not None
    return block.store


def _all(threads: ThreadPoolExecutor, call: Callable[[list[_Placed]], None], parts: Sequence[list[_Placed]]) -> None:
    """Runs the call for each part, at once, until all are done."""
    list(threads.map(call, parts))


def _rate(call: Callable[[], object], moved_bytes: int) -> Rate:
    wall_s, cpu_s = time.perf_counter(), time.process_time()
    call()
    wall_s, cpu_s = time.perf_counter() - wall_s, time.process_time() - cpu_s
    return Rate(moved_bytes / GB / wall_s, cpu_s / (moved_bytes / GB))


def _medians(rounds: Sequence[Sequence[Rate]]) -> Compared:
    def of(rates: Sequence[Rate]) -> Rate:
        return Rate(statistics.median(rate.gb_per_s for rate in rates), statistics.median(rate.cpu_s_per_gb for rate in rates))

    bare, ours = [pair[0] for pair in rounds], [pair[1] for pair in rounds]
    ratios = tuple(mine.gb_per_s / limit.gb_per_s for limit, mine in rounds)
    return Compared(of(bare), of(ours), statistics.median(ratios), ratios)
