"""A cache on the simulated device, and steps that compute and read the pages of prompts there."""

from __future__ import annotations

import random
import time
from collections.abc import Callable

import torch

from attnstore.clock import Clock, MonotonicClock
from attnstore.core.hashing import Namespace
from attnstore.core.layout import DType, PageLayout
from attnstore_worker.cache import CacheManager, Load, PageStore, Planner, RemoteTier
from attnstore_worker.cache.pool.block_table import BlockTable
from attnstore_worker.cache.pool.device_blocks import DeviceBlocks
from attnstore_worker.cache.pool.host_tier import PinnedHostTier
from attnstore_worker.cache.store.base import SharedStore
from attnstore_worker.cache.store.shared_copies import SharedCopies
from attnstore_worker.device.simulated import SimulatedDevice

WAIT_MS = 30_000
LAYOUT = PageLayout(layers=2, kv_heads=1, head_dim=4, block_tokens=4, dtype=DType.FP32)
NAMESPACE = Namespace(b"n" * 32)


def content(tokens: list[int], index: int) -> bytes:
    return random.Random(repr(tokens[: (index + 1) * LAYOUT.block_tokens])).randbytes(LAYOUT.page_bytes)


def prompt_of(family: int, blocks: int = 4) -> list[int]:
    return [1000 * family + index for index in range(blocks * LAYOUT.block_tokens + 1)]


class DeviceWorker:
    """A manager with `blocks` blocks on `device`, and `host_blocks` in HOST."""

    def __init__(
        self,
        device: SimulatedDevice,
        blocks: int,
        *,
        store: PageStore | None = None,
        host_blocks: int = 0,
        write_policy: str = "write-behind",
        planner: Planner | None = None,
        clock: Clock | None = None,
        deadline_ms: int = WAIT_MS,
    ) -> None:
        clock = clock or MonotonicClock()
        self.device = device
        remote = RemoteTier(store, NAMESPACE, LAYOUT, deadline_ms=deadline_ms, clock=clock) if store is not None else None
        pages = DeviceBlocks(device, LAYOUT, blocks * LAYOUT.page_bytes)
        shared = SharedCopies(store, NAMESPACE, pages, remote) if remote is not None and isinstance(store, SharedStore) else None
        host = PinnedHostTier(pages, host_blocks * LAYOUT.page_bytes) if host_blocks else None
        self.manager = CacheManager(
            pages, NAMESPACE, remote=remote, clock=clock, host=host, shared=shared, write_policy=write_policy, planner=planner
        )

    def compute(self, table: BlockTable, tokens: list[int], blocks: range) -> None:
        """A step that writes blocks of a prompt. Nothing waits for its end."""
        self.manager.before_step()
        assert self.device.accesses is not None
        self.device.accesses.step((), [table.block_ids[index] for index in blocks])
        for index in blocks:
            page = torch.frombuffer(bytearray(content(tokens, index)), dtype=torch.float32)
            self.device.known_blocks[table.block_ids[index]] = page.view(LAYOUT.shape)

    def read(self, table: BlockTable, tokens: list[int], blocks: range) -> None:
        """A step that reads blocks of a prompt, and finds the right bytes."""
        self.manager.before_step()
        assert self.device.accesses is not None
        self.device.accesses.step([table.block_ids[index] for index in blocks], ())
        for index in blocks:
            found = self.device.known_blocks[table.block_ids[index]].view(torch.uint8).numpy().tobytes()
            assert found == content(tokens, index), f"block {index} has not the bytes of its page"

    def read_layer(self, table: BlockTable, tokens: list[int], blocks: range, layer: int) -> None:
        """The part of a running step that reads one layer of blocks."""
        assert self.device.accesses is not None
        self.device.accesses.step([table.block_ids[index] for index in blocks], (), layers=range(layer, layer + 1))
        begin, end = LAYOUT.layer_slice(layer, layer + 1)
        for index in blocks:
            found = self.device.known_blocks[table.block_ids[index], layer].view(torch.uint8).numpy().tobytes()
            assert found == content(tokens, index)[begin:end], f"layer {layer} of block {index} has not the bytes of its page"

    def take(self, table: BlockTable, load: Load, tokens: list[int]) -> int:
        """Takes what a load brings until it is over, and computes the blocks that it leaves out. Returns the number of sealed
        blocks.
        """
        done = self.manager.loads.advance(table, load, table.sealed * LAYOUT.block_tokens)
        while not load.over:
            if self.manager.loads.claim(load, done + LAYOUT.block_tokens) > done:
                self.compute(table, tokens, range(table.sealed, table.sealed + 1))
                done += LAYOUT.block_tokens
                self.manager.seal(table, tokens, done)
            else:
                self.manager.loads.wait(1)
            done = self.manager.loads.advance(table, load, done)
        return table.sealed

    def run(self, tokens: list[int], *, release: bool = True) -> tuple[BlockTable, Load]:
        """Admits a prompt, reads what the tiers have of it, computes the rest and seals it."""
        table, load = self.manager.admit(tokens, [])
        sealed = self.take(table, load, tokens)
        self.read(table, tokens, range(sealed))
        blocks = len(tokens) // LAYOUT.block_tokens
        self.compute(table, tokens, range(sealed, blocks))
        self.manager.seal(table, tokens, len(tokens))
        self.manager.end_step()
        self.manager.check()
        if release:
            self.manager.release(table)
        return table, load

    def wait_until(self, claim: Callable[[], bool]) -> None:
        """Waits for something that loads bring about."""
        give_up_s = time.monotonic() + WAIT_MS / 1e3
        while not claim():
            assert time.monotonic() < give_up_s, "loads do not go on"
            self.manager.loads.wait(1)

    def end(self) -> None:
        """Waits for all writes, and checks that nothing is held, lost or raced."""
        assert self.manager.flush(WAIT_MS)
        self.manager.close()
        self.manager.check()
        assert self.manager.statistics().pool.held == 0
        assert self.manager.statistics().quarantined == 0
        self.device.close()
        assert self.device.races.found == []
