"""The connector's transfers on the simulated device, for each of vLLM's memory orders, with all waits and without each in turn."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from unittest.mock import patch

import pytest
from torch import Tensor

from attnstore_worker.device.base import After, EngineCopies, Event, Wait
from attnstore_worker.device.simulated import Schedule, SimulatedDevice
from attnstore_worker.errors import OutOfDeviceMemory
from experiments.device_faults.connector import (
    LAYOUT,
    ORDERS,
    PAGES_OF_TWO,
    SPLIT_ORDERS,
    EngineWorker,
    content,
    ends_a_request_that_is_loaded,
    filled,
    loads_into_recycled_blocks,
    name_of,
    saves_more_than_the_ring_holds,
)

SCHEDULES: tuple[Schedule, ...] = ("early", "late")


class FailsLater:
    """Copies of which all loads but the first fail."""

    def __init__(self, copies: EngineCopies) -> None:
        self._copies = copies
        self._loads = 0

    def load(self, host: Tensor, slots: Sequence[int], block_ids: Sequence[int], *, after: Iterable[After] = ()) -> Event:
        self._loads += 1
        if self._loads > 1:
            raise OutOfDeviceMemory("on purpose")
        return self._copies.load(host, slots, block_ids, after=after)

    def save(self, block_ids: Sequence[int], host: Tensor, slots: Sequence[int]) -> Event:
        return self._copies.save(block_ids, host, slots)


def fails_between_parts(device: SimulatedDevice, order: str = "LBNHC") -> None:
    """vLLM computes all blocks of a load whose second part could not be copied."""
    new = {block: 100 + block for block in range(4)}
    copies = device.engine_copies
    with patch.object(device, "engine_copies", lambda *arguments: FailsLater(copies(*arguments))):
        worker = EngineWorker(device, order, store=filled(new.values()))
    worker.load("r", new)
    assert worker.wait_loaded("r") == set(new)
    worker.step(writes=new)
    worker.step(reads=new)
    worker.close()


def reuses_slots_of_saved_pages(device: SimulatedDevice, order: str = "LBNHC") -> None:
    """More pages are saved than there is memory for at a time, each step right after its predecessor was written."""
    worker = EngineWorker(device, order)
    pages = range(64)
    for first in pages[::16]:
        computed = {block: first + block for block in range(16)}
        worker.step(writes=computed)
        worker.save(computed)
        worker.wait_until(lambda: name_of(max(computed.values())) in worker.store.pages)  # noqa: B023
    worker.close()
    assert worker.store.pages == {name_of(page): content(page) for page in pages}


SCENARIOS: dict[str, Callable[[SimulatedDevice, str], None]] = {
    "save": reuses_slots_of_saved_pages,
    "preempt": saves_more_than_the_ring_holds,
    "load, reuse": loads_into_recycled_blocks,
    "abort": ends_a_request_that_is_loaded,
    "fail": fails_between_parts,
}
NEEDED: dict[Wait, Callable[[SimulatedDevice, str], None]] = {
    Wait.GATHER_AFTER_DOWN: saves_more_than_the_ring_holds,
    Wait.DOWN_AFTER_GATHER: saves_more_than_the_ring_holds,
    Wait.WRITTEN_AFTER_DOWN: saves_more_than_the_ring_holds,
    Wait.UP_AFTER_COMPUTE: loads_into_recycled_blocks,
    Wait.STAGING_AFTER_UP: loads_into_recycled_blocks,
    Wait.ARRIVED_AFTER_UP: loads_into_recycled_blocks,
    Wait.RELEASED_AFTER_UP: fails_between_parts,
    Wait.STEP_AFTER_ENDED_UP: ends_a_request_that_is_loaded,
}
"""Every wait of the transfers, with a scenario that needs it."""


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("order", [*ORDERS, *SPLIT_ORDERS, *PAGES_OF_TWO])
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_every_byte_is_right_in_every_memory_order(scenario: str, order: str, schedule: Schedule) -> None:
    SCENARIOS[scenario](SimulatedDevice(schedule), order)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("order", [*ORDERS, SPLIT_ORDERS[0], PAGES_OF_TWO[0]])
@pytest.mark.parametrize("wait", NEEDED, ids=lambda wait: wait.name.lower())
def test_a_wait_that_is_left_out_is_noticed(wait: Wait, order: str, schedule: Schedule) -> None:
    device = SimulatedDevice(schedule, without=wait)
    with pytest.raises(AssertionError):
        NEEDED[wait](device, order)


def test_a_page_is_the_same_in_every_memory_order() -> None:
    """A worker reads what another one with another order has saved."""
    store = filled(())
    computed = {block: 100 + block for block in range(4)}
    first = EngineWorker(SimulatedDevice(), ORDERS[0], store=store)
    first.step(writes=computed)
    first.save(computed)
    first.close()
    for order in [*ORDERS[1:], *SPLIT_ORDERS]:
        other = EngineWorker(SimulatedDevice(), order, store=store)
        moved = {block + 7: page for block, page in computed.items()}
        other.load("r", moved)
        assert other.wait_loaded("r") == set()
        other.step(reads=moved)
        other.close()


def test_a_device_that_is_lost_costs_the_store_pages_and_memory_for_none() -> None:
    worker = EngineWorker(SimulatedDevice())
    blocks = {block: block for block in range(20)}
    for _ in range(3):
        with patch.object(worker.transfers._saves[0], "_copies") as copies:
            copies.save.side_effect = OutOfDeviceMemory("on purpose")
            worker.save(blocks)
    worker.step(writes=blocks)
    worker.save(blocks)
    worker.close()
    assert len(worker.store.pages) == 20, "their memory is free again"
    assert LAYOUT.page_bytes == len(worker.store.pages[name_of(0)])
