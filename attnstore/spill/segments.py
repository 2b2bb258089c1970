"""The segments of a disk: which is open, sealed, free or abandoned, and what a fault does to one.

Owns: the states of segments, the space that their files take, and older records of a page. Invariants: a segment is in one state; a
file that held one tenant's pages never holds another's; a segment whose write or flush failed is abandoned as a whole, durably, and
never used again, and if that is impossible nothing is written any more. The caller serializes everything but `current`.

    state      next
    free       open (`writable`); removed, if another tenant needs the space
    open       sealed (`seal`, `oldest`)
    sealed     free (`discard`)
    any        abandoned (`guarded`, after an `OSError`)
"""

from __future__ import annotations

import errno
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from itertools import count
from typing import Final

from attnstore.errors import InvalidArgument
from attnstore.limits import MIB
from attnstore.logs import get_logger
from attnstore.spill.device import Device
from attnstore.spill.errors import DiskFull, DiskReadOnly, SegmentLost
from attnstore.spill.format import TENANT_BYTES_MAX, SegmentHeader, records_in
from attnstore.spill.recovery import bad_name, segment_name
from attnstore.spill.segment import Location, Segment, generation_of, index_of, segment_of

_log = get_logger(__name__)

FLUSH_BYTES: Final = 64 * MIB
FLUSH_S: Final = 5.0
"""What a loss of power may take: records younger or fewer than this."""
LIFE_BITS: Final = 40
_READ_ONLY: Final = {errno.EROFS, errno.EACCES, errno.EPERM}


