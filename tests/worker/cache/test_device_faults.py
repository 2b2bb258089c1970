"""Faults of a cache on a device: cancelled loads, corrupt pages, stalled stores and a device
that is lost cost pages, and no block or slot.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from typing import Any

import pytest
from torch import Tensor

from attnstore.core.hashing import block_hashes
from attnstore.types import PageStatus, ReadResult
from attnstore_worker.cache.moving.load import LoadEnd, LoadPlan
from attnstore_worker.cache.moving.staging import PART_PAGES_MAX, STAGING_PARTS, part_deadline_ms
from attnstore_worker.device.base import Copies
from attnstore_worker.device.simulated import Schedule, SimulatedDevice
from attnstore_worker.errors import DeviceLost
from attnstore_worker.testing import FixedPlanner, MemoryStore
from experiments.device_faults.caches import ALL, LAYERS, filled
from experiments.device_faults.worker import LAYOUT, NAMESPACE, WAIT_MS, DeviceWorker, prompt_of
from tests.samples import eventually
from tests.worker.device.watched_copies import WatchedCopies

SCHEDULES: tuple[Schedule, ...] = ("early", "late")


class LosesDevice(SimulatedDevice):
    """A device whose copies in one direction raise from a certain call on. `went_up`: blocks of copies up of whole pages."""

    def __init__(self, schedule: Schedule, direction: str = "", calls: float = math.inf) -> None:
        super().__init__(schedule)
        self.direction = direction
        self.calls_left = calls
        self.went_up: list[int] = []

    def copies(self, blocks: Tensor) -> Copies:
        return WatchedCopies(super().copies(blocks), self._submitting)

    def _submitting(self, direction: str, block_ids: Sequence[int], layers: range | None) -> None:
        if direction == self.direction:
            self.calls_left -= 1
            if self.calls_left < 0:
                raise DeviceLost("the device is lost on purpose")
        if direction == "up" and (layers is None or len(layers) == LAYOUT.layers):
            self.went_up += block_ids


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
