"""The disk format: golden files, torn blocks, and blocks of other generations."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from attnstore.spill import format as disk_format
from attnstore.spill.check import check
from attnstore.spill.device import DirectoryDevice
from attnstore.spill.errors import DiskRefused
from attnstore.spill.format import (
    BLOCK_BYTES,
    RECORDS_MAX,
    Deletions,
    SegmentHeader,
    Superblock,
    decode_footer,
    decode_record,
    encode_footer,
    encode_record,
    records_in,
    segment_bytes_for,
)
from attnstore.spill.recovery import SUPERBLOCK_NAME
from tests.spill.pages import entry, opened, read, recovered

GOLDEN = Path(__file__).parent / "golden"
HEADER = SegmentHeader(generation=7, store=bytes(16), tenant="t", page_bytes=600, records=40)
BLOCKS = {
    "superblock": Superblock(bytes(16), life=1, deletions_seen=2, sequence=3).encode(),
    "header": HEADER.encode(),
    "footer": encode_footer(7, [entry(key) for key in range(40)])[:BLOCK_BYTES],
    "record": encode_record(7, 5, entry(5)),
    "bitmap": Deletions(7).encode()[1],
}


def _copied(tmp_path: Path, version: str = "v1") -> Path:
    directory = tmp_path / "disk"
    shutil.copytree(GOLDEN / version, directory)
    return directory


def test_a_disk_of_version_1_is_read_by_every_later_build(tmp_path: Path) -> None:
    disk = opened(DirectoryDevice(_copied(tmp_path)))
    found = recovered(disk)
    assert sorted(found) == [0, 1, 3, 4, 5, 6, 7, 8], "page 2 was deleted"
    assert set(read(disk, found).values()) == {"ok"}
    assert disk.deletions_seen == 11
    disk.close()


def test_the_golden_disk_is_verified_offline(tmp_path: Path) -> None:
    report = check(_copied(tmp_path))
    assert (report.pages, report.deleted_pages, report.damaged_pages, report.unsealed_segments) == (8, 1, 0, 1)
    assert report.pages_by_tenant == {"t": 8}
    assert report.is_whole


@pytest.mark.parametrize(("version", "flags"), [(2, 0), (1, 1)])
def test_a_disk_of_another_version_is_refused_and_not_changed(tmp_path: Path, version: int, flags: int) -> None:
    directory = _copied(tmp_path)
    data = (directory / SUPERBLOCK_NAME).read_bytes()
    other = Superblock(bytes(16), 1, 0, 50, version, flags).encode()
    (directory / SUPERBLOCK_NAME).write_bytes(other + data[BLOCK_BYTES:])
    before = {path.name: path.read_bytes() for path in directory.iterdir()}
    with pytest.raises(DiskRefused, match=f"version {version}"):
        opened(DirectoryDevice(directory))
    assert {path.name: path.read_bytes() for path in directory.iterdir()} == before
    opened(DirectoryDevice(directory), reset=True).close()
    assert check(directory).pages == 0


@pytest.mark.parametrize("kind", BLOCKS)
def test_a_block_with_any_byte_changed_is_no_block(kind: str) -> None:
    def decoded(block: bytes) -> object:
        head = bytes(BLOCK_BYTES) + block + bytes(BLOCK_BYTES)
        return {
            "superblock": lambda: Superblock.decode(block),
            "header": lambda: SegmentHeader.decode(block),
            "footer": lambda: decode_footer(block + BLOCKS["footer"], HEADER),
            "record": lambda: decode_record(block, 7, 5),
            "bitmap": lambda: Deletions.decode(head, 7).sequence or None,
        }[kind]()

    whole = BLOCKS[kind]
    if kind != "footer":  # the second block of this one is wrong, so it is None anyway
        assert decoded(whole) is not None
    for at in range(BLOCK_BYTES):
        assert decoded(whole[:at] + bytes([whole[at] ^ 0x40]) + whole[at + 1 :]) is None, at


def test_blocks_of_another_generation_or_place_are_told_apart() -> None:
    assert decode_record(BLOCKS["record"], 8, 5) is None
    assert decode_record(BLOCKS["record"], 7, 4) is None
    footer = encode_footer(7, [entry(key) for key in range(40)])
    assert decode_footer(footer, HEADER) == [entry(key) for key in range(40)]
    assert decode_footer(footer, SegmentHeader(8, bytes(16), "t", 600, 40)) is None
    assert decode_footer(footer[BLOCK_BYTES:] + footer[:BLOCK_BYTES], HEADER) is None


def test_the_later_of_two_intact_bitmaps_counts() -> None:
    deletions = Deletions(7)
    head = bytearray(3 * BLOCK_BYTES)
    for index in (3, RECORDS_MAX - 1):
        deletions.add(index)
        at, block = deletions.encode()
        head[at : at + BLOCK_BYTES] = block
    assert 3 in Deletions.decode(head, 7)
    assert RECORDS_MAX - 1 in Deletions.decode(head, 7)
    head[at] ^= 1
    assert 3 in Deletions.decode(head, 7)
    assert RECORDS_MAX - 1 not in Deletions.decode(head, 7)
    assert 3 not in Deletions.decode(head, 8)


@pytest.mark.parametrize("page_bytes", [1, 600, 4096, 4097, 368_640, 2 << 20, 40 << 20])
def test_a_segment_is_filled_and_never_overflows(page_bytes: int) -> None:
    for capacity_bytes in (1 << 30, 100 << 30):
        segment_bytes = segment_bytes_for(capacity_bytes)
        records = records_in(segment_bytes, page_bytes)
        fits = [
            SegmentHeader(1, bytes(16), "", page_bytes, number).file_bytes <= segment_bytes for number in (records, records + 1)
        ]
        assert fits[0] or records == 0
        assert not fits[1] or records == RECORDS_MAX


def test_the_smallest_and_the_largest_disk_have_segments_in_bounds() -> None:
    assert segment_bytes_for(1) == disk_format.SEGMENT_BYTES_MIN
    assert segment_bytes_for(1 << 50) == disk_format.SEGMENT_BYTES_MAX
