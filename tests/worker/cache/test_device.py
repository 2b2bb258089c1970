"""The cache on a device with memory of its own: pages arrive and leave by copies, and no copy meets a step, a transport or another
copy that it is not ordered with.
"""

from __future__ import annotations

from typing import Any

import pytest
from torch import Tensor

from attnstore.core.hashing import BlockHash, block_hashes
from attnstore.errors import InvalidArgument
from attnstore.testing import StoreProcess
from attnstore.types import ReadResult
from attnstore_worker.cache import open_store
from attnstore_worker.cache.moving.load import LoadEnd
from attnstore_worker.cache.pool.tier import Tier
from attnstore_worker.device.simulated import Schedule, SimulatedDevice
from attnstore_worker.engine import Engine, EngineOptions
from attnstore_worker.model import LoadedModel
from attnstore_worker.options import SharedUse
from attnstore_worker.testing import FixedPlanner, MemoryStore
from experiments.device_faults.caches import LAYERS
from experiments.device_faults.worker import LAYOUT, NAMESPACE, WAIT_MS, DeviceWorker, content, prompt_of
from tests.samples import eventually


@pytest.fixture(params=["early", "late"])
def device(request: pytest.FixtureRequest) -> SimulatedDevice:
    schedule: Schedule = request.param
    return SimulatedDevice(schedule)


def names(tokens: list[int]) -> list[BlockHash]:
    return block_hashes(NAMESPACE, tokens, LAYOUT.block_tokens)


def test_the_store_gets_the_pages_that_steps_computed_and_gives_them_back(device: SimulatedDevice, store: MemoryStore) -> None:
    """More pages than one part, and no step is waited for before its pages are written."""
    tokens = prompt_of(1, blocks=100)
    first = DeviceWorker(device, blocks=110, store=store)
    first.run(tokens)
    first.end()
    assert store.pages == {name: content(tokens, index) for index, name in enumerate(names(tokens))}
    second = DeviceWorker(SimulatedDevice(device.schedule), blocks=110, store=store)
    _, load = second.run(tokens)
    assert (load.arrived_blocks, load.end) == (100, LoadEnd.COMPLETE)
    second.end()


@pytest.mark.parametrize("transport", ["grpc", "tcp", "shm"])
def test_a_store_node_and_a_device_exchange_pages_over_every_transport(device: SimulatedDevice, transport: str) -> None:
    tokens = prompt_of(1, blocks=40)
    with StoreProcess("--capacity", "64MiB") as node, open_store(node.url, deadline_ms=WAIT_MS, transport=transport) as client:
        first = DeviceWorker(device, blocks=50, store=client)
        first.run(tokens)
        first.end()
        for plan in (None, LAYERS):
            second = DeviceWorker(
                SimulatedDevice(device.schedule), blocks=50, store=client, planner=FixedPlanner(plan) if plan else None
            )
            assert second.run(tokens)[1].arrived_blocks == 40
            second.end()


class Counting:
    """A client whose reads are counted."""

    def __init__(self, client: Any) -> None:
        self._client = client
        self.reads = 0

    def read(self, *arguments: Any, **others: Any) -> ReadResult:
        self.reads += 1
        result: ReadResult = self._client.read(*arguments, **others)
        return result

    def __getattr__(self, name: str) -> Any:
        return getattr(self._client, name)


class Refusing(SimulatedDevice):
    """A device that registers no memory of others."""

    def register(self, host: Tensor) -> bool:
        del host
        return False


@pytest.mark.parametrize("schedule", ["early", "late"])
@pytest.mark.parametrize("registers", [True, False])
def test_pages_of_a_node_on_this_host_are_copied_from_its_memory_if_the_device_registers_it(
    schedule: Schedule, registers: bool
) -> None:
    tokens = prompt_of(1, blocks=40)
    with StoreProcess("--capacity", "64MiB") as node, open_store(node.url, deadline_ms=WAIT_MS) as client:
        first = DeviceWorker(SimulatedDevice(schedule), blocks=50, store=client)  # type: ignore[arg-type]
        first.run(tokens)
        first.end()
        store = Counting(client)
        device = SimulatedDevice(schedule) if registers else Refusing(schedule)
        second = DeviceWorker(device, blocks=50, store=store)  # type: ignore[arg-type]
        _, load = second.run(tokens)
        assert (load.arrived_blocks, len(load.shared)) == (40, 40)
        assert (store.reads == 0) == registers
        statistics = second.manager.statistics()
        assert statistics.remote.pages_read == 40
        assert statistics.tiers[Tier.SHARED].bytes_read == 40 * LAYOUT.page_bytes
        second.end()
        assert eventually(lambda: client.stats().leases == 0)


