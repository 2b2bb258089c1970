"""The choice of a transport for each call, stopping a transfer, and the fall-back if a transport does not open."""

from __future__ import annotations

import concurrent.futures
import threading
from concurrent.futures import Future

import pytest

from attnstore import PageStatus, errors
from attnstore.client.base import (
    BulkChoice,
    BulkUnavailable,
    ReadPlan,
    Transfer,
    TransportName,
    WritePlan,
    all_layers,
    checked_transport,
    wait_out,
)
from attnstore.client.transports.parts import PartWorkers
from attnstore.clock import Deadline
from attnstore.errors import ClientClosed, DeadlineExceeded, InvalidArgument, ProtocolError
from attnstore.testing.clock import ManualClock
from tests.channels import read_plan, write_plan
from tests.samples import make_batch

BATCH = make_batch(1, model="choice")
RETRY_MS = 30_000


class FakeTransport:
    """Counts its calls; each raises `failure`."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.calls = 0
        self.failure: errors.AttnStoreError | None = None

    def read(self, _plan: ReadPlan) -> None:
        self._called()

    def write(self, plan: WritePlan) -> tuple[PageStatus, ...]:
        self._called()
        return (PageStatus.STORED,) * len(plan.hashes)

    def close(self) -> None: ...

    def _called(self) -> None:
        self.calls += 1
        if self.failure is not None:
            raise self.failure


class Offered:
    """A choice between two transports, and plans for them."""

    def __init__(self, wanted: TransportName = "auto") -> None:
        self.clock = ManualClock()
        self.shm, self.tcp = FakeTransport("shm"), FakeTransport("tcp")
        self.choice = BulkChoice(wanted, self.clock)
        self.choice.offer((self.shm, self.tcp), (self.tcp,))

    def read(self) -> bool:
        return self.choice.read(read_plan(BATCH, BATCH.buffers()))

    def write(self) -> tuple[PageStatus, ...] | None:
        return self.choice.write(write_plan(BATCH))

    def calls(self) -> tuple[int, int]:
        return self.shm.calls, self.tcp.calls


def test_the_first_transport_offered_is_used() -> None:
    offered = Offered()
    assert offered.read()
    assert offered.write() == (PageStatus.STORED,)
    assert offered.calls() == (1, 1), "shm has no writer"


def test_one_that_does_not_open_is_replaced_with_a_warning_and_left_alone_for_a_while(caplog: pytest.LogCaptureFixture) -> None:
    offered = Offered()
    offered.shm.failure = BulkUnavailable("blocked")
    assert offered.read()
    assert offered.calls() == (1, 1)
    assert "blocked" in caplog.text
    assert offered.read()
    assert offered.calls() == (1, 2)
    offered.clock.advance_ms(RETRY_MS)
    offered.shm.failure = None
    assert offered.read()
    assert offered.calls() == (2, 2)


def test_when_none_opens_grpc_is_left_and_they_come_back() -> None:
    offered = Offered()
    offered.shm.failure = offered.tcp.failure = BulkUnavailable("blocked")
    assert not offered.read()
    assert not offered.choice.has_readers
    assert not offered.choice.has_writers
    assert offered.write() is None
    assert offered.calls() == (1, 1)
    offered.clock.advance_ms(RETRY_MS)
    assert offered.choice.has_readers
    assert offered.choice.has_writers


def test_parts_that_landed_before_a_fall_back_are_read_again() -> None:
    """Of two channels, one received its part and the other could not connect, and the next transport reads everything."""
    batch = make_batch(2, model="fall back")

    class Half(FakeTransport):
        def read(self, plan: ReadPlan) -> None:
            plan.landing.whole(0)[:] = bytes(batch.layout.page_bytes)
            plan.landing.settle(0, True)
            raise BulkUnavailable("no more connections")

    class Whole(FakeTransport):
        def read(self, plan: ReadPlan) -> None:
            for index, page in enumerate(batch.pages):
                plan.landing.whole(index)[:] = page
                plan.landing.settle(index, True)

    choice = BulkChoice("auto", ManualClock())
    choice.offer((Half("shm"), Whole("tcp")), ())
    buffers = batch.buffers()
    plan = read_plan(batch, buffers)
    assert choice.read(plan)
    assert plan.landing.result().leading_hits == 2
    assert buffers == batch.pages


@pytest.mark.parametrize("failure", [errors.Unavailable("lost"), DeadlineExceeded("late"), ProtocolError("odd")])
def test_one_that_broke_off_is_not_replaced_for_bytes_may_have_landed(failure: errors.AttnStoreError) -> None:
    offered = Offered()
    offered.shm.failure = failure
    with pytest.raises(type(failure)):
        offered.read()
    assert offered.calls() == (1, 0)


@pytest.mark.parametrize("name", ["shm", "tcp"])
def test_a_forced_transport_is_never_replaced(name: TransportName) -> None:
    offered = Offered(name)
    forced = getattr(offered, name)
    forced.failure = BulkUnavailable("blocked")
    for _ in range(2):
        with pytest.raises(BulkUnavailable):
            offered.read()
    assert forced.calls == 2
    assert offered.calls() == ((2, 0) if name == "shm" else (0, 2))


def test_a_forced_transport_that_is_not_offered_is_said_so() -> None:
    with pytest.raises(InvalidArgument, match="tcp"):
        BulkChoice("tcp", ManualClock()).offer((), ())


def test_with_grpc_nothing_is_negotiated() -> None:
    choice = BulkChoice("grpc", ManualClock())
    assert choice.is_negotiated()
    assert not choice.has_readers
    assert not BulkChoice("auto", ManualClock()).is_negotiated()


def test_an_unknown_transport_is_refused_with_the_known_ones() -> None:
    assert checked_transport("tcp") == "tcp"
    with pytest.raises(InvalidArgument, match="auto, grpc, tcp, shm"):
        checked_transport("rdma")


def test_layers_are_told_of_even_where_there_is_no_page() -> None:
    told: list[tuple[int, int]] = []
    plan = read_plan(BATCH, BATCH.buffers())
    plan.landing.miss(0, PageStatus.MISSING)
    all_layers(plan, lambda *layer: told.append(layer))
    assert told == [(layer, 0) for layer in range(BATCH.layout.layers)]


# Deadlines


def test_a_deadline_ends_and_its_first_attempt_ends_sooner() -> None:
    clock = ManualClock()
    deadline = Deadline(clock, 1_000)
    assert deadline.sooner(5_000).left_ms() == 500
    assert deadline.sooner(100).left_ms() == 100
    clock.advance_ms(999)
    assert deadline.left_ms() == 1
    clock.advance_ms(1)
    with pytest.raises(DeadlineExceeded):
        deadline.left_ms()


# Stopping


def test_an_abort_breaks_what_is_in_use_and_nothing_that_was() -> None:
    transfer = Transfer()
    broken: list[str] = []

    def breaker(name: str) -> None:
        broken.append(name)

    with transfer.breakable(lambda: breaker("before")):
        pass
    with transfer.breakable(lambda: breaker("now")):
        assert not transfer.is_aborted
        transfer.abort()
        assert broken == ["now"]
        with transfer.breakable(lambda: breaker("too late")):
            assert broken == ["now", "too late"]
    assert transfer.is_aborted


# Parts


def parts_of(workers: PartWorkers, pages: int) -> list[tuple[int, int]]:
    return workers.run(pages, Transfer(), lambda begin, end: (begin, end))


@pytest.mark.parametrize("channels", [1, 2, 3, 16])
@pytest.mark.parametrize("pages", [1, 2, 3, 7, 100])
def test_parts_cover_every_page_once_and_differ_by_one_at_most(channels: int, pages: int) -> None:
    workers = PartWorkers(channels, "test-parts")
    parts = parts_of(workers, pages)
    assert [page for begin, end in parts for page in range(begin, end)] == list(range(pages))
    assert len(parts) == min(channels, pages)
    sizes = {end - begin for begin, end in parts}
    assert max(sizes) - min(sizes) <= 1
    workers.close()


def test_a_failed_part_is_raised_only_after_all_have_ended() -> None:
    workers = PartWorkers(2, "test-parts")
    ended: list[int] = []
    failed = threading.Event()

    def run(begin: int, _end: int) -> None:
        if begin == 0:
            failed.set()
            raise ProtocolError("first")
        failed.wait(20)
        ended.append(begin)

    with pytest.raises(ProtocolError):
        workers.run(2, Transfer(), run)
    assert ended == [1]
    workers.close()


def test_the_first_failure_in_order_of_the_pages_is_the_one_raised() -> None:
    workers = PartWorkers(3, "test-parts")
    failures = {0: None, 1: DeadlineExceeded("second"), 2: ProtocolError("third")}

    def run(begin: int, _end: int) -> None:
        failure = failures[begin]
        if failure is not None:
            raise failure

    with pytest.raises(DeadlineExceeded):
        workers.run(3, Transfer(), run)
    workers.close()


def test_closed_workers_say_so() -> None:
    workers = PartWorkers(2, "test-parts")
    workers.close()
    with pytest.raises(ClientClosed):
        parts_of(workers, 2)


def test_waiting_out_outlasts_interrupts(monkeypatch: pytest.MonkeyPatch) -> None:
    future: Future[None] = Future()
    really_wait = concurrent.futures.wait
    interrupts = [KeyboardInterrupt, KeyboardInterrupt]

    def wait(futures: set[Future[None]]) -> object:
        if interrupts:
            raise interrupts.pop()
        future.set_result(None)
        return really_wait(futures)

    monkeypatch.setattr(concurrent.futures, "wait", wait)
    wait_out([future])
    assert future.done()
