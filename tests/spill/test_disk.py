"""The disk tier on real directories, and with each operation of a simulated disk failing."""

from __future__ import annotations

import errno
import os
import threading
from pathlib import Path

import pytest

from attnstore.errors import InvalidArgument
from attnstore.spill.device import DirectoryDevice
from attnstore.spill.disk import Read, SpillDisk, Verdict, Write
from attnstore.spill.errors import DiskFault, DiskFull, DiskReadOnly, DiskRefused, SegmentLost
from attnstore.spill.format import BLOCK_BYTES
from attnstore.spill.segment import Location, generation_of, segment_of
from attnstore.testing.simulated_disk import FLUSH, READ, WRITE, SimulatedDisk
from tests.spill.pages import CAPACITY_BYTES, SEGMENT_BYTES, entry, opened, page, read, recovered, store, write


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return tmp_path / "disk"


def _killed(disk: SpillDisk) -> None:
    """Ends a disk as a kill does: nothing is sealed."""
    disk._device.close()


def test_pages_and_deletions_survive_a_close_and_a_kill(directory: Path) -> None:
    disk = opened(DirectoryDevice(directory))
    places = store(disk, range(9))
    disk.delete([places[4]])
    disk.close()
    disk = opened(DirectoryDevice(directory))
    found = recovered(disk)
    assert sorted(found) == [0, 1, 2, 3, 5, 6, 7, 8]
    store(disk, [20])
    disk.delete([found[0]])
    _killed(disk)
    disk = opened(DirectoryDevice(directory))
    found = recovered(disk)
    assert sorted(found) == [1, 2, 3, 5, 6, 7, 8, 20]
    assert set(read(disk, found).values()) == {Verdict.OK}
    assert directory.stat().st_mode & 0o777 == 0o700
    disk.close()


def test_the_position_in_the_log_of_deletions_survives(directory: Path) -> None:
    disk = opened(DirectoryDevice(directory))
    assert disk.deletions_seen == 0
    disk.note_deletions(41)
    disk.note_deletions(42)
    _killed(disk)
    disk = opened(DirectoryDevice(directory))
    assert disk.deletions_seen == 42
    disk.close()


def test_a_rewritten_page_is_deleted_with_its_older_records(directory: Path) -> None:
    disk = opened(DirectoryDevice(directory))
    (first,) = store(disk, [1]).values()
    (second,) = disk.append("t", [write(1, replaces=first)])
    (third,) = disk.append("t", [write(1, replaces=second)])
    disk.delete([third])
    _killed(disk)
    assert recovered(opened(DirectoryDevice(directory))) == {}