class Segments:
    """See the module. `failing` are segments that reads found bad; `replaced` has the older record of a page by the newer one,
    and `generations` gives numbers that no segment ever had.
    """

    def __init__(self, device: Device, store: bytes, capacity_bytes: int, segment_bytes: int) -> None:
        self._device = device
        self._store = store
        self._capacity_bytes = capacity_bytes
        self._segment_bytes = segment_bytes
        self.generations = count()
        self._read_only: str | None = None
        self.all: dict[int, Segment] = {}
        self.sealed: dict[int, Segment] = {}
        self.open: dict[tuple[str, int], Segment] = {}
        self.free: dict[int, Segment] = {}
        self.bad_bytes: dict[int, int] = {}
        self.replaced: dict[Location, Location] = {}
        self.unflushed: dict[int, tuple[float, int]] = {}
        self.failing: set[int] = set()
        self.now_s: Callable[[], float] = time.monotonic

    @property
    def used_bytes(self) -> int:
        """Bytes of all segment files."""
        return sum(segment.file_bytes for segment in self.all.values()) + sum(self.bad_bytes.values())

    @property
    def is_read_only(self) -> bool:
        """Whether the disk accepts no writes."""
        return self._read_only is not None

    def writable(self, tenant: str, page_bytes: int) -> Segment:
        """Returns an open segment with a free place."""
        segment = self.open.get((tenant, page_bytes))
        if segment is not None:
            return segment
        records = records_in(self._segment_bytes, page_bytes)
        if page_bytes < 1 or records == 0:
            raise InvalidArgument(f"a page of {page_bytes} bytes does not fit into a segment of {self._segment_bytes} bytes")
        if len(tenant.encode()) > TENANT_BYTES_MAX:
            raise InvalidArgument(f"the tenant's name has more than {TENANT_BYTES_MAX} bytes")
        segment = self._empty(tenant)
        header = SegmentHeader(next(self.generations), self._store, tenant, page_bytes, records)
        with self.guarded(segment):
            segment.start(header)
        self.free.pop(segment.number, None)
        self.open[tenant, page_bytes] = segment
        return segment

    def _empty(self, tenant: str) -> Segment:
        """Returns a segment without records, whose file never held another tenant's."""
        for segment in self.free.values():
            if segment.header.tenant == tenant and segment.file_bytes == self._segment_bytes:
                return segment
        if self.free and self.used_bytes + self._segment_bytes > self._capacity_bytes:
            segment = next(iter(self.free.values()))
            self.unlink(segment)
        if self.used_bytes + self._segment_bytes > self._capacity_bytes:
            raise DiskFull("no segment is free")
        number = next(number for number in count() if number not in self.all and number not in self.bad_bytes)
        try:
            self._device.create(segment_name(number), self._segment_bytes)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise DiskFull(f"the file system has no room for a segment: {error.strerror}") from None
            raise self.stopped(error) from None
        segment = Segment(self._device, number, segment_name(number), self._segment_bytes, no_records(self._store, ""))
        self.all[number] = self.free[number] = segment
        return segment

    def seal(self, segment: Segment) -> None:
        segment.seal()
        self.unflushed.pop(segment.number, None)
        del self.open[segment.header.tenant, segment.header.page_bytes]
        segment.entries = []
        self.sealed[segment.number] = segment

    def discard(self, segment: Segment) -> None:
        """Ends the generation of a segment, so that nothing of it is ever found again."""
        header = no_records(self._store, segment.header.tenant, next(self.generations))
        self._forget(segment)
        with self.guarded(segment):
            segment.start(header)
        self.all[segment.number] = self.free[segment.number] = segment
        self.replaced = {new: old for new, old in self.replaced.items() if self.current(new) and self.current(old)}

    def unlink(self, segment: Segment) -> None:
        self._forget(segment)
        try:
            self._device.unlink(segment.name)
        except OSError as error:
            self.all[segment.number] = segment
            raise self.stopped(error) from None

    def _forget(self, segment: Segment) -> None:
        self.sealed.pop(segment.number, None)
        self.free.pop(segment.number, None)
        self.unflushed.pop(segment.number, None)
        self.failing.discard(segment.number)
        self.all.pop(segment.number, None)
        key = (segment.header.tenant, segment.header.page_bytes)
        if self.open.get(key) is segment:
            del self.open[key]

    def oldest(self) -> Segment | None:
        """Returns the segment to reclaim: the sealed one of the lowest generation. Without one, an open segment is sealed, so that
        what is reinserted does not go into it. Raises `SegmentLost`, `DiskReadOnly`.
        """
        if not self.sealed and self.open:
            segment = min(self.open.values(), key=lambda segment: segment.header.generation)
            with self.guarded(segment):
                self.seal(segment)
        return min(self.sealed.values(), key=lambda segment: segment.header.generation, default=None)

    def current(self, place: Location) -> Segment | None:
        segment = self.all.get(segment_of(place))
        return segment if segment is not None and segment.header.generation == generation_of(place) else None

    def flush_due(self, segment: Segment) -> None:
        since_s, unflushed_bytes = self.unflushed.get(segment.number, (self.now_s(), 0))
        if unflushed_bytes >= FLUSH_BYTES or (unflushed_bytes and self.now_s() - since_s >= FLUSH_S):
            segment.flush()
            del self.unflushed[segment.number]

    def flush_all(self) -> None:
        """Makes all records durable. Raises `SegmentLost`, `DiskReadOnly`."""
        for number in list(self.unflushed):
            with self.guarded(self.all[number]):
                self.all[number].flush()
            del self.unflushed[number]

    def delete(self, locations: Sequence[Location]) -> None:
        """See `SpillDisk.delete`."""
        self.require_writable()
        by_segment: defaultdict[int, list[int]] = defaultdict(list)
        for newest in locations:
            place: Location | None = newest
            while place is not None:
                segment = self.current(place)
                if segment is not None and index_of(place) not in segment.deletions:
                    by_segment[segment.number].append(index_of(place))
                place = self.replaced.pop(place, None)
        lost: SegmentLost | None = None
        for number, indices in by_segment.items():
            segment = self.all.get(number)
            if segment is None:
                continue  # abandoned meanwhile
            try:
                with self.guarded(segment):
                    segment.mark_deleted(indices)
            except SegmentLost as error:
                lost = error
        if lost is not None:
            raise lost

    def shrink(self) -> None:
        """Removes files beyond the capacity: free ones first, then the oldest. Raises `DiskReadOnly`."""
        while self.used_bytes > self._capacity_bytes:
            segment = next(iter(self.free.values()), None) or self.oldest()
            if segment is None:
                return  # abandoned files alone take the capacity: nothing is ever written
            self.unlink(segment)

    def require_writable(self) -> None:
        if self._read_only is not None:
            raise DiskReadOnly(self._read_only)

    def stopped(self, error: OSError) -> DiskReadOnly:
        """Nothing is written any more: what is on the disk could otherwise contradict what was promised."""
        self._read_only = f"spill directory {self._device.name} accepts no writes: {error.strerror or error}"
        _log.error("the spill directory accepts no writes; pages on it are still read", path=self._device.name, error=str(error))
        return DiskReadOnly(self._read_only)

    def guarded(self, segment: Segment) -> _Guard:
        return _Guard(self, segment)

    def abandon(self, segment: Segment, error: OSError) -> SegmentLost | DiskReadOnly:
        """Takes a failed segment's file out of use, durably, and with it every older record that its own replaced."""
        if error.errno in _READ_ONLY:
            return self.stopped(error)
        self._forget(segment)
        self.bad_bytes[segment.number] = segment.file_bytes
        try:
            self._device.rename(segment.name, bad_name(segment.number))
        except OSError as failed:
            return self.stopped(failed)
        _log.error("a segment on the disk is abandoned", path=self._device.name, segment=segment.number, error=str(error))
        older = [old for new, old in self.replaced.items() if segment_of(new) == segment.number]
        self.replaced = {new: old for new, old in self.replaced.items() if segment_of(new) != segment.number}
        try:
            self.delete(older)
        except SegmentLost as other:
            _log.error("another segment failed with it", path=self._device.name, segment=other.segment)
        except DiskReadOnly as stopped:
            return stopped
        return SegmentLost(segment.number, error.strerror or str(error))


class _Guard:
    """Turns an `OSError` inside into the loss of the segment, or of all writes."""

    def __init__(self, segments: Segments, segment: Segment) -> None:
        self._segments = segments
        self._segment = segment

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, OSError):
            raise self._segments.abandon(self._segment, error) from error


def no_records(store: bytes, tenant: str, generation: int = 0) -> SegmentHeader:
    """Returns the header of an empty generation."""
    return SegmentHeader(generation, store, tenant, 0, 0)
