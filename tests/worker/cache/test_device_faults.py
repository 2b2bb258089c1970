"""Faults of a cache on a device: each wait that is left out is noticed; cancelled loads, corrupt pages, stalled stores and a device
that is lost cost pages, and no block or slot.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import pytest
from torch import Tensor

from attnstore.core.hashing import block_hashes
from attnstore.types import PageStatus, ReadResult
from attnstore_worker.cache.moving.load import FetchOrder, LoadEnd, LoadPlan
from attnstore_worker.cache.moving.staging import PART_PAGES_MAX, STAGING_PARTS, part_deadline_ms
from attnstore_worker.device.base import After, Copies, Event, Wait
from attnstore_worker.device.simulated import Schedule, SimulatedDevice
from attnstore_worker.errors import DeviceLost
from attnstore_worker.testing import FixedPlanner, MemoryStore
from tests.samples import eventually
from tests.worker.cache.on_device import LAYOUT, NAMESPACE, WAIT_MS, DeviceWorker, content, prompt_of

SCHEDULES: tuple[Schedule, ...] = ("early", "late")
LAYERS = LoadPlan(0, 9_999, 9_999, float(WAIT_MS), FetchOrder.LAYERS)
ALL = LoadPlan(0, 9_999, 9_999, float(WAIT_MS))


def filled(store: MemoryStore, tokens: list[int]) -> MemoryStore:
    """Puts the pages of a prompt into the store."""
    store.namespaces.add(NAMESPACE)
    store.layouts[NAMESPACE] = LAYOUT
    for index, name in enumerate(block_hashes(NAMESPACE, tokens, LAYOUT.block_tokens)):
        store.pages[name] = content(tokens, index)
    return store


def loads_into_recycled_blocks(device: SimulatedDevice) -> None:
    """A load takes blocks that a step has just read."""
    worker = DeviceWorker(device, 6, store=filled(MemoryStore(), prompt_of(2)))
    table, _ = worker.run(prompt_of(1), release=False)
    worker.read(table, prompt_of(1), range(4))
    assert worker.manager.flush(WAIT_MS)
    worker.manager.release(table)
    assert worker.run(prompt_of(2))[1].arrived_blocks == 4
    worker.end()


def loads_into_evicted_blocks(device: SimulatedDevice) -> None:
    """A load takes blocks whose pages are on their way to HOST."""
    worker = DeviceWorker(device, 6, store=filled(MemoryStore(), prompt_of(2)), host_blocks=16)
    worker.run(prompt_of(1))
    assert worker.manager.flush(WAIT_MS)
    worker.run(prompt_of(2))
    worker.run(prompt_of(1))
    worker.end()


def loads_through_all_of_staging_twice(device: SimulatedDevice) -> None:
    blocks = 2 * STAGING_PARTS * PART_PAGES_MAX + 1
    worker = DeviceWorker(device, blocks + 2, store=filled(MemoryStore(), prompt_of(1, blocks)), planner=FixedPlanner(ALL))
    assert worker.run(prompt_of(1, blocks))[1].arrived_blocks == blocks
    worker.end()


def loads_by_layers(device: SimulatedDevice) -> None:
    """A step reads each layer as soon as it has arrived, before the next one has."""
    store, tokens = filled(MemoryStore(), prompt_of(1)), prompt_of(1)
    computed = [threading.Event() for _ in range(LAYOUT.layers)]
    store.before_layer = lambda layer: computed[layer - 1].wait(WAIT_MS / 1e3) if layer else None
    worker = DeviceWorker(device, 6, store=store, planner=FixedPlanner(LAYERS))
    table, load = worker.manager.admit(tokens, [])
    try:
        assert eventually(lambda: load.may_compute_behind(0))
        for layer in range(LAYOUT.layers):
            worker.manager.loads.wait_layer(load, layer)
            worker.read_layer(table, tokens, range(4), layer)
            computed[layer].set()
        worker.manager.loads.wait_layer(load, None)
    finally:
        for event in computed:
            event.set()
    assert worker.take(table, load, tokens) == 4
    worker.manager.release(table)
    worker.end()


def cancels_between_parts(device: SimulatedDevice) -> None:
    """A load is cancelled while its first part is copied up and its second is read; then a step uses its blocks."""
    blocks = PART_PAGES_MAX + 8
    store, reached, going_on = filled(MemoryStore(), prompt_of(1, blocks)), threading.Event(), threading.Event()
    last = block_hashes(NAMESPACE, prompt_of(1, blocks), LAYOUT.block_tokens)[PART_PAGES_MAX]

    def stall(name: bytes) -> None:
        if name == last:
            reached.set()
            going_on.wait(WAIT_MS / 1e3)

    store.on_page = stall
    worker = DeviceWorker(device, blocks + 1, store=store, planner=FixedPlanner(ALL))
    table, load = worker.manager.admit(prompt_of(1, blocks), [])
    try:
        assert reached.wait(WAIT_MS / 1e3)
        worker.manager.loads.abandon(table, load)
        worker.manager.release(table)
        worker.manager.check()
        assert worker.manager.statistics().quarantined == blocks
        going_on.set()
        assert eventually(lambda: worker.manager.available_blocks == blocks + 1)
    finally:
        going_on.set()
    store.pages.clear()
    worker.run(prompt_of(2, blocks))
    worker.end()


def writes_behind(device: SimulatedDevice) -> None:
    store = MemoryStore()
    worker = DeviceWorker(device, 6, store=store)
    worker.run(prompt_of(1))
    worker.end()
    assert store.pages == filled(MemoryStore(), prompt_of(1)).pages


def evicts_before_a_step_has_ended(device: SimulatedDevice) -> None:
    """HOST gets pages of steps in flight, and the next steps overwrite the blocks."""
    worker = DeviceWorker(device, 6, host_blocks=5)
    for family in (1, 2, 1, 3, 2, 1, 2, 3):
        worker.run(prompt_of(family))
    worker.end()


def copies_up_what_was_just_copied_down(device: SimulatedDevice) -> None:
    """All blocks go down to HOST. Another sequence takes the last of them, and their pages go up into the others."""
    worker = DeviceWorker(device, 12, host_blocks=9)
    worker.run(prompt_of(1))
    worker.manager.drop_cached()
    other, _ = worker.manager.admit(prompt_of(2, blocks=2)[:8], [])
    table, _ = worker.run(prompt_of(1), release=False)
    assert table.sealed == 4
    worker.manager.release(table)
    worker.manager.release(other)
    worker.end()


def evicts_host_pages_that_go_up(device: SimulatedDevice) -> None:
    """Pages go up from HOST, and before a step has waited for them, others go down into their slots."""
    worker = DeviceWorker(device, 8, host_blocks=4)
    worker.run(prompt_of(1))
    worker.manager.drop_cached()
    worker.run(prompt_of(2, blocks=3))
    table, _ = worker.manager.admit(prompt_of(1), [])
    worker.manager.drop_cached()
    worker.read(table, prompt_of(1), range(4))
    worker.manager.release(table)
    worker.run(prompt_of(2, blocks=3))
    worker.end()


def writes_what_host_evicts(device: SimulatedDevice) -> None:
    store = MemoryStore()
    worker = DeviceWorker(device, 4, store=store, host_blocks=1, write_policy="on-evict")
    for family in range(1, 5):
        worker.run(prompt_of(family, 3))
    assert worker.manager.flush(WAIT_MS)
    for family in range(1, 5):
        assert {**filled(MemoryStore(), prompt_of(family, 3)).pages, **store.pages}.items() >= filled(
            MemoryStore(), prompt_of(family, 3)
        ).pages.items()
    worker.end()


SCENARIOS: dict[Wait, Callable[[SimulatedDevice], None]] = {
    Wait.UP_AFTER_COMPUTE: loads_into_recycled_blocks,
    Wait.UP_AFTER_DOWN: loads_into_evicted_blocks,
    Wait.COMPUTE_AFTER_DOWN: evicts_before_a_step_has_ended,
    Wait.COMPUTE_AFTER_UP: loads_by_layers,
    Wait.DOWN_AFTER_COMPUTE: writes_behind,
    Wait.ARRIVED_AFTER_UP: loads_through_all_of_staging_twice,
    Wait.RELEASED_AFTER_UP: cancels_between_parts,
    Wait.STAGING_AFTER_UP: loads_through_all_of_staging_twice,
    Wait.WRITTEN_AFTER_DOWN: writes_behind,
    Wait.HOST_UP_AFTER_DOWN: copies_up_what_was_just_copied_down,
    Wait.HOST_REUSE_AFTER_UP: evicts_host_pages_that_go_up,
    Wait.HOST_READ_AFTER_DOWN: writes_what_host_evicts,
}


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("scenario", dict.fromkeys(SCENARIOS.values()), ids=lambda scenario: scenario.__name__)
def test_with_all_waits_every_byte_is_right_and_nothing_races(
    scenario: Callable[[SimulatedDevice], None], schedule: Schedule
) -> None:
    scenario(SimulatedDevice(schedule))


@pytest.mark.parametrize("wait", SCENARIOS, ids=lambda wait: wait.name)
def test_a_wait_that_is_left_out_is_noticed(wait: Wait) -> None:
    device = SimulatedDevice("late", without=wait)
    try:
        SCENARIOS[wait](device)
    except AssertionError:
        return
    pytest.fail(f"{wait.name} is left out, and nothing shows it")


class LosesDevice(SimulatedDevice):
    """A device whose copies in one direction raise from a certain call on. `went_up`: blocks of copies up of whole pages."""

    def __init__(self, schedule: Schedule, direction: str = "", calls: float = math.inf) -> None:
        super().__init__(schedule)
        self.direction = direction
        self.calls_left = calls
        self.went_up: list[int] = []

    def copies(self, blocks: Tensor) -> Copies:
        return _LosingCopies(self, super().copies(blocks))


class _LosingCopies:
    def __init__(self, device: LosesDevice, copies: Copies) -> None:
        self._device = device
        self._copies = copies

    def up(
        self,
        host: Tensor,
        slots: Sequence[int],
        block_ids: Sequence[int],
        *,
        after: Iterable[After] = (),
        layers: range | None = None,
    ) -> Event:
        self._submit("up")
        if layers is None or len(layers) == LAYOUT.layers:
            self._device.went_up += block_ids
        return self._copies.up(host, slots, block_ids, after=after, layers=layers)

    def down(self, block_ids: Sequence[int], host: Tensor, slots: Sequence[int], *, after: Iterable[After] = ()) -> Event:
        self._submit("down")
        return self._copies.down(block_ids, host, slots, after=after)

    def _submit(self, direction: str) -> None:
        if direction == self._device.direction:
            self._device.calls_left -= 1
            if self._device.calls_left < 0:
                raise DeviceLost("the device is lost on purpose")


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("calls", range(4))
@pytest.mark.parametrize("plan", [ALL, LAYERS], ids=["parts", "layers"])
def test_a_device_that_is_lost_in_a_load_costs_pages_and_no_block(schedule: Schedule, calls: int, plan: LoadPlan) -> None:
    tokens = prompt_of(1, 3 * PART_PAGES_MAX)
    store, device = filled(MemoryStore(), tokens), LosesDevice(schedule, "up", calls)
    worker = DeviceWorker(device, 100, store=store, planner=FixedPlanner(plan))
    _, load = worker.run(tokens)
    copies = 3 if plan is ALL else LAYOUT.layers
    assert load.arrived_blocks == (96 if calls >= copies else 0), "a batch whose copies broke off has not arrived"
    worker.end()


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("calls", range(3))
def test_a_device_that_is_lost_between_the_pools_costs_pages_and_no_block(schedule: Schedule, calls: int) -> None:
    for direction in ("up", "down"):
        worker = DeviceWorker(LosesDevice(schedule, direction, calls), 6, host_blocks=9)
        lost = 0
        for family in (1, 2, 3, 1, 2):
            try:
                worker.run(prompt_of(family))
            except DeviceLost:
                lost += 1
            worker.manager.check()
        assert lost == (0 if direction == "down" else 2 - min(calls, 2))
        worker.end()


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("policy", ["write-behind", "write-through", "on-evict"])
def test_a_device_that_is_lost_while_pages_are_written_gives_their_blocks_back(schedule: Schedule, policy: str) -> None:
    store = MemoryStore()
    worker = DeviceWorker(LosesDevice(schedule, "down", 1), 6, store=store, write_policy=policy)
    for family in (1, 2, 3):
        worker.run(prompt_of(family))
    worker.end()
    whole = {**filled(MemoryStore(), prompt_of(1)).pages, **filled(MemoryStore(), prompt_of(2)).pages}
    assert store.pages.items() <= {**whole, **filled(MemoryStore(), prompt_of(3)).pages}.items()


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("plan", [ALL, LAYERS], ids=["parts", "layers"])
@pytest.mark.parametrize("status", [PageStatus.CORRUPT, PageStatus.MISSING, PageStatus.INCOMPLETE])
def test_a_page_that_is_not_whole_in_staging_is_computed(schedule: Schedule, plan: LoadPlan, status: PageStatus) -> None:
    store, device = filled(MemoryStore(), prompt_of(1, 8)), LosesDevice(schedule)
    store.read_status = lambda index: status if index == 3 else PageStatus.OK
    worker = DeviceWorker(device, 10, store=store, planner=FixedPlanner(plan))
    table, load = worker.run(prompt_of(1, 8), release=False)
    assert load.arrived_blocks == 7
    assert table.block_ids[3] not in device.went_up
    worker.read(table, prompt_of(1, 8), range(8))
    worker.manager.release(table)
    worker.end()


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("page", [0, PART_PAGES_MAX - 1, PART_PAGES_MAX + 1])
@pytest.mark.parametrize("closes", [False, True], ids=["cancelled", "closed"])
def test_a_load_that_ends_in_any_part_gives_its_blocks_back_after_its_copies(schedule: Schedule, page: int, closes: bool) -> None:
    blocks, device = 3 * PART_PAGES_MAX, SimulatedDevice(schedule)
    store, reached, going_on = filled(MemoryStore(), prompt_of(1, blocks)), threading.Event(), threading.Event()
    stalls = block_hashes(NAMESPACE, prompt_of(1, blocks), LAYOUT.block_tokens)[page]

    def stall(name: bytes) -> None:
        if name == stalls:
            reached.set()
            going_on.wait(WAIT_MS / 1e3)

    store.on_page = stall
    worker = DeviceWorker(device, blocks + 1, store=store, planner=FixedPlanner(ALL))
    table, load = worker.manager.admit(prompt_of(1, blocks), [])
    assert reached.wait(WAIT_MS / 1e3)
    if closes:
        worker.manager.close()
    worker.manager.loads.abandon(table, load)
    worker.manager.release(table)
    assert worker.manager.statistics().quarantined == blocks
    going_on.set()
    assert eventually(lambda: worker.manager.available_blocks == blocks + 1)
    assert store.calls.count("read") <= 2, "a load that is over reads no further part"
    if not closes:
        store.pages.clear()
        worker.run(prompt_of(2, blocks))
    worker.end()


def test_a_load_that_finds_no_slots_ends_at_its_deadline_though_others_stall() -> None:
    device, store = SimulatedDevice("late"), MemoryStore()
    for family in range(STAGING_PARTS + 1):
        filled(store, prompt_of(family, PART_PAGES_MAX))
    store.gate.clear()
    plan = LoadPlan(0, 9_999, 9_999, 50.0)
    blocks = (STAGING_PARTS + 1) * (PART_PAGES_MAX + 1)
    worker = DeviceWorker(device, blocks, store=store, planner=FixedPlanner(plan))
    running = []
    for family in range(STAGING_PARTS):
        running.append(worker.manager.admit(prompt_of(family, PART_PAGES_MAX), []))
        assert eventually(lambda: store.calls.count("read") == len(running))
    tokens = prompt_of(STAGING_PARTS, PART_PAGES_MAX)
    table, load = worker.manager.admit(tokens, [])
    worker.take(table, load, tokens)
    assert (load.arrived_blocks, load.end in {LoadEnd.LATE, LoadEnd.COMPLETE}) == (0, True)
    assert eventually(lambda: worker.manager.available_blocks + table.blocks + len(running) * (PART_PAGES_MAX + 1) == blocks)
    worker.manager.check()
    for other, stalled in running:
        worker.manager.loads.abandon(other, stalled)
        worker.manager.release(other)
    assert worker.manager.statistics().quarantined == STAGING_PARTS * PART_PAGES_MAX
    store.gate.set()
    worker.manager.release(table)
    assert eventually(lambda: worker.manager.available_blocks == blocks)
    worker.end()


class SlowStore(MemoryStore):
    """Records the time that it is given for each read."""

    def __init__(self) -> None:
        super().__init__()
        self.given_ms: list[float] = []

    def read(self, *arguments: Any, deadline_ms: float, **others: Any) -> ReadResult:
        self.given_ms.append(deadline_ms)
        return super().read(*arguments, deadline_ms=deadline_ms, **others)


def test_slots_are_taken_for_no_longer_than_a_node_fairly_needs() -> None:
    store = SlowStore()
    worker = DeviceWorker(SimulatedDevice("early"), 100, store=filled(store, prompt_of(1, 96)), planner=FixedPlanner(ALL))
    worker.run(prompt_of(1, 96))
    assert len(store.given_ms) == 3
    assert max(store.given_ms) <= part_deadline_ms(PART_PAGES_MAX * LAYOUT.page_bytes) < WAIT_MS
    worker.end()


def test_a_prompt_by_layers_that_staging_has_no_room_for_is_read_in_parts() -> None:
    blocks = STAGING_PARTS * PART_PAGES_MAX // 2 + 1
    store = filled(MemoryStore(), prompt_of(1, blocks))
    worker = DeviceWorker(SimulatedDevice("late"), blocks + 1, store=store, planner=FixedPlanner(LAYERS))
    table, load = worker.manager.admit(prompt_of(1, blocks), [])
    for layer in (0, 1, None):
        worker.manager.loads.wait_layer(load, layer)
    assert store.calls.count("read") == STAGING_PARTS // 2 + 1
    assert worker.take(table, load, prompt_of(1, blocks)) == blocks
    worker.read(table, prompt_of(1, blocks), range(blocks))
    worker.manager.release(table)
    worker.end()