def test_the_oldest_segment_is_reclaimed_and_full_is_said_before_anything_is_written(directory: Path) -> None:
    disk = opened(DirectoryDevice(directory))
    places = store(disk, range(CAPACITY_BYTES // SEGMENT_BYTES * 6))
    with pytest.raises(DiskFull):
        disk.append("t", [write(100)])
    assert disk.used_bytes == CAPACITY_BYTES
    oldest = {record.location for record in disk.oldest()}
    assert oldest == {place for place in places.values() if segment_of(place) == segment_of(places[0])}
    assert disk.reclaim() == segment_of(places[0])
    answers = read(disk, places)
    assert {key for key, verdict in answers.items() if verdict is Verdict.MISSING} == {
        key for key, place in places.items() if place in oldest
    }
    store(disk, [199])
    _killed(disk)
    assert not {key for key, place in places.items() if place in oldest} & recovered(opened(DirectoryDevice(directory))).keys()


def test_a_file_that_held_a_tenants_pages_never_holds_anothers(directory: Path) -> None:
    disk = opened(DirectoryDevice(directory), SEGMENT_BYTES)
    store(disk, [1], "one")
    inode = (directory / "segment-0000000").stat().st_ino
    disk.reclaim()
    store(disk, [2], "one")
    assert (directory / "segment-0000000").stat().st_ino == inode
    held = os.open(directory / "segment-0000000", os.O_RDONLY)
    disk.reclaim()
    (place,) = store(disk, [3], "two").values()
    assert os.fstat(held).st_nlink == 0
    os.close(held)
    assert read(disk, {3: place}) == {3: Verdict.OK}
    disk.close()


def test_a_lower_capacity_drops_the_oldest_segments(directory: Path) -> None:
    disk = opened(DirectoryDevice(directory))
    places = store(disk, range(16))
    disk.close()
    disk = opened(DirectoryDevice(directory), 2 * SEGMENT_BYTES)
    newest = sorted({segment_of(place) for place in places.values()})[-2:]
    assert disk.used_bytes <= 2 * SEGMENT_BYTES
    assert sorted(recovered(disk)) == [key for key, place in places.items() if segment_of(place) in newest]
    disk.close()


def test_a_clock_that_is_set_back_loses_nothing(directory: Path) -> None:
    now_s = [1_000.0]
    disk = SpillDisk.open(DirectoryDevice(directory), CAPACITY_BYTES, segment_bytes=SEGMENT_BYTES, now_s=lambda: now_s[0])
    first = store(disk, [1])[1]
    now_s[0] = 0.0
    disk.append("t", [write(1, replaces=first)])
    disk.flush_due()
    disk.delete([first])
    _killed(disk)
    assert sorted(recovered(opened(DirectoryDevice(directory)))) == [1]


def test_a_directory_is_one_nodes(directory: Path) -> None:
    disk = opened(DirectoryDevice(directory))
    with pytest.raises(DiskRefused, match="another node uses it"):
        opened(DirectoryDevice(directory))
    disk.close()
    opened(DirectoryDevice(directory)).close()


def test_what_is_no_directory_or_has_anothers_segments_is_refused(directory: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DiskRefused, match="file"):
        DirectoryDevice(tmp_path / "file")
    with pytest.raises(DiskRefused, match="No such"):
        DirectoryDevice(tmp_path / "no" / "such")
    with pytest.raises(InvalidArgument, match="at least"):
        opened(DirectoryDevice(directory), 10)
    other = opened(DirectoryDevice(tmp_path / "other"))
    store(other, [1])
    other.close()
    disk = opened(DirectoryDevice(directory))
    disk.close()
    (tmp_path / "other" / "segment-0000000").rename(directory / "segment-0000007")
    with pytest.raises(DiskRefused, match="another store"):
        opened(DirectoryDevice(directory))
    (directory / "superblock").unlink()
    with pytest.raises(DiskRefused, match="no valid superblock"):
        opened(DirectoryDevice(directory))
    (directory / "lost+found").mkdir()
    opened(DirectoryDevice(directory), reset=True).close()
    assert (directory / "lost+found").is_dir()


@pytest.mark.parametrize("kind", [WRITE, FLUSH])
def test_a_failed_write_or_flush_abandons_the_segment_and_keeps_its_deletions(kind: str) -> None:
    simulated = SimulatedDisk()
    disk = opened(simulated)
    places = store(disk, range(9))
    simulated.fail_kinds, simulated.fail_at = frozenset({kind}), 0
    with pytest.raises(SegmentLost) as lost:
        disk.delete([places[0]])
    assert lost.value.segment == segment_of(places[0])
    assert disk.segments_abandoned == 1
    left = {key: place for key, place in places.items() if segment_of(place) != lost.value.segment}
    assert {key for key, verdict in read(disk, places).items() if verdict is Verdict.OK} == left.keys()
    store(disk, [30])
    again = opened(SimulatedDisk({name: bytes(file.current) for name, file in simulated.files.items()}))
    assert recovered(again).keys() == left.keys() | {30}


def test_a_read_only_disk_is_read_and_refuses_deletions() -> None:
    simulated = SimulatedDisk()
    disk = opened(simulated)
    places = store(disk, range(9))
    simulated.fail_kinds, simulated.fail_at = frozenset({WRITE}), 0
    simulated.fail_errno, simulated.fail_always = errno.EROFS, True
    for _ in range(2):
        with pytest.raises(DiskReadOnly):
            disk.delete([places[0]])
    with pytest.raises(DiskReadOnly):
        store(disk, [30])
    assert disk.is_read_only
    del places[0]
    assert set(read(disk, places).values()) == {Verdict.OK}


def test_failed_reads_are_misses_and_three_abandon_the_segment() -> None:
    simulated = SimulatedDisk()
    disk = opened(simulated)
    places = store(disk, range(3))
    simulated.fail_kinds, simulated.fail_at, simulated.fail_always = frozenset({READ}), 0, True
    assert set(read(disk, places).values()) == {Verdict.FAILED}
    simulated.fail_at = None
    with pytest.raises(SegmentLost):
        disk.flush_due()
    assert set(read(disk, places).values()) == {Verdict.MISSING}
    assert recovered(opened(SimulatedDisk({name: bytes(file.current) for name, file in simulated.files.items()}))) == {}


def test_a_file_system_without_room_is_full_and_the_disk_goes_on_with_what_it_has() -> None:
    disk = opened(SimulatedDisk(room_bytes=2 * SEGMENT_BYTES))
    with pytest.raises(DiskFull, match="no room"):
        store(disk, range(40))
    disk.reclaim()
    (place,) = store(disk, [100]).values()
    assert read(disk, {100: place}) == {100: Verdict.OK}


@pytest.mark.parametrize("kind", [READ, WRITE, FLUSH])
def test_every_operation_fails_in_turn_and_no_deletion_returns(kind: str) -> None:
    """SQLite's way: the n-th operation fails, for every n until a run has none left to fail."""
    failures = 0
    for number in range(200):
        simulated = SimulatedDisk()
        simulated.fail_kinds, simulated.fail_at = frozenset({kind}), number
        kept = _calls(simulated)
        failures += simulated.fail_at < 0
        is_over = simulated.fail_at >= 0
        simulated.fail_at = None
        if kept is not None:
            left = opened(SimulatedDisk({name: bytes(file.current) for name, file in simulated.files.items()}))
            found = recovered(left)
            assert not found.keys() & kept, f"operation {number}"
            read(left, found)
        if is_over:
            break
    else:
        pytest.fail("the run never ended")
    assert failures >= 5


def _calls(simulated: SimulatedDisk) -> set[int] | None:
    """A node's calls; every fault is an exception that the node knows. Returns the pages whose deletion was acknowledged."""
    try:
        disk = opened(simulated)
    except DiskRefused:
        return None
    deleted: set[int] = set()
    places: dict[int, Location] = {}
    for keys in (range(0, 4), range(4, 8), range(8, 12)):
        try:
            places |= store(disk, keys)
            read(disk, places)
        except DiskFault:
            continue
        doomed = [key for key in (keys[0], keys[1]) if key in places]
        try:
            disk.delete([places.pop(key) for key in doomed])
        except SegmentLost:
            pass  # durable nevertheless
        except DiskFault:
            continue
        deleted |= set(doomed)
    try:
        disk.oldest()
        disk.reclaim()
    except DiskFault:
        pass
    disk.close()
    return deleted


def test_every_byte_of_a_store_is_flipped_and_no_wrong_byte_is_read() -> None:
    simulated = SimulatedDisk()
    disk = opened(simulated)
    disk.delete([store(disk, range(3))[1]])
    disk.close()
    whole = {name: bytes(file.current) for name, file in simulated.files.items()}
    missed = 0
    name, data = "segment-0000000", whole["segment-0000000"]
    for at in range(0, len(data), 13):  # 13 and the blocks' size have no common factor: every kind of field is met
        damaged = whole | {name: data[:at] + bytes([data[at] ^ 0x10]) + data[at + 1 :]}
        again = opened(SimulatedDisk(damaged))
        found = recovered(again)
        verdicts = read(again, found)
        missed += {key for key, verdict in verdicts.items() if verdict is Verdict.OK} != {0, 2}
    assert missed > 500


@pytest.mark.parametrize("place", [0, 1])
def test_either_superblock_may_be_damaged_and_no_generation_is_used_twice(place: int) -> None:
    simulated = SimulatedDisk()
    disk = opened(simulated)
    (before,) = store(disk, [1]).values()
    disk.reclaim()
    disk.close()
    whole = {name: bytes(file.current) for name, file in simulated.files.items()}
    data = bytearray(whole["superblock"])
    data[place * BLOCK_BYTES + 50] ^= 1
    disk = opened(SimulatedDisk(whole | {"superblock": bytes(data)}))
    (after,) = store(disk, [2]).values()
    assert segment_of(after) == segment_of(before)
    assert generation_of(after) > generation_of(before) + 1, "the reclaim took a generation too"


def test_a_file_system_without_direct_io_is_used_through_its_cache(
    directory: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    real_open = os.open

    def without_direct(path: str, flags: int, *arguments: int, **options: int) -> int:
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return real_open(path, flags, *arguments, **options)

    monkeypatch.setattr(os, "open", without_direct)
    disk = opened(DirectoryDevice(directory))
    places = store(disk, range(9))
    assert set(read(disk, places).values()) == {Verdict.OK}
    disk.close()
    assert sum("no direct I/O" in record.getMessage() for record in caplog.records) == 1


def test_readers_run_beside_a_writer_that_reclaims_and_see_no_wrong_byte(directory: Path) -> None:
    disk = opened(DirectoryDevice(directory))
    places = store(disk, range(12))
    stop, failed = threading.Event(), list[BaseException]()

    def reads() -> None:
        try:
            while not stop.is_set():
                read(disk, dict(places))
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=reads) for _ in range(2)]
    for thread in threads:
        thread.start()
    for key in range(12, 120):
        try:
            store(disk, [key], tenant="tu"[key // 8 % 2])
        except DiskFull:
            disk.reclaim()
    stop.set()
    for thread in threads:
        thread.join()
    assert not failed
    disk.close()


def test_pages_of_any_alignment_are_written_and_read(directory: Path) -> None:
    disk = SpillDisk.open(DirectoryDevice(directory), 1 << 26)
    for page_bytes in (4096, 4608, 5000, 3 << 20):
        data = memoryview(bytearray(page(1, page_bytes) + b"?"))[:-1]
        described = entry(1, page_bytes)
        (place,) = disk.append("t", [Write(described, data)])
        into = memoryview(bytearray(page_bytes + 1))[1:]
        assert disk.read([Read(place, described, into)]) == [Verdict.OK]
        assert into == data
    disk.close()
