"""Which transport carries a call, how a transfer is stopped, and how a transport that does not open is replaced."""

from __future__ import annotations

import asyncio
import itertools
import signal
import socket
import threading
from typing import NoReturn

import pytest

from attnstore import PageStatus, errors
from attnstore.client.base import BulkUnavailable, ReadPlan
from attnstore.client.calls import LoopCall, Transfer
from attnstore.client.facade import LoopThread
from attnstore.client.options import ConnectOptions, TransportName
from attnstore.client.transports.choice import TransportChoice
from attnstore.client.transports.parts import PartWorkers, nothing
from attnstore.clock import Deadline, MonotonicClock
from attnstore.errors import ClientClosed, DeadlineExceeded, InvalidArgument, ProtocolError
from attnstore.testing.clock import ManualClock
from attnstore.testing.ports import free_port
from tests.channels import read_plan, write_plan
from tests.samples import make_batch
from tests.transports import FakeTransport, connection_to

BATCH = make_batch(1, model="choice")
RETRY_MS = 30_000


class Offered:
    """A choice among three transports, of which shm carries only reads, and the plans to use them with."""

    def __init__(self, wanted: TransportName = "auto") -> None:
        self.clock = ManualClock()
        self.shm, self.tcp, self.grpc = FakeTransport("shm", "read"), FakeTransport("tcp"), FakeTransport("grpc")
        self.choice = TransportChoice(wanted, self.clock)
        self.choice.offer([self.shm, self.tcp, self.grpc])

    def read(self) -> None:
        plan = read_plan(BATCH, BATCH.buffers())
        self.choice.wait(lambda transport: transport.read(plan))

    def write(self) -> tuple[PageStatus, ...]:
        plan = write_plan(BATCH)
        return self.choice.wait(lambda transport: transport.write(plan)).verdicts

    def calls(self) -> tuple[int, int, int]:
        return self.shm.calls, self.tcp.calls, self.grpc.calls


def test_the_first_transport_that_can_carry_a_call_is_used() -> None:
    offered = Offered()
    offered.read()
    assert offered.write() == (PageStatus.STORED,)
    assert offered.calls() == (1, 1, 0), "shm carries no write"


async def test_a_task_gets_the_same_choice_as_a_thread() -> None:
    offered = Offered()
    offered.shm.failure = BulkUnavailable("blocked")
    plan = read_plan(BATCH, BATCH.buffers())
    await offered.choice.run(lambda transport: transport.read(plan))
    assert offered.calls() == (1, 1, 0)


def test_one_that_does_not_open_is_replaced_with_a_warning_and_left_alone_for_a_while(caplog: pytest.LogCaptureFixture) -> None:
    offered = Offered()
    offered.shm.failure = BulkUnavailable("blocked")
    offered.read()
    assert offered.calls() == (1, 1, 0)
    assert "blocked" in caplog.text
    offered.read()
    assert offered.calls() == (1, 2, 0)
    offered.clock.advance_ms(RETRY_MS)
    offered.shm.failure = None
    offered.read()
    assert offered.calls() == (2, 2, 0)


def test_when_none_opens_grpc_is_left_and_they_come_back() -> None:
    offered = Offered()
    offered.shm.failure = offered.tcp.failure = BulkUnavailable("blocked")
    offered.read()
    assert offered.write() == (PageStatus.STORED,)
    assert offered.calls() == (1, 1, 2)
    offered.clock.advance_ms(RETRY_MS)
    offered.shm.failure = offered.tcp.failure = None
    offered.read()
    offered.write()
    assert offered.calls() == (2, 2, 2)


def test_parts_that_landed_before_a_fall_back_are_read_again() -> None:
    """Of two channels, one received its part and the other could not connect, and the next transport reads everything."""
    batch = make_batch(2, model="fall back")

    class Half(FakeTransport):
        def land(self, plan: ReadPlan) -> None:
            plan.landing.begin(self.name)
            plan.landing.whole(0)[:] = bytes(batch.layout.page_bytes)
            plan.landing.settle(0, True)
            raise BulkUnavailable("no more connections")

    class Whole(FakeTransport):
        def land(self, plan: ReadPlan) -> None:
            plan.landing.begin(self.name)
            for index, page in enumerate(batch.pages):
                plan.landing.whole(index)[:] = page
                plan.landing.settle(index, True)

    choice = TransportChoice("auto", ManualClock())
    choice.offer([Half("shm"), Whole("tcp"), FakeTransport("grpc")])
    buffers = batch.buffers()
    plan = read_plan(batch, buffers)
    choice.wait(lambda transport: transport.read(plan))
    assert plan.landing.result().leading_hits == 2
    assert plan.landing.result().transport == "tcp"
    assert buffers == batch.pages


@pytest.mark.parametrize("failure", [errors.Unavailable("lost"), DeadlineExceeded("late"), ProtocolError("odd")])
def test_one_that_broke_off_is_not_replaced_for_bytes_may_have_landed(failure: errors.AttnStoreError) -> None:
    offered = Offered()
    offered.shm.failure = failure
    with pytest.raises(type(failure)):
        offered.read()
    assert offered.calls() == (1, 0, 0)


