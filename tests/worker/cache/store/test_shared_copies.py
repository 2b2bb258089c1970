"""Copies from a node's memory: a page counts if its stamp is unchanged after its copy; a cancelled load ends after its copies."""

from __future__ import annotations

import pytest
from torch import Tensor

from attnstore.errors import DeadlineExceeded, InvalidArgument
from attnstore.types import PageStatus
from attnstore_worker.device.base import Wait
from attnstore_worker.device.races import Unsynchronised
from attnstore_worker.device.simulated import Schedule, SimulatedDevice
from experiments.device_faults.nodes import SCENARIOS, Copied, Lends
from experiments.device_faults.worker import LAYOUT

SCHEDULES: tuple[Schedule, ...] = ("early", "late")


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_stamps_are_checked_after_the_copies_have_ended(schedule: Schedule) -> None:
    device = SimulatedDevice(schedule)
    store = Lends(device)
    store.extent.recycled = {6}
    copied = Copied(store, device)
    assert copied.result is not None
    assert copied.result.statuses == (PageStatus.OK, PageStatus.OK, PageStatus.MISSING, PageStatus.OK)
    assert copied.right() == [True] * 4, "a node writes a page only after its stamp was checked"
    assert (copied.result.bytes_read, copied.result.transport) == (3 * LAYOUT.page_bytes, "shm")
    assert device.races.found == []


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_load_that_is_over_has_no_pages_and_ends_after_its_copies(schedule: Schedule) -> None:
    device = SimulatedDevice(schedule)
    copied = Copied(Lends(device), device, lambda: False)
    assert copied.result is not None
    assert set(copied.result.statuses) == {PageStatus.INCOMPLETE}
    assert copied.right() == [True] * 4


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("wait", SCENARIOS, ids=lambda wait: wait.name)
def test_a_wait_that_is_left_out_is_a_race(wait: Wait, schedule: Schedule) -> None:
    SCENARIOS[wait](SimulatedDevice(schedule))
    with pytest.raises(Unsynchronised):
        SCENARIOS[wait](SimulatedDevice(schedule, without=wait))


def test_pages_that_are_not_aligned_or_not_registered_go_through_staging() -> None:
    device = SimulatedDevice()
    assert Copied(Lends(device, offset_bytes=16), device).result is None

    class Refusing(SimulatedDevice):
        def register(self, host: Tensor) -> bool:
            del host
            return False

    device = Refusing()
    assert Copied(Lends(device), device).result is None


def test_a_store_on_another_host_is_asked_once_and_one_that_is_late_again() -> None:
    device = SimulatedDevice()
    for error, asked in ((InvalidArgument("not on this host"), 1), (DeadlineExceeded("late"), 2)):
        store = Lends(device, error=error)
        copied = Copied(store, device)
        copied.read()
        assert (copied.result, store.asked) == (None, asked)
