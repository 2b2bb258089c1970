"""Turns on a node's cores: fair between tenants, batched if possible, refused if the deadline cannot be met."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import pytest

from attnstore.clock import Deadline, MonotonicClock
from attnstore.errors import DeadlineExceeded, Overloaded
from attnstore.server.turns import FairTurns
from attnstore.testing.clock import ManualClock
from tests.samples import eventually

PATIENCE_MS = 20_000.0


class Cores:
    """Runs batches one at a time on command, and records them. A job is `(kind, name)`; its result is its name."""

    def __init__(self, *, waiting_max: int = 64, together_max: int = 8, clock: ManualClock | None = None, tenants: int = 1) -> None:
        self.clock = clock or MonotonicClock()
        self.batches: list[list[str]] = []
        self.permits = threading.Semaphore(0)
        self.fails = False
        self.turns = FairTurns[tuple[str, str], str](
            self._run,
            lambda job: job[0],
            self.clock,
            waiting_max=waiting_max,
            together_max=together_max,
            tenants=tenants,
        )
        self.callers = ThreadPoolExecutor(max_workers=64)

    def ask(self, kind: str, name: str, tenant: str, cost: float = 1.0, deadline_ms: float = PATIENCE_MS) -> Future[str]:
        """Calls on a thread of its own; returns once the caller runs or waits."""
        before = len(self.batches) + self.turns.waiting
        deadline = Deadline(self.clock, deadline_ms)
        asked = self.callers.submit(self.turns.take, (kind, name), tenant=tenant, cost=cost, deadline=deadline)
        assert eventually(lambda: len(self.batches) + self.turns.waiting > before or asked.done())
        return asked

    def _run(self, jobs: Sequence[tuple[str, str]]) -> list[str]:
        self.batches.append([name for _, name in jobs])
        assert self.permits.acquire(timeout=PATIENCE_MS / 1000)
        if isinstance(self.clock, ManualClock):
            self.clock.advance_ms(100)
        if self.fails:
            raise ZeroDivisionError
        return [name for _, name in jobs]


@pytest.fixture
def cores() -> Iterator[Cores]:
    made = Cores()
    yield made
    made.permits.release(100)
    made.callers.shutdown()


def test_a_caller_alone_computes_at_once(cores: Cores) -> None:
    asked = cores.ask("a", "first", "t")
    cores.permits.release()
    assert asked.result(20) == "first"
    assert cores.batches == [["first"]]


def test_callers_of_one_kind_that_wait_are_computed_together(cores: Cores) -> None:
    asked = [cores.ask("a", str(number), "t") for number in range(4)] + [cores.ask("b", "other", "t")]
    cores.permits.release(3)
    assert [one.result(20) for one in asked] == ["0", "1", "2", "3", "other"]
    assert cores.batches == [["0"], ["1", "2", "3"], ["other"]]


def test_a_batch_has_a_maximum() -> None:
    cores = Cores(together_max=2)
    asked = [cores.ask("a", str(number), "t") for number in range(4)]
    cores.permits.release(10)
    assert [one.result(20) for one in asked] == ["0", "1", "2", "3"]
    assert cores.batches == [["0"], ["1", "2"], ["3"]]


class Interrupted:
    """A deadline whose caller is interrupted while it waits: at once, or when it has got the turn."""

    def __init__(self, cores: Cores, *, with_the_turn: bool) -> None:
        self._cores = cores
        self._with_the_turn = with_the_turn
        self._looks = 0

    def left_ms(self) -> float:
        self._looks += 1
        if self._looks == 1:
            return PATIENCE_MS
        if self._with_the_turn:
            assert eventually(lambda: self._cores.turns.waiting == 0)
        raise KeyboardInterrupt


@pytest.mark.parametrize("with_the_turn", [False, True])
@pytest.mark.parametrize("riders", [0, 2])
def test_a_caller_that_is_interrupted_leaves_neither_its_place_nor_its_turn_behind(
    cores: Cores, with_the_turn: bool, riders: int
) -> None:
    first = cores.ask("a", "first", "t")
    deadline = Interrupted(cores, with_the_turn=with_the_turn)
    gone = cores.callers.submit(cores.turns.take, ("a", "gone"), tenant="t", cost=1.0, deadline=deadline)  # type: ignore[arg-type]
    assert eventually(lambda: cores.turns.waiting == 1 if with_the_turn else gone.done())
    rest = [cores.ask("a", str(number), "t") for number in range(riders)]
    cores.permits.release(10)
    with pytest.raises(KeyboardInterrupt):
        gone.result(20)
    assert [one.result(20) for one in [first, *rest]] == ["first", *map(str, range(riders))]
    assert cores.ask("b", "later", "t").result(20) == "later"
    assert "gone" not in [name for batch in cores.batches for name in batch]
    assert cores.turns.waiting == 0


@pytest.mark.parametrize("deadline_ms", [float(1 << 63), float("inf")])
def test_a_deadline_that_no_wait_can_take_costs_nobody_else_the_cores(cores: Cores, deadline_ms: float) -> None:
    first = cores.ask("a", "first", "t")
    endless = cores.ask("a", "endless", "t", deadline_ms=deadline_ms)
    with pytest.raises(OverflowError):
        endless.result(20)
    cores.permits.release(2)
    assert first.result(20) == "first"
    assert cores.ask("a", "later", "other").result(20) == "later"


def test_a_tenant_with_many_queries_does_not_keep_another_waiting(cores: Cores) -> None:
    busy = [cores.ask(f"busy{number}", f"busy{number}", "busy") for number in range(6)]
    quiet = [cores.ask("quiet", "quiet1", "quiet")]
    cores.permits.release(2)
    assert eventually(lambda: len(cores.batches) == 3)
    assert "quiet1" in [name for batch in cores.batches[:2] for name in batch] or cores.batches[2] == ["quiet1"]
    cores.permits.release(10)
    assert {one.result(20) for one in busy + quiet} == {*(f"busy{number}" for number in range(6)), "quiet1"}


def test_what_a_tenant_gets_is_measured_in_cost(cores: Cores) -> None:
    cores.ask("start", "start", "other")
    for number in range(4):
        cores.ask(f"dear{number}", f"dear{number}", "dear", cost=3.0)
        cores.ask(f"cheap{number}", f"cheap{number}", "cheap", cost=1.0)
    cores.permits.release(20)
    assert eventually(lambda: len(cores.batches) == 9)
    order = [name for batch in cores.batches[1:] for name in batch]
    assert sum(name.startswith("cheap") for name in order[:4]) >= 3, order


def test_a_full_queue_is_overloaded() -> None:
    cores = Cores(waiting_max=1)
    asked = [cores.ask("a", "runs", "t"), cores.ask("b", "waits", "t")]
    with pytest.raises(Overloaded, match="1 queries that wait"):
        cores.ask("c", "refused", "t").result(20)
    cores.permits.release(10)
    assert [one.result(20) for one in asked] == ["runs", "waits"]


def test_a_deadline_that_cannot_be_met_is_refused_at_once() -> None:
    cores = Cores(clock=ManualClock())
    cores.permits.release()
    assert cores.ask("a", "takes 100 ms", "t", cost=10).result(20) == "takes 100 ms"
    running = cores.ask("a", "runs", "t", cost=10)
    with pytest.raises(Overloaded, match="busy for 100 ms"):
        cores.ask("b", "refused", "t", cost=10, deadline_ms=99).result(20)
    cores.permits.release(10)
    assert running.result(20) == "runs"


def test_a_tenant_that_fills_the_queue_leaves_places_to_another() -> None:
    cores = Cores(waiting_max=16, tenants=2)
    asked = [cores.ask("runs", "runs", "greedy")]
    greedy = [cores.ask(f"{number}", "", "greedy") for number in range(16)]
    modest = [cores.ask(f"{number}", "modest", "modest") for number in range(4)]
    cores.permits.release(40)
    assert [one.result(20) for one in asked + modest] == ["runs"] + 4 * ["modest"]
    assert sum(isinstance(one.exception(20), Overloaded) for one in greedy) == 6


def test_what_one_tenant_queues_is_not_in_the_way_of_anothers_deadline() -> None:
    cores = Cores(clock=ManualClock(), tenants=2)
    cores.permits.release()
    assert cores.ask("a", "takes 100 ms", "t", cost=10).result(20) == "takes 100 ms"
    greedy = [cores.ask(f"{number}", "", "greedy", cost=10) for number in range(9)]
    with pytest.raises(Overloaded, match="busy for 900 ms"):
        cores.ask("more", "", "greedy", cost=10, deadline_ms=899).result(20)
    modest = cores.ask("modest", "modest", "modest", cost=10, deadline_ms=201)
    cores.permits.release(40)
    assert modest.result(20) == "modest"
    assert [one.result(20) for one in greedy] == [""] * 9


def test_a_turn_that_does_not_come_in_time_is_given_up(cores: Cores) -> None:
    running = cores.ask("a", "runs", "t")
    late = cores.ask("b", "late", "t", deadline_ms=1)
    with pytest.raises(DeadlineExceeded):
        late.result(20)
    assert cores.turns.waiting == 0
    cores.permits.release(10)
    assert running.result(20) == "runs"
    assert cores.ask("c", "next", "t").result(20) == "next", "the queue goes on"


def test_an_error_reaches_all_that_rode_together_and_the_queue_goes_on(cores: Cores) -> None:
    cores.fails = True
    asked = [cores.ask("a", str(number), "t") for number in range(3)]
    cores.permits.release(2)
    for one in asked:
        with pytest.raises(ZeroDivisionError):
            one.result(20)
    cores.fails = False
    cores.permits.release()
    assert cores.ask("a", "again", "t").result(20) == "again"