@pytest.mark.parametrize("name", ["shm", "tcp"])
def test_a_forced_transport_is_never_replaced(name: TransportName) -> None:
    offered = Offered(name)
    forced = getattr(offered, name)
    forced.failure = BulkUnavailable("blocked")
    for _ in range(2):
        with pytest.raises(BulkUnavailable):
            offered.read()
    assert forced.calls == 2
    assert offered.calls() == ((2, 0, 0) if name == "shm" else (0, 2, 0))


def test_what_a_forced_transport_cannot_carry_goes_over_another() -> None:
    offered = Offered("shm")
    assert offered.write() == (PageStatus.STORED,)
    assert offered.calls() == (0, 1, 0)


def test_a_forced_transport_that_is_not_offered_is_said_so() -> None:
    with pytest.raises(InvalidArgument, match="tcp"):
        TransportChoice("tcp", ManualClock()).offer([FakeTransport("grpc")])


def test_the_choice_is_known_once_something_was_offered() -> None:
    choice = TransportChoice("grpc", ManualClock())
    assert not choice.is_known
    choice.offer([FakeTransport("grpc")])
    assert choice.is_known


async def test_with_grpc_nothing_is_negotiated() -> None:
    absent = f"grpc://127.0.0.1:{free_port()}"
    asking = connection_to(absent)
    with pytest.raises(errors.Unavailable):
        await asking.negotiate(Deadline(MonotonicClock(), 20_000))
    forced = connection_to(absent, "grpc")
    await forced.negotiate(Deadline(MonotonicClock(), 20_000))
    assert forced.choice.is_known
    await asking.close()
    await forced.close()


def test_an_unknown_transport_is_refused_with_the_known_ones() -> None:
    def options(transport: str) -> ConnectOptions:
        return ConnectOptions.create(
            "grpc://127.0.0.1:1", deadline_ms=1_000, token=None, tls_ca=None, transport=transport, channels=1
        )

    assert options("tcp").transport == "tcp"
    with pytest.raises(InvalidArgument, match="auto, grpc, tcp, shm"):
        options("rdma")


def test_layers_are_told_of_even_where_there_is_no_page() -> None:
    told: list[tuple[int, int]] = []
    plan = read_plan(BATCH, BATCH.buffers(), on_layer=lambda *layer: told.append(layer))
    plan.landing.miss(0, PageStatus.MISSING)
    plan.tell_all_layers()
    assert told == [(layer, 0) for layer in range(BATCH.layout.layers)]


# Calls


def test_a_call_of_the_event_loop_runs_there_for_a_thread_that_waits() -> None:
    thread = LoopThread.acquire()

    async def where() -> str:
        await asyncio.sleep(0)
        return threading.current_thread().name

    async def loop() -> asyncio.AbstractEventLoop:
        return asyncio.get_running_loop()

    try:
        assert LoopCall(thread.run(loop()), where).wait() == thread.run(where()) != threading.current_thread().name
    finally:
        LoopThread.release()


async def test_a_call_of_the_event_loop_runs_in_the_task_that_awaits_it() -> None:
    async def task() -> asyncio.Task[object] | None:
        return asyncio.current_task()

    assert await LoopCall(asyncio.get_running_loop(), task) is asyncio.current_task()


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
    return workers.call(
        pages, Transfer(), lambda begin, end: lambda: [(begin, end)], lambda parts: list(itertools.chain(*parts))
    ).wait()


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
        workers.call(2, Transfer(), lambda *part: lambda: run(*part), nothing).wait()
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
        workers.call(3, Transfer(), lambda *part: lambda: run(*part), nothing).wait()
    workers.close()


def test_closed_workers_say_so() -> None:
    workers = PartWorkers(2, "test-parts")
    workers.close()
    with pytest.raises(ClientClosed):
        parts_of(workers, 2)


def test_an_interrupt_stops_the_parts_and_is_raised_only_after_all_have_ended() -> None:
    """A signal's handler raises in the thread that waits for the parts, and again while it waits for their end."""

    class Interrupt(BaseException):
        pass

    def interrupt(*_: object) -> NoReturn:
        raise Interrupt

    workers, transfer = PartWorkers(2, "test-parts"), Transfer()
    begun, ended, main = threading.Barrier(3), list[int](), threading.get_ident()

    def run(begin: int, _end: int) -> None:
        one, other = socket.socketpair()
        with one, other, transfer.breakable(lambda: one.shutdown(socket.SHUT_RDWR)):
            begun.wait(20)
            assert one.recv(1) == b"", "broken"
            signal.pthread_kill(main, signal.SIGUSR1)
        ended.append(begin)

    def interrupt_first() -> None:
        begun.wait(20)
        signal.pthread_kill(main, signal.SIGUSR1)

    before = signal.signal(signal.SIGUSR1, interrupt)
    interrupter = threading.Thread(target=interrupt_first)
    interrupter.start()
    try:
        with pytest.raises(Interrupt):
            workers.call(2, transfer, lambda *part: lambda: run(*part), nothing).wait()
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert sorted(ended) == [0, 1]
    interrupter.join()
    workers.close()
