"""The durations of steps, by the clock of whatever computes them."""

from __future__ import annotations

from attnstore.testing import ManualClock
from attnstore_worker.cache import CostPlanner, Observer, Step
from attnstore_worker.cache.moving.load import Load, LoadEnd, Prompt
from attnstore_worker.cache.planning.estimators import PrefillCost
from attnstore_worker.cache.planning.observation import Unobserved
from attnstore_worker.cache.planning.step_times import _UNTOLD_STEPS_MAX, StepTimes
from attnstore_worker.device.base import Event, Timer, Wait
from attnstore_worker.device.host import HostDevice
from attnstore_worker.device.simulated import SimulatedDevice
from attnstore_worker.engine import Engine, EngineOptions, SamplingParams
from attnstore_worker.model import LoadedModel

CHUNKS = ((0, 32),)
COST = PrefillCost(chunk_ms=50.0, token_ms=0.5, pair_ms=0.0)


class Told(Unobserved):
    def __init__(self) -> None:
        self.steps: list[Step] = []

    def stepped(self, step: Step) -> None:
        self.steps.append(step)


class LateTimer:
    """A timer of work that ends when the test says so."""

    def __init__(self) -> None:
        self.stopped = False
        self.took_ms: float | None = None

    def stop(self) -> None:
        self.stopped = True

    def elapsed_ms(self) -> float | None:
        assert self.stopped
        return self.took_ms


class Behind(SimulatedDevice):
    """A device that computes behind the host."""

    def __init__(self) -> None:
        super().__init__()
        self.timers: list[LateTimer] = []

    def timer(self) -> Timer:
        self.timers.append(LateTimer())
        return self.timers[-1]


def run(times: StepTimes, clock: ManualClock, submit_ms: float, chunks: tuple[tuple[int, int], ...] = CHUNKS) -> None:
    started = times.start()
    clock.advance_ms(submit_ms)
    times.end(started, chunks, 0, 0)


def test_a_step_of_the_host_is_told_at_once_by_the_hosts_clock() -> None:
    clock, told = ManualClock(100.0), Told()
    run(StepTimes(HostDevice(), clock, told), clock, 7.0)
    assert told.steps == [Step(100.0, 107.0, CHUNKS)]


def test_a_step_of_a_device_is_told_beside_a_later_one_by_the_devices_timer() -> None:
    clock, told, device = ManualClock(100.0), Told(), Behind()
    times = StepTimes(device, clock, told)
    run(times, clock, 1.0)
    run(times, clock, 1.0, ((32, 33),))
    assert told.steps == []
    device.timers[0].took_ms, device.timers[1].took_ms = 40.0, 5.0
    run(times, clock, 1.0)
    assert told.steps == [Step(100.0, 140.0, CHUNKS), Step(101.0, 106.0, ((32, 33),))]


def test_steps_are_told_in_their_order() -> None:
    clock, told, device = ManualClock(), Told(), Behind()
    times = StepTimes(device, clock, told)
    for _ in range(3):
        run(times, clock, 1.0)
    device.timers[1].took_ms = device.timers[2].took_ms = 9.0
    run(times, clock, 1.0)
    assert told.steps == [], "the first has not ended, so the timers of the others are wrong"
    device.timers[0].took_ms = 8.0
    run(times, clock, 1.0)
    assert [step.ended_ms - step.started_ms for step in told.steps] == [8.0, 9.0, 9.0]


def test_steps_that_never_end_are_not_kept_without_bound() -> None:
    clock, told, device = ManualClock(), Told(), Behind()
    times = StepTimes(device, clock, told)
    for _ in range(2 * _UNTOLD_STEPS_MAX):
        run(times, clock, 0.0)
    for timer in device.timers:
        timer.took_ms = 1.0
    run(times, clock, 0.0)
    assert len(told.steps) == _UNTOLD_STEPS_MAX - 1, "the step that has just ended is not done"


def test_a_step_told_late_is_disturbed_by_the_loads_that_ran_beside_it_and_by_no_other() -> None:
    clock, device = ManualClock(1_000.0), Behind()
    planner = CostPlanner(clock, 32)
    times = StepTimes(device, clock, _observer(planner))
    for begin in range(0, 256, 32):
        planner.stepped(Step(0.0, COST.chunk(begin, begin + 32), ((begin, begin + 32),)))
    known = planner.report()
    prompt = Prompt(1, 256, 16, 1024, 2, 0, 15)

    run(times, clock, 1.0)  # beside no load
    device.timers[0].took_ms = COST.chunk(0, 32)
    clock.advance_ms(200.0)
    search = planner.search(prompt)
    for _ in range(3):
        run(times, clock, 1.0)  # tells of the first, while the load runs
    learned = planner.report()
    assert learned.slowdown == known.slowdown
    assert learned.prefill != known.prefill

    clock.advance_ms(200.0)
    load = Load(prompt, search, clock.now_ms())
    load.cancel(LoadEnd.RELEASED, clock.now_ms())
    planner.loaded(load)
    for timer in device.timers[1:]:
        timer.took_ms = 3 * COST.chunk(0, 32)
    run(times, clock, 1.0)  # tells of the others, after the load
    assert planner.report().slowdown > known.slowdown
    assert planner.report().prefill == learned.prefill


class Noted(SimulatedDevice):
    """Notes the waits and the timers of `compute`, in their order."""

    def __init__(self) -> None:
        super().__init__()
        self.order: list[str] = []
        wait = self.compute.wait

        def noted(event: Event, why: Wait) -> None:
            self.order.append(why.name)
            wait(event, why)

        self.compute.wait = noted  # type: ignore[method-assign]

    def timer(self) -> Timer:
        self.order.append("timer")
        return super().timer()


def test_the_copies_that_a_step_waits_for_are_no_part_of_its_time(tiny: LoadedModel) -> None:
    device, page_bytes = Noted(), tiny.layout(16).page_bytes
    options = EngineOptions(pool_bytes=8 * page_bytes, host_pool_bytes=8 * page_bytes)
    with Engine(tiny, options, device=device) as engine:
        prompt, how = [7 + at for at in range(65)], SamplingParams(max_tokens=1)
        engine.generate(prompt, how)
        engine.drop_cached()
        device.order.clear()
        engine.generate(prompt, how)
    assert device.order == ["COMPUTE_AFTER_UP", "COMPUTE_AFTER_DOWN", "timer"]


def _observer(planner: CostPlanner) -> Observer:
    return planner
