"""Pages and calls that the tests of the disk tier share."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from attnstore.core.hashing import page_checksum
from attnstore.core.layout import DType, PageLayout
from attnstore.spill.device import Device
from attnstore.spill.disk import Read, SpillDisk, Verdict, Write
from attnstore.spill.format import Entry
from attnstore.spill.segment import Location

LAYOUT = PageLayout(1, 1, 75, 4, DType.OPAQUE)
SEGMENT_BYTES = 64 << 10
CAPACITY_BYTES = 4 * SEGMENT_BYTES


def page(key: int, page_bytes: int = LAYOUT.page_bytes) -> bytes:
    return hashlib.shake_128(key.to_bytes(8, "little")).digest(page_bytes)


def entry(key: int, page_bytes: int = LAYOUT.page_bytes) -> Entry:
    name = hashlib.blake2b(key.to_bytes(8, "little"), digest_size=32).digest()
    return Entry(bytes(range(32)), name, LAYOUT.canonical(), page_checksum(page(key, page_bytes)), page_bytes)


def write(key: int, replaces: Location | None = None) -> Write:
    return Write(entry(key), memoryview(page(key)), replaces)


def opened(device: Device, capacity_bytes: int = CAPACITY_BYTES, *, reset: bool = False) -> SpillDisk:
    return SpillDisk.open(device, capacity_bytes, segment_bytes=SEGMENT_BYTES, reset=reset)


def store(disk: SpillDisk, keys: Sequence[int], tenant: str = "t") -> dict[int, Location]:
    """Appends pages, over as many segments as they need."""
    places: dict[int, Location] = {}
    left = list(keys)
    while left:
        for key, place in zip(left, disk.append(tenant, [write(key) for key in left]), strict=False):
            places[key] = place
        left = [key for key in left if key not in places]
    return places


def read(disk: SpillDisk, places: dict[int, Location]) -> dict[int, Verdict]:
    """Reads pages, and asserts that no wrong byte is answered as OK."""
    pages = {key: memoryview(bytearray(LAYOUT.page_bytes)) for key in places}
    verdicts = disk.read([Read(place, entry(key), pages[key]) for key, place in places.items()])
    answers = dict(zip(places, verdicts, strict=True))
    assert all(pages[key] == page(key) for key, verdict in answers.items() if verdict is Verdict.OK)
    return answers


def recovered(disk: SpillDisk) -> dict[int, Location]:
    """The pages that a disk found at its start, by key."""
    keys = {entry(key).hash: key for key in range(200)}
    records = list(disk.recovered())
    found = {keys[record.entry.hash]: record.location for record in records}
    assert len(found) == len(records), "a page is listed twice"
    return found
