"""Copies with the checksums of page and layers: both implementations against the library's XXH3, and a source that changes
meanwhile.
"""

from __future__ import annotations

import random
import sys
import threading
from collections.abc import Iterator

import pytest

from attnstore import copying
from attnstore.copying import Checksums, address_of, checksums, copy, prepare
from attnstore.core.hashing import layer_checksums, page_checksum
from tests.samples import eventually

LINE_BYTES = 64
SHAPES = (
    *((1, size_bytes) for size_bytes in (1, 16, 241, 1_023, 1_024, 1_025, 1_088, 2_048, 4_096, 65_537, 368_640, 1_048_575)),
    *((2, 1_024), (3, 1_000), (5, 2_048), (7, 3_072), (30, 12_288), (4, 240), (6, 64)),
)
"""(layers, layer bytes), around the ends of the algorithm's stripes (64 bytes) and blocks (1,024), and real pages."""


def expected(data: bytes | bytearray | memoryview, layer_bytes: int) -> Checksums:
    return page_checksum(data), layer_checksums(data, layer_bytes)


class Target:
    """Memory at a chosen offset from a cache line, between guards."""

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
@pytest.mark.parametrize(("layers", "layer_bytes"), SHAPES)
def test_bytes_arrive_with_their_checksums_wherever_they_lie(
    compiled: bool, layers: int, layer_bytes: int, soon_used: bool
) -> None:
    assert (copying._compilation.result is not None) is compiled
    source = random.Random(layer_bytes).randbytes(layers * layer_bytes)
    for misalignment in (0, 1, 8, 33):
        target = Target(len(source), misalignment)
        assert copy(target.view, address_of(memoryview(source)), layer_bytes, soon_used=soon_used) == expected(source, layer_bytes)
        assert target.view == source
        assert not target.has_touched_guards()
        assert (
            checksums(target.view, layer_bytes) == checksums(target.view.toreadonly(), layer_bytes) == expected(source, layer_bytes)
        )
        assert target.view == source


def test_the_checksum_of_a_layer_is_the_one_that_it_has_alone() -> None:
    source = random.Random(3).randbytes(4 * 2_048)
    alone = b"".join(page_checksum(source[at : at + 2_048]).to_bytes(8, "little") for at in range(0, len(source), 2_048))
    assert checksums(memoryview(source), 2_048)[1] == layer_checksums(source, 2_048) == alone


def test_the_compiled_loop_is_xxh3_for_a_thousand_shapes() -> None:
    prepare()
    assert copying._compilation.result is not None
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    dice = random.Random(seed)
    source = dice.randbytes(64 << 10)
    for _ in range(1_000):
        layers, layer_bytes = dice.randrange(1, 8), 1_024 * dice.randrange(1, 6)
        begin = dice.randrange(20_000)
        part = memoryview(source)[begin : begin + layers * layer_bytes]
        target = Target(len(part), dice.randrange(2) * dice.randrange(LINE_BYTES))
        assert copy(target.view, address_of(part), layer_bytes, soon_used=bool(dice.randrange(2))) == expected(part, layer_bytes)
        assert target.view == part


@pytest.mark.parametrize("soon_used", [True, False])
@pytest.mark.parametrize(("layers", "layer_bytes"), [(4, 1_024), (1, 4_100), (98, 1_024)])
def test_a_source_that_changes_meanwhile_gives_the_checksums_of_what_arrived(
    compiled: bool, layers: int, layer_bytes: int, soon_used: bool
) -> None:
    """Otherwise a writer could make the node store bytes that do not match the announced checksum."""
    del compiled
    size_bytes = layers * layer_bytes
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
            made = copy(target.view, address_of(memoryview(source)), layer_bytes, soon_used=soon_used)
            assert made == expected(target.view, layer_bytes)
    finally:
        done.set()
        scribbler.join()


def test_a_process_compiles_once_it_has_copied_enough_and_goes_on_meanwhile(fresh: copying._Compilation) -> None:
    source = bytes(range(256)) * 16
    target = bytearray(4_096)
    for _ in range(2):
        assert copy(memoryview(target), address_of(memoryview(source)), 2_048) == expected(source, 2_048)
    assert fresh.result is None
    assert copy(memoryview(target), address_of(memoryview(source)), 1_024) == expected(source, 1_024)
    assert eventually(lambda: fresh.result is not None, within_s=120.0)
    assert copy(memoryview(target), address_of(memoryview(source)), 1_024) == expected(source, 1_024)
    assert target == source


def test_without_numba_a_process_copies_as_well(fresh: copying._Compilation, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(copying, "_can_compile", lambda: False)
    prepare()
    source = bytes(range(256)) * 64
    for _ in range(3):
        target = memoryview(bytearray(len(source)))
        assert copy(target, address_of(memoryview(source)), 4_096) == checksums(target, 4_096) == expected(source, 4_096)
    assert fresh.result is None
    assert not [thread for thread in threading.enumerate() if thread.name == "attnstore-compile"]


def test_a_machine_on_which_nothing_compiles_copies_as_well(fresh: copying._Compilation, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "attnstore.copying.kernel", None)  # its import raises now
    prepare()
    assert fresh.result is None
    source = bytes(range(256)) * 64
    target = bytearray(len(source))
    assert copy(memoryview(target), address_of(memoryview(source)), 1_024) == expected(source, 1_024)
    assert target == source


def test_a_destination_that_is_read_only_is_refused(compiled: bool) -> None:
    del compiled
    with pytest.raises(TypeError):
        copy(memoryview(bytes(2_048)), address_of(memoryview(bytes(2_048))), 1_024)