def test_a_block_is_free_once_its_page_is_copied_down_and_those_behind_it_can_be_reclaimed(
    device: SimulatedDevice, store: MemoryStore
) -> None:
    store.gate.clear()
    worker = DeviceWorker(device, blocks=8, store=store)
    worker.run(prompt_of(1, blocks=1))
    assert eventually(lambda: worker.manager.available_blocks == 8 and worker.manager.statistics().pool.held == 0)
    assert worker.manager.statistics().swap_out_pending == 1, "the store has not taken it"
    table = worker.manager.admit(prompt_of(2, blocks=6)[:1], [])[0]
    for family in (3, 4):  # their writes wait behind the first, and the last one needs the blocks of the other
        worker.manager.grow(table, 6 * LAYOUT.block_tokens)
        worker.compute(table, prompt_of(family, blocks=6), range(6))
        worker.manager.seal(table, prompt_of(family, blocks=6), 24)
        worker.manager.release(table)
        table = worker.manager.admit(prompt_of(2, blocks=6)[:1], [])[0]
    worker.manager.release(table)
    worker.manager.check()
    assert worker.manager.statistics().swap_out_dropped > 0
    store.gate.set()
    worker.end()
    assert store.pages[names(prompt_of(1))[0]] == content(prompt_of(1), 0)


def test_with_write_through_a_step_ends_when_its_pages_are_in_the_store(device: SimulatedDevice, store: MemoryStore) -> None:
    worker = DeviceWorker(device, blocks=8, store=store, write_policy="write-through")
    worker.run(prompt_of(1))
    assert len(store.pages) == 4
    worker.end()


def test_what_the_pool_evicts_comes_back_from_host(device: SimulatedDevice) -> None:
    worker = DeviceWorker(device, blocks=6, host_blocks=16)
    for family in (1, 2, 3, 1, 2, 3, 3, 1):
        worker.run(prompt_of(family))
    assert worker.manager.statistics().tiers[Tier.HOST].hit_tokens > 4 * LAYOUT.block_tokens
    worker.end()


def test_pages_move_between_both_pools_before_a_step_has_run(device: SimulatedDevice) -> None:
    """A prompt that is admitted and cancelled brings pages up from HOST into blocks whose pages go down, and the reverse."""
    worker = DeviceWorker(device, blocks=6, host_blocks=9)
    for family in (1, 2):
        worker.run(prompt_of(family))
    for family in (1, 2, 1, 2, 2, 1):
        worker.manager.release(worker.manager.admit(prompt_of(family), [])[0])
        worker.manager.check()
    for family in (1, 2):
        worker.run(prompt_of(family))
    worker.end()


@pytest.mark.parametrize("host_blocks", [0, 3])
def test_with_on_evict_the_store_gets_what_leaves_the_worker(device: SimulatedDevice, store: MemoryStore, host_blocks: int) -> None:
    worker = DeviceWorker(device, blocks=6, store=store, host_blocks=host_blocks, write_policy="on-evict")
    for family in range(1, 6):
        worker.run(prompt_of(family))
    assert worker.manager.flush(WAIT_MS)
    wanted = {name: content(prompt_of(f), i) for f in range(1, 6) for i, name in enumerate(names(prompt_of(f)))}
    assert len(store.pages) > 4
    assert store.pages.items() <= wanted.items()
    assert worker.run(prompt_of(1))[1].arrived_blocks > 0
    worker.end()


def test_pages_in_place_are_refused_on_a_device_that_does_not_read_host_memory(tiny: LoadedModel) -> None:
    with open_store("grpc://127.0.0.1:1", deadline_ms=WAIT_MS) as client:
        options = EngineOptions(pool_bytes=8 * tiny.layout(16).page_bytes, shared=SharedUse.IN_PLACE)
        with pytest.raises(InvalidArgument, match="attention on simulated does not read host memory"):
            Engine(tiny, options, store=client, device=SimulatedDevice())
