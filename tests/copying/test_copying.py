"""Copies with their checksums: both ways of copying against the library's XXH3, and a source that changes meanwhile."""

from __future__ import annotations

import random
import sys
import threading
from collections.abc import Iterator

import pytest

from attnstore import copying
from attnstore.copying import address_of, copy, prepare
from attnstore.core.hashing import page_checksum
from tests.samples import eventually

LINE_BYTES = 64
SIZES = (
    *(241, 255, 256, 257, 319, 320, 321),
    *(1023, 1024, 1025, 1087, 1088, 1089, 2047, 2048, 2049, 4096),
    *(12_288, 65_537, 368_640, 1_048_575),
)
"""Around the ends of the algorithm's stripes (64 bytes) and blocks (1,024), and real pages."""


class Target:
    """Memory at a chosen distance from the beginning of a cache line, between guards."""

    def __init__(self, size_bytes: int, misalignment: int) -> None:
        self.memory = bytearray(b"\xee") * (size_bytes + 4 * LINE_BYTES)
        self.begin = -address_of(memoryview(self.memory)) % LINE_BYTES + LINE_BYTES + misalignment
        self.end = self.begin + size_bytes
        self.view = memoryview(self.memory)[self.begin : self.end]

    def has_touched_guards(self) -> bool:
        return set(self.memory[: self.begin] + self.memory[self.end :]) != {0xEE}


@pytest.fixture(params=["compiled", "not compiled"])
def compiled(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    prepare()
    if request.param == "not compiled":
        monkeypatch.setattr(copying, "_compilation", copying._Compilation(1 << 60))
    return request.param == "compiled"


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[copying._Compilation]:
    """A process that has copied nothing yet, and compiles after 10,000 bytes."""
    compilation = copying._Compilation(10_000)
    monkeypatch.setattr(copying, "_compilation", compilation)
    yield compilation
    for thread in threading.enumerate():
        if thread.name == "attnstore-compile":
            thread.join()


@pytest.mark.parametrize("soon_used", [True, False])
@pytest.mark.parametrize("size_bytes", SIZES)
def test_bytes_arrive_with_their_checksum_wherever_they_lie(compiled: bool, size_bytes: int, soon_used: bool) -> None:
    assert (copying._compilation.result is not None) is compiled
    source = random.Random(size_bytes).randbytes(size_bytes)
    for misalignment in (0, 1, 8, 33):
        target = Target(size_bytes, misalignment)
        checksum = copy(target.view, address_of(memoryview(source)), soon_used=soon_used)
        assert target.view == source
        assert checksum == page_checksum(source)
        assert not target.has_touched_guards()


def test_the_compiled_loop_is_xxh3_for_a_thousand_sizes() -> None:
    from attnstore.copying.kernel import copy_and_hash

    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    dice = random.Random(seed)
    source = dice.randbytes(20_000)
    for _ in range(1_000):
        size_bytes = dice.randrange(241, 10_000)
        begin = dice.randrange(10_000)
        part = memoryview(source)[begin : begin + size_bytes]
        target = Target(size_bytes, dice.randrange(2) * dice.randrange(LINE_BYTES))
        checksum = copy_and_hash(address_of(target.view), address_of(part), size_bytes, bool(dice.randrange(2)))
        assert checksum == page_checksum(part)
        assert target.view == part


@pytest.mark.parametrize("soon_used", [True, False])
@pytest.mark.parametrize("size_bytes", [4_096, 4_100, 100_007])
def test_a_source_that_changes_meanwhile_gives_the_checksum_of_what_arrived(
    compiled: bool, size_bytes: int, soon_used: bool
) -> None:
    """Otherwise a writer could have the node take bytes that are not those of the announced checksum."""
    del compiled
    source = bytearray(size_bytes)
    done = threading.Event()

    def scribble() -> None:
        number = 0
        while not done.is_set():
            number = (number + 1) % 256
            source[:] = bytes((number,)) * size_bytes

    scribbler = threading.Thread(target=scribble)
    scribbler.start()
    target = Target(size_bytes, 0)
    try:
        for _ in range(300):
            checksum = copy(target.view, address_of(memoryview(source)), soon_used=soon_used)
            assert checksum == page_checksum(target.view)
    finally:
        done.set()
        scribbler.join()


def test_a_process_compiles_once_it_has_copied_enough_and_goes_on_meanwhile(fresh: copying._Compilation) -> None:
    source = bytes(range(256)) * 16
    target = bytearray(4_096)
    for _ in range(2):
        assert copy(memoryview(target), address_of(memoryview(source))) == page_checksum(source)
    assert fresh.result is None
    assert copy(memoryview(target), address_of(memoryview(source))) == page_checksum(source)
    assert eventually(lambda: fresh.result is not None, within_s=120.0)
    assert copy(memoryview(target), address_of(memoryview(source))) == page_checksum(source)
    assert target == source


def test_without_numba_a_process_copies_as_well(fresh: copying._Compilation, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(copying, "_can_compile", lambda: False)
    prepare()
    source = bytes(range(256)) * 64
    for _ in range(3):
        assert copy(memoryview(bytearray(len(source))), address_of(memoryview(source))) == page_checksum(source)
    assert fresh.result is None
    assert not [thread for thread in threading.enumerate() if thread.name == "attnstore-compile"]


def test_a_machine_on_which_nothing_compiles_copies_as_well(fresh: copying._Compilation, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "attnstore.copying.kernel", None)  # its import raises now
    prepare()
    assert fresh.result is None
    source = bytes(range(256)) * 64
    target = bytearray(len(source))
    assert copy(memoryview(target), address_of(memoryview(source))) == page_checksum(source)
    assert target == source


def test_a_destination_that_is_read_only_is_refused(compiled: bool) -> None:
    del compiled
    with pytest.raises(TypeError):
        copy(memoryview(bytes(2_048)), address_of(memoryview(bytes(2_048))))


@pytest.mark.parametrize("size_bytes", [1, 16, 240, 1_000])
def test_small_copies_need_no_loop(compiled: bool, size_bytes: int) -> None:
    del compiled
    source = random.Random(size_bytes).randbytes(size_bytes)
    target = bytearray(size_bytes)
    assert copy(memoryview(target), address_of(memoryview(source))) == page_checksum(source)
    assert target == source
