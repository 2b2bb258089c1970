"""The simulated device: poison, late landings, and each kind of wait left out."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch

from attnstore.core.layout import PageLayout
from attnstore_worker.device.base import Device, Wait
from attnstore_worker.device.host import HostDevice
from attnstore_worker.device.races import Unsynchronised
from attnstore_worker.device.simulated import Schedule, SimulatedDevice

LAYOUT = PageLayout(layers=2, kv_heads=1, head_dim=16, block_tokens=16)
SCHEDULES: tuple[Schedule, ...] = ("early", "late")
ARRIVED, WRITTEN = Wait.ARRIVED_AFTER_UP, Wait.WRITTEN_AFTER_DOWN


@pytest.fixture(params=["host", *SCHEDULES])
def device(request: pytest.FixtureRequest) -> Device:
    return HostDevice() if request.param == "host" else SimulatedDevice(request.param)


def random_pages(count: int) -> torch.Tensor:
    return torch.randn(count, *LAYOUT.shape).bfloat16()


def test_pages_come_back_as_they_went_up(device: Device) -> None:
    blocks, host = device.blocks(LAYOUT, 4), device.host_pages(LAYOUT, 4 * LAYOUT.page_bytes)
    pages = random_pages(2)
    host.tensor[:2] = pages
    copies = device.copies(blocks)
    up = copies.up(host.tensor, [0, 1], [3, 1])
    down = copies.down([3, 1], host.tensor, [2, 3], after=[(Wait.DOWN_AFTER_COMPUTE, up)])
    down.wait(WRITTEN)
    assert torch.equal(host.tensor[2:], pages)
    assert down.done()


def test_a_copy_of_layers_changes_no_other_layer(device: Device) -> None:
    blocks, host = device.blocks(LAYOUT, 2), device.host_pages(LAYOUT, LAYOUT.page_bytes)
    host.tensor[0] = 3.0
    device.copies(blocks).up(host.tensor, [0], [1], layers=range(1, 2)).wait(ARRIVED)
    assert bool((blocks[1, 0] == 0).all())
    assert bool((blocks[1, 1] == 3).all())


def test_a_transfer_brings_small_tensors_both_ways(device: Device) -> None:
    there, back = device.pinned(3, dtype=torch.int32), device.pinned(3, dtype=torch.int32)
    there.copy_(torch.tensor([1, 2, 3]))
    on_device = torch.zeros(3, dtype=torch.int32)
    device.transfer(there, on_device)
    assert on_device.tolist() == [1, 2, 3]
    device.transfer(on_device, back).wait(Wait.TOKENS_AFTER_COMPUTE)
    assert back.tolist() == [1, 2, 3]


def test_a_late_copy_is_poison_until_its_event_is_waited_for() -> None:
    device = SimulatedDevice("late")
    blocks, host = device.blocks(LAYOUT, 1), device.host_pages(LAYOUT, LAYOUT.page_bytes)
    host.tensor[0] = 1.0
    event = device.copies(blocks).up(host.tensor, [0], [0])
    assert not event.done()
    assert bool(blocks.isnan().all())
    host.tensor[0] = 2.0  # what a transport that fills the slot too early would do
    event.wait(ARRIVED)
    assert bool((blocks == 2).all())


def test_work_that_nobody_waits_for_ends_after_some_looks() -> None:
    device = SimulatedDevice("late")
    blocks, host = device.blocks(LAYOUT, 1), device.host_pages(LAYOUT, LAYOUT.page_bytes)
    event = device.copies(blocks).up(host.tensor, [0], [0])
    assert [event.done() for _ in range(4)] == [False, False, False, True]


def test_a_copy_up_says_how_long_it_took_once_it_has_ended_and_asking_ends_nothing() -> None:
    device = SimulatedDevice("late")
    device.copy_bytes_per_ms = LAYOUT.page_bytes / 5.0
    blocks, host = device.blocks(LAYOUT, 2), device.host_pages(LAYOUT, 2 * LAYOUT.page_bytes)
    copy = device.copies(blocks).up(host.tensor, [0, 1], [0, 1])
    assert [copy.elapsed_ms() for _ in range(9)] == [None] * 9
    assert bool(blocks.isnan().all())
    copy.wait(ARRIVED)
    assert copy.elapsed_ms() == pytest.approx(10.0)


def arrived(device: SimulatedDevice) -> None:
    """A load whose step follows after the host has waited for the copy."""
    blocks, host = device.blocks(LAYOUT, 1), device.host_pages(LAYOUT, LAYOUT.page_bytes)
    device.copies(blocks).up(host.tensor, [0], [0]).wait(ARRIVED)
    step(device, reads=[0])


def refilled(device: SimulatedDevice) -> None:
    blocks, host = device.blocks(LAYOUT, 1), device.host_pages(LAYOUT, LAYOUT.page_bytes)
    device.copies(blocks).up(host.tensor, [0], [0]).wait(Wait.STAGING_AFTER_UP)
    host_writes(device, host.tensor)


def recycled_by_a_load(device: SimulatedDevice) -> None:
    blocks, host = device.blocks(LAYOUT, 1), device.host_pages(LAYOUT, LAYOUT.page_bytes)
    step(device, reads=[0])
    device.copies(blocks).up(host.tensor, [0], [0], after=[(Wait.UP_AFTER_COMPUTE, device.compute.record())])


def saved(device: SimulatedDevice) -> None:
    blocks, host = device.blocks(LAYOUT, 1), device.host_pages(LAYOUT, LAYOUT.page_bytes)
    step(device, writes=[0])
    device.copies(blocks).down([0], host.tensor, [0], after=[(Wait.DOWN_AFTER_COMPUTE, device.compute.record())])


def evicted(device: SimulatedDevice) -> None:
    blocks, host = device.blocks(LAYOUT, 1), device.host_pages(LAYOUT, LAYOUT.page_bytes)
    down = device.copies(blocks).down([0], host.tensor, [0])
    device.compute.wait(down, Wait.COMPUTE_AFTER_DOWN)
    step(device, writes=[0])


def gated(device: SimulatedDevice) -> None:
    """The second layer is still on its way while a step uses the first."""
    blocks, host = device.blocks(LAYOUT, 1), device.host_pages(LAYOUT, LAYOUT.page_bytes)
    copies = device.copies(blocks)
    for layer in range(LAYOUT.layers):
        part = range(layer, layer + 1)
        device.compute.wait(copies.up(host.tensor, [0], [0], layers=part), Wait.COMPUTE_AFTER_UP)
        step(device, reads=[0], layers=part)


def read(device: SimulatedDevice) -> None:
    tokens = device.pinned(2, dtype=torch.int64)
    device.transfer(torch.ones(2, dtype=torch.int64), tokens).wait(Wait.TOKENS_AFTER_COMPUTE)
    assert device.accesses is not None
    device.accesses.host(tokens, [0], writes=False)
    assert tokens.tolist() == [1, 1]


def step(device: SimulatedDevice, reads: Sequence[int] = (), writes: Sequence[int] = (), layers: range | None = None) -> None:
    assert device.accesses is not None
    device.accesses.step(reads, writes, layers=layers)


def host_writes(device: SimulatedDevice, host: torch.Tensor) -> None:
    assert device.accesses is not None
    device.accesses.host(host, [0], writes=True)


PROGRAMS: dict[Wait, Callable[[SimulatedDevice], None]] = {
    Wait.ARRIVED_AFTER_UP: arrived,
    Wait.STAGING_AFTER_UP: refilled,
    Wait.UP_AFTER_COMPUTE: recycled_by_a_load,
    Wait.DOWN_AFTER_COMPUTE: saved,
    Wait.COMPUTE_AFTER_DOWN: evicted,
    Wait.COMPUTE_AFTER_UP: gated,
    Wait.TOKENS_AFTER_COMPUTE: read,
}


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("wait", PROGRAMS, ids=lambda wait: wait.name.lower())
def test_a_program_without_its_wait_races_and_with_it_does_not(schedule: Schedule, wait: Wait) -> None:
    whole, broken = SimulatedDevice(schedule), SimulatedDevice(schedule, without=wait)
    PROGRAMS[wait](whole)
    assert whole.races.found == []
    with pytest.raises(Unsynchronised):
        PROGRAMS[wait](broken)
    assert broken.races.found
