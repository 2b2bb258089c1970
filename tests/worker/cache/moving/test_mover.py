"""Threads, reads in parts and the quarantine by themselves: where threads wait for each other, a test opens every gate."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import NoReturn

import pytest

from attnstore.core.hashing import BlockHash
from attnstore.testing import ManualClock
from attnstore.types import Lease, MatchResult, PageStatus, ReadResult
from attnstore_worker.cache.moving.load import Load, LoadEnd, LoadPlan, Prompt, SearchPlan
from attnstore_worker.cache.moving.mover import LoadJob, Mover, Threads, read_in_parts
from attnstore_worker.cache.store.base import OnLayer
from attnstore_worker.testing import FixedPlanner
from tests.samples import eventually

WAIT_S = 20
WAIT_MS = WAIT_S * 1e3


def passed(gate: threading.Event) -> None:
    assert gate.wait(WAIT_S)


def refuse_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: threading.Thread) -> NoReturn:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)


class TestThreads:
    def test_calls_run_in_the_order_given_and_return_their_results(self) -> None:
        threads, order = Threads("test", 1), list[int]()
        gate = threading.Event()
        first = threads.submit(lambda: passed(gate))

        def call(number: int) -> int:
            order.append(number)
            return number

        futures = [threads.submit(partial(call, number)) for number in range(5)]
        gate.set()
        assert [future.result(WAIT_S) for future in futures] == [*range(5)]
        assert first.result(WAIT_S) is None
        assert order == [*range(5)]

    def test_at_most_as_many_calls_run_at_once_as_there_may_be_threads(self) -> None:
        threads, gate = Threads("test", 2), threading.Event()
        running, names = threading.Semaphore(0), list[str]()

        def call() -> None:
            names.append(threading.current_thread().name)
            running.release()
            passed(gate)

        futures = [threads.submit(call) for _ in range(6)]
        assert all(running.acquire(timeout=WAIT_S) for _ in range(2))
        assert names == ["attnstore-test"] * 2
        assert sum(thread.name == "attnstore-test" for thread in threading.enumerate()) == 2
        assert all(thread.daemon for thread in threading.enumerate() if thread.name == "attnstore-test")
        assert not threads.wait_idle(0)
        gate.set()
        for future in futures:
            future.result(WAIT_S)
        assert threads.wait_idle(WAIT_MS)
        assert threads.submit(lambda: 7).result(WAIT_S) == 7, "a thread that has ended is replaced"

    def test_an_error_of_a_call_is_its_result_and_the_next_call_runs(self) -> None:
        threads = Threads("test", 1)
        failed, good = threads.submit(lambda: 1 // 0), threads.submit(lambda: 1)
        with pytest.raises(ZeroDivisionError):
            failed.result(WAIT_S)
        assert good.result(WAIT_S) == 1

    def test_a_call_that_no_thread_can_run_is_refused_and_never_runs(self, monkeypatch: pytest.MonkeyPatch) -> None:
        threads, runs = Threads("test", 2), list[str]()
        with monkeypatch.context() as patch:
            refuse_threads(patch)
            with pytest.raises(RuntimeError, match="new thread"):
                threads.submit(lambda: runs.append("refused"))
            assert threads.wait_idle(0)
        threads.submit(lambda: runs.append("run")).result(WAIT_S)
        assert runs == ["run"]

    def test_a_call_for_which_no_second_thread_starts_is_run_by_the_first(self, monkeypatch: pytest.MonkeyPatch) -> None:
        threads, gate = Threads("test", 2), threading.Event()
        first = threads.submit(lambda: passed(gate))
        with monkeypatch.context() as patch:
            refuse_threads(patch)
            second = threads.submit(threading.get_ident)
        gate.set()
        first.result(WAIT_S)
        assert second.result(WAIT_S) != threading.get_ident()
        assert threads.wait_idle(WAIT_MS)

    def test_a_call_for_which_no_thread_starts_runs_once_if_a_thread_is_free_by_then(self, monkeypatch: pytest.MonkeyPatch) -> None:
        threads, began, gate = Threads("test", 2), threading.Event(), threading.Event()

        def call() -> None:
            began.set()
            passed(gate)

        first = threads.submit(call)
        passed(began)

        def refuse(_: threading.Thread) -> NoReturn:
            gate.set()
            first.result(WAIT_S)  # its thread now looks for the next call
            raise RuntimeError("can't start new thread")

        runs: list[int] = []
        with monkeypatch.context() as patch:
            patch.setattr(threading.Thread, "start", refuse)
            second = threads.submit(lambda: runs.append(1))
        second.result(WAIT_S)
        assert runs == [1]
        assert threads.wait_idle(WAIT_MS)


class TestReadInParts:
    """Pages of one byte, two of them in each half."""

    def setup_method(self) -> None:
        self.readers = Threads("test", 1)
        self.memory = memoryview(bytearray(4))
        pages = [self.memory[index : index + 1] for index in range(4)]
        self.halves = (pages[:2], pages[2:])
        self.taken: list[int] = []

    def read(self, part: range, buffers: Sequence[memoryview]) -> int:
        for index, buffer in zip(part, buffers, strict=False):
            buffer[0] = index + 1
        return len(part)

    def take(self, part: range, buffers: Sequence[memoryview]) -> None:
        assert [buffer[0] for buffer in buffers[: len(part)]] == [index + 1 for index in part]
        self.taken += part

    @pytest.mark.parametrize("pages", range(8))
    def test_every_page_is_taken_once_and_in_order(self, pages: int) -> None:
        assert read_in_parts(self.readers, pages, self.halves, self.read, self.take) == pages
        assert self.taken == [*range(pages)]

    def test_the_next_part_is_read_while_one_is_taken(self) -> None:
        reading, read_parts = threading.Event(), list[range]()

        def read(part: range, buffers: Sequence[memoryview]) -> int:
            read_parts.append(part)
            if part.start == 2:
                reading.set()
            return self.read(part, buffers)

        def take(part: range, buffers: Sequence[memoryview]) -> None:
            if part.start == 0:
                passed(reading)
                assert range(4, 6) not in read_parts, "its half is not empty yet"
            self.take(part, buffers)

        assert read_in_parts(self.readers, 6, self.halves, read, take) == 6
        assert read_parts == [range(2), range(2, 4), range(4, 6)]

    @pytest.mark.parametrize("missing", range(6))
    def test_a_part_with_a_missing_page_is_the_last_one_read(self, missing: int) -> None:
        read_parts: list[range] = []

        def read(part: range, buffers: Sequence[memoryview]) -> int:
            read_parts.append(part)
            self.read(part, buffers)
            return part.index(missing) if missing in part else len(part)

        assert read_in_parts(self.readers, 6, self.halves, read, self.take) == missing
        assert self.taken == [*range(missing)]
        assert len(read_parts) == missing // 2 + 1

    @pytest.mark.parametrize("broken", [0, 2, 4])
    def test_a_read_that_raises_ends_the_call_after_the_pages_before_it_are_taken(self, broken: int) -> None:
        def read(part: range, buffers: Sequence[memoryview]) -> int:
            if part.start == broken:
                raise OSError("the source is gone")
            return self.read(part, buffers)

        with pytest.raises(OSError, match="gone"):
            read_in_parts(self.readers, 6, self.halves, read, self.take)
        assert self.taken == [*range(broken)]

    def test_a_take_that_raises_ends_the_call_only_when_the_read_in_flight_has_ended(self) -> None:
        reading, gate = threading.Event(), threading.Event()

        def read(part: range, buffers: Sequence[memoryview]) -> int:
            if part.start == 2:
                reading.set()
                passed(gate)
            return self.read(part, buffers)

        def take(_part: range, _buffers: Sequence[memoryview]) -> NoReturn:
            passed(reading)
            raise ValueError("no room")

        with ThreadPoolExecutor(1) as caller:
            call = caller.submit(read_in_parts, self.readers, 6, self.halves, read, take)
            passed(reading)
            with pytest.raises(TimeoutError):
                call.result(0.05)
            gate.set()
            with pytest.raises(ValueError, match="room"):
                call.result(WAIT_S)
        assert bytes(self.memory) == bytes((1, 2, 3, 4)), "the read in flight wrote its pages before the call ended"
        assert self.readers.wait_idle(WAIT_MS)
        assert bytes(self.memory) == bytes((1, 2, 3, 4)), "and no third part was read"

    def test_a_reader_that_cannot_start_raises_and_writes_nothing(self, monkeypatch: pytest.MonkeyPatch) -> None:
        with monkeypatch.context() as patch:
            refuse_threads(patch)
            with pytest.raises(RuntimeError, match="new thread"):
                read_in_parts(self.readers, 6, self.halves, self.read, self.take)
        assert self.readers.wait_idle(0)
        assert (bytes(self.memory), self.taken) == (bytes(4), [])


@dataclass
class GatedSource:
    """A source that has every page; each read waits for the gate before it writes."""

    error: Exception | None = None
    reading: threading.Event = field(default_factory=threading.Event)
    gate: threading.Event = field(default_factory=threading.Event)

    def match(self, hashes: Sequence[BlockHash]) -> MatchResult:
        return MatchResult((len(hashes),), None)

    def read(
        self,
        hashes: Sequence[BlockHash],
        buffers: Sequence[memoryview],
        lease: Lease | None,  # noqa: ARG002
        *,
        deadline_ms: float,  # noqa: ARG002
        on_layer: OnLayer | None = None,  # noqa: ARG002
    ) -> ReadResult:
        self.reading.set()
        passed(self.gate)
        for buffer in buffers:
            buffer[0] = 1
        if self.error is not None:
            raise self.error
        return ReadResult((PageStatus.OK,) * len(hashes), len(hashes))

    def release(self, lease: Lease | None) -> None:
        assert lease is None


class TestQuarantine:
    """Loads of three blocks, in one read; their blocks have the numbers 10, 11 and 12."""

    def setup_method(self) -> None:
        self.mover = Mover(ManualClock())
        self.memory = memoryview(bytearray(3))

    def start(self, source: GatedSource, number: int = 1) -> Load:
        load = Load(Prompt(number, 13, 4, 1, 1, 0, 3), SearchPlan(1e9), 0.0)
        pages = [self.memory[index : index + 1] for index in range(3)]
        hashes = [BlockHash(bytes([index]) * 32) for index in range(3)]
        self.mover.start(LoadJob(load, FixedPlanner(LoadPlan(0, 3, 3, 1e9)), source, hashes, pages, None))
        return load

    def released(self) -> list[int]:
        blocks: list[int] = []

        def all_released() -> bool:
            blocks.extend(self.mover.take_released())
            return not self.mover.quarantined

        assert eventually(all_released)
        return blocks

    @pytest.mark.parametrize("error", [None, OSError("the source is gone")])
    def test_blocks_are_released_only_when_no_byte_can_land_in_them(self, error: Exception | None) -> None:
        source = GatedSource(error)
        load = self.start(source)
        passed(source.reading)
        assert self.mover.cancel(load, LoadEnd.RELEASED) == range(3)
        self.mover.quarantine(load, [10, 11, 12])
        assert (self.mover.take_released(), self.mover.quarantined) == ([], 3)
        assert bytes(self.memory) == bytes(3)
        source.gate.set()
        assert self.released() == [10, 11, 12]
        assert bytes(self.memory) == bytes((1, 1, 1)), "the read had ended"
        assert self.mover.take_released() == [], "once"

    def test_a_load_that_ends_releases_its_own_blocks_and_no_others(self) -> None:
        sources = [GatedSource(), GatedSource()]
        loads = [self.start(source, number) for number, source in enumerate(sources)]
        for source, load, block in zip(sources, loads, [10, 20], strict=True):
            passed(source.reading)
            self.mover.cancel(load, LoadEnd.LATE)
            self.mover.quarantine(load, [block])
        sources[1].gate.set()
        assert eventually(lambda: self.mover.take_released() == [20])
        assert self.mover.quarantined == 1
        sources[0].gate.set()
        assert self.released() == [10]

    def test_blocks_of_a_load_that_has_ended_are_released_at_once(self) -> None:
        source = GatedSource()
        source.gate.set()
        load = self.start(source)
        assert eventually(lambda: self.finished(load))
        self.mover.quarantine(load, [10])
        assert self.mover.take_released() == [10]

    def test_a_load_whose_thread_cannot_start_holds_no_block(self, monkeypatch: pytest.MonkeyPatch) -> None:
        with monkeypatch.context() as patch:
            refuse_threads(patch)
            load = self.start(GatedSource())
        assert self.mover.cancel(load, LoadEnd.RELEASED) == range(0)
        self.mover.quarantine(load, [10])
        assert self.mover.take_released() == [10]

    def finished(self, load: Load) -> bool:
        self.mover.take(load)
        return not load.running
