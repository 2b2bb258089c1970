"""A cache on the simulated device: one scenario for each of its waits, the shortest that needs it.

Owns: `SCENARIOS`. Invariant: each raises `AssertionError` if a page differs, a block is lost or an access races.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Final

from attnstore.core.hashing import block_hashes
from attnstore_worker.cache.moving.load import FetchOrder, LoadPlan
from attnstore_worker.cache.moving.staging import PART_PAGES_MAX, STAGING_PARTS
from attnstore_worker.device.base import Wait
from attnstore_worker.device.simulated import SimulatedDevice
from attnstore_worker.testing import FixedPlanner, MemoryStore
from experiments.device_faults.worker import LAYOUT, NAMESPACE, WAIT_MS, DeviceWorker, content, prompt_of

LAYERS: Final = LoadPlan(0, 9_999, 9_999, float(WAIT_MS), FetchOrder.LAYERS)
ALL: Final = LoadPlan(0, 9_999, 9_999, float(WAIT_MS))


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

    def when_computed(layer: int) -> None:
        if layer:
            computed[layer - 1].wait(WAIT_MS / 1e3)

    store.before_layer = when_computed
    worker = DeviceWorker(device, 6, store=store, planner=FixedPlanner(LAYERS))
    table, load = worker.manager.admit(tokens, [])
    try:
        worker.wait_until(lambda: load.may_compute_behind(0))
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
        worker.wait_until(lambda: worker.manager.available_blocks == blocks + 1)
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


SCENARIOS: Final[dict[Wait, Callable[[SimulatedDevice], None]]] = {
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
