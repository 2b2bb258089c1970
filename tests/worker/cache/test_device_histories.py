"""Random histories of prompts on a device: admitted, loaded, computed, cancelled and evicted, with a store that fails at times.

The model is the content of each page, which follows from its tokens: whatever a step reads must be that. Blocks, slots and staging
are conserved after every action, and no access races.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

import pytest

from attnstore.errors import Overloaded
from attnstore.types import PageStatus
from attnstore_worker.cache import Load
from attnstore_worker.cache.moving.load import FetchOrder, LoadPlan
from attnstore_worker.cache.pool.block_table import BlockTable
from attnstore_worker.device.simulated import Schedule, SimulatedDevice
from attnstore_worker.testing import FixedPlanner, MemoryStore
from experiments.device_faults.worker import LAYOUT, DeviceWorker, prompt_of

FAMILIES = 6
BLOCKS_MAX = 5
POOL_BLOCKS = 14
ACTIONS = 200
PLANS = {order: LoadPlan(0, 9_999, 2, 30_000.0, order) for order in FetchOrder}


@dataclass(eq=False)
class Running:
    """A prompt that was admitted, of whose blocks the first `done` are sealed or arrived."""

    tokens: list[int]
    table: BlockTable
    load: Load | None
    done: int


class History:
    """One worker, and the prompts that it runs."""

    def __init__(self, seed: int, schedule: Schedule) -> None:
        self.draws = random.Random(seed)
        self.store = MemoryStore()
        plan = PLANS[self.draws.choice(list(FetchOrder))] if self.draws.random() < 0.7 else None
        self.worker = DeviceWorker(
            SimulatedDevice(schedule),
            POOL_BLOCKS,
            store=self.store,
            host_blocks=self.draws.choice([0, 6]),
            write_policy=self.draws.choice(["write-behind", "write-through", "on-evict"]),
            planner=FixedPlanner(plan) if plan is not None else None,
        )
        self.manager = self.worker.manager
        self.running: list[Running] = []

    def act(self) -> None:
        """One random action."""
        self.draws.choice([self.admit, self.admit, self.advance, self.advance, self.compute, self.end, self.drop, self.fail])()
        self.manager.check()

    def admit(self) -> None:
        """A prompt that shares its beginning with others of its family."""
        tokens = prompt_of(self.draws.randrange(FAMILIES), self.draws.randint(1, BLOCKS_MAX))
        try:
            table, load = self.manager.admit(tokens, [])
        except Overloaded:
            return
        self.worker.read(table, tokens, range(table.sealed))
        self.running.append(Running(tokens, table, load, table.sealed))

    def advance(self) -> None:
        """Takes what a load has brought, and reads it."""
        loading = [each for each in self.running if each.load is not None]
        if not loading:
            return
        each = self.draws.choice(loading)
        assert each.load is not None
        if self.draws.random() < 0.5:
            self.manager.loads.wait(1)
        tokens = self.manager.loads.advance(each.table, each.load, each.done * LAYOUT.block_tokens)
        each.done = tokens // LAYOUT.block_tokens
        self.worker.read(each.table, each.tokens, range(each.done))
        if each.load.over:
            each.load = None

    def compute(self) -> None:
        """Computes the next block of a prompt, if a load leaves it to the engine."""
        unfinished = [each for each in self.running if each.done < len(each.tokens) // LAYOUT.block_tokens]
        if not unfinished:
            return
        each = self.draws.choice(unfinished)
        end = (each.done + 1) * LAYOUT.block_tokens
        if each.load is not None and self.manager.loads.claim(each.load, end) < end:
            return
        try:
            self.manager.grow(each.table, len(each.tokens))
        except Overloaded:  # the table was cut, and there is no block for the rest
            self.give_up(each)
            return
        self.worker.compute(each.table, each.tokens, range(each.done, each.done + 1))
        each.done += 1
        self.manager.seal(each.table, each.tokens, end)
        self.manager.end_step()

    def end(self) -> None:
        """A prompt ends, or is preempted or cancelled in any state."""
        if self.running:
            self.give_up(self.draws.choice(self.running))

    def give_up(self, each: Running) -> None:
        """Ends a prompt."""
        if each.load is not None:
            self.manager.loads.abandon(each.table, each.load)
        self.manager.release(each.table)
        self.running.remove(each)

    def drop(self) -> None:
        """Everything that nobody holds leaves the pool."""
        if self.draws.random() < 0.3:
            self.manager.drop_cached()

    def fail(self) -> None:
        """The store begins or ceases to lose pages."""
        lost = self.draws.choice([0.0, 0.0, 0.3, 1.0])
        draws = random.Random(self.draws.random())
        self.store.read_status = lambda _: PageStatus.INCOMPLETE if draws.random() < lost else PageStatus.OK


@pytest.mark.parametrize("schedule", ["early", "late"])
@pytest.mark.parametrize("seed", range(15))
def test_every_page_that_a_step_reads_has_its_bytes(seed: int, schedule: Schedule) -> None:
    history = History(seed, schedule)
    for _ in range(ACTIONS):
        history.act()
    for each in list(history.running):
        history.give_up(each)
    history.worker.wait_until(lambda: history.manager.available_blocks >= 0 and history.manager.statistics().quarantined == 0)
    history.worker.end()
