"""The transfers of the vLLM connector on the simulated device: one scenario for each of their waits, the shortest that needs it.

Owns: `SCENARIOS`, and `EngineWorker`, which stands for vLLM. Invariant: each raises `AssertionError` if a page differs or an access
races.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Final

import torch
from torch import Tensor

from attnstore.clock import MonotonicClock
from attnstore.core.hashing import BlockHash, Namespace
from attnstore.core.layout import PageLayout
from attnstore_worker.cache.store.remote import RemoteTier
from attnstore_worker.device.base import Wait
from attnstore_worker.device.simulated import SimulatedDevice
from attnstore_worker.testing import MemoryStore
from attnstore_worker.vllm.group_pages import GroupStore
from attnstore_worker.vllm.identity import page_layout
from attnstore_worker.vllm.kv_pages import kv_blocks
from attnstore_worker.vllm.plan import Pages, RequestLoad
from attnstore_worker.vllm.transfers import Transfers

ORDERS: Final = ("LBHNC", "LBNHC", "LHBNC", "BLHNC", "BLNHC", "BHLNC", "two planes")
"""The memory orders of vLLM's caches: layers, blocks, heads, tokens, and the content of K and V; and that of older versions."""
SPLIT_ORDERS: Final = tuple(f"{order}, blocks of two kernel blocks" for order in ("LBNHC", "LHBNC", "two planes"))
PAGES_OF_TWO: Final = tuple(f"{order}, pages of two blocks" for order in ORDERS)
_BLOCKS, _LAYERS, _HEADS, _TOKENS, _DIM = 24, 3, 2, 4, 8


def _layout(tokens: int) -> PageLayout:
    return page_layout(
        layers=_LAYERS,
        layer_block_bytes=_HEADS * tokens * 2 * _DIM * 2,
        kv_heads=_HEADS,
        block_tokens=tokens,
        tp_rank=0,
        tp_size=1,
    )


LAYOUT: Final = _layout(_TOKENS)
_SPACE: Final = Namespace(b"v" * 32)
_WAIT_S: Final = 30
_PART_PAGES: Final = 2


def name_of(page: int) -> BlockHash:
    return BlockHash(page.to_bytes(32, "big"))


def content(page: int) -> bytes:
    return random.Random(page).randbytes(LAYOUT.page_bytes)


def filled(pages: Iterable[int]) -> MemoryStore:
    """Returns a store that has these pages."""
    store = MemoryStore()
    store.namespaces.add(_SPACE)
    store.layouts[_SPACE] = LAYOUT
    store.pages = {name_of(page): content(page) for page in pages}
    return store


class Caches:
    """vLLM's caches in one of the orders above. Place `p` is the blocks of a page, `p * page_blocks` and those after it."""

    def __init__(self, name: str) -> None:
        order, _, parts = name.partition(", ")
        cut = 2 if parts else 1  # a page into blocks, or a block into those of kernels
        self.page_blocks = cut if parts.startswith("pages") else 1
        self.block_tokens = _TOKENS // self.page_blocks
        blocks, tokens = _BLOCKS * cut, _TOKENS // cut
        if order == "two planes":
            self.layers = [torch.zeros(2, blocks, tokens, _HEADS, _DIM, dtype=torch.bfloat16) for _ in range(_LAYERS)]
            own = [layer.permute(1, 3, 2, 0, 4) for layer in self.layers]
        else:
            sizes = {"L": _LAYERS, "B": blocks, "H": _HEADS, "N": tokens, "C": 2 * _DIM}
            memory = torch.zeros([sizes[each] for each in order], dtype=torch.bfloat16)
            self.layers = list(memory.permute([order.index(each) for each in "LBHNC"]).unbind())
            own = [torch.unflatten(layer, -1, (2, _DIM)) for layer in self.layers]
        if cut > self.page_blocks:
            own = [torch.unflatten(layer, 0, (_BLOCKS, cut)).movedim(1, 2) for layer in own]
        self._blocks = own

    def blocks_of(self, places: Iterable[int]) -> list[int]:
        """Returns the blocks of some places."""
        return [place * self.page_blocks + block for place in places for block in range(self.page_blocks)]

    def put(self, place: int, page: bytes) -> None:
        """Writes a page as the model does."""
        shape = (self.page_blocks, _LAYERS, *self._blocks[0].shape[1:])
        content = torch.frombuffer(bytearray(page), dtype=torch.bfloat16).view(shape)
        for block_id, parts in zip(self.blocks_of([place]), content, strict=True):
            for layer, part in zip(self._blocks, parts, strict=True):
                layer[block_id] = part

    def get(self, place: int) -> bytes:
        """Reads a page as the model does."""
        page: Tensor = torch.stack([layer[block_id] for block_id in self.blocks_of([place]) for layer in self._blocks])
        return page.view(torch.uint8).numpy().tobytes()


class EngineWorker:
    """An engine whose model computes, at place `b`, page `p`: `{b: p}`."""

    def __init__(self, device: SimulatedDevice, order: str = "LBNHC", *, store: MemoryStore | None = None) -> None:
        self.device = device
        self.store = store or filled(())
        self.caches = Caches(order)
        clock = MonotonicClock()
        group = GroupStore(
            RemoteTier(self.store, _SPACE, LAYOUT, deadline_ms=1e3 * _WAIT_S, clock=clock),
            kv_blocks(
                self.caches.layers,
                blocks=_BLOCKS * self.caches.page_blocks,
                layer_bytes=[LAYOUT.layer_bytes // self.caches.page_blocks] * _LAYERS,
            ),
            _layout(self.caches.block_tokens),
            LAYOUT,
            page_blocks=self.caches.page_blocks,
            step_pages=1,
        )
        self.transfers = Transfers(
            [[[group]]], device, clock, save_bytes_max=_BLOCKS * LAYOUT.page_bytes, part_bytes=_PART_PAGES * LAYOUT.page_bytes
        )

    def step(self, *, reads: Mapping[int, int] | None = None, writes: Mapping[int, int] | None = None) -> None:
        """A step that finds pages in blocks, and computes others. Nothing waits for its end."""
        reads, writes = reads or {}, writes or {}
        assert self.device.accesses is not None
        self.device.accesses.step(self.caches.blocks_of(reads), self.caches.blocks_of(writes))
        for block_id, page in reads.items():
            assert self.caches.get(block_id) == content(page), f"block {block_id} has not the bytes of page {page}"
        for block_id, page in writes.items():
            self.caches.put(block_id, content(page))

    def save(self, blocks: Mapping[int, int]) -> None:
        self.transfers.save([self._pages(blocks)])

    def load(self, request_id: str, blocks: Mapping[int, int]) -> None:
        self.transfers.load(RequestLoad(request_id, (self._pages(blocks),)))

    def wait_loaded(self, request_id: str) -> set[int]:
        """Waits for a load. Returns the places that have failed."""
        self.wait_until(lambda: request_id in self.transfers.take_loaded())
        return {block // self.caches.page_blocks for block in self.transfers.take_failed_blocks()}

    def _pages(self, blocks: Mapping[int, int]) -> Pages:
        return Pages(0, [name_of(page) for page in blocks.values()], self.caches.blocks_of(blocks))

    def wait_until(self, claim: Callable[[], bool]) -> None:
        """Waits for something that loads bring about."""
        give_up_s = time.monotonic() + _WAIT_S
        while not claim():
            assert time.monotonic() < give_up_s, "a load does not go on"
            time.sleep(1e-4)

    def close(self) -> None:
        """Waits for all writes, and checks that nothing raced."""
        self.transfers.flush()
        self.device.close()
        assert self.device.races.found == []


def saves_more_than_the_ring_holds(device: SimulatedDevice, order: str = "LBNHC") -> None:
    """The step after the save overwrites the blocks, as for a request that was preempted in it."""
    worker = EngineWorker(device, order)
    first = {block: 100 + block for block in range(20)}
    worker.step(writes=first)
    worker.save(first)
    worker.step(writes={block: 200 + block for block in first})
    worker.close()
    assert worker.store.pages == {name_of(page): content(page) for page in first.values()}


def loads_into_recycled_blocks(device: SimulatedDevice, order: str = "LBNHC") -> None:
    """Blocks that a step has just read get pages in more parts than there is staging memory for."""
    new = {block: 100 + block for block in range(3, 12)}
    worker = EngineWorker(device, order, store=filled(new.values()))
    old = {block: 200 + block for block in range(16)}
    worker.step(writes=old)
    worker.step(reads=old)
    worker.load("r", new)
    assert worker.wait_loaded("r") == set()
    worker.step(reads={**old, **new})
    worker.close()


def ends_a_request_that_is_loaded(device: SimulatedDevice, order: str = "LBNHC") -> None:
    """A request ends between the first part of its load and the second. The next step uses its blocks, before the load is over."""
    new = {block: 100 + block for block in range(2 * _PART_PAGES)}
    store, reached, going_on = filled(new.values()), threading.Event(), threading.Event()

    def stall(name: bytes) -> None:
        if name == name_of(100 + _PART_PAGES):
            reached.set()
            going_on.wait(_WAIT_S)

    store.on_page = stall
    worker = EngineWorker(device, order, store=store)
    other = {block: 200 + block for block in new}
    try:
        worker.load("r", new)
        assert reached.wait(_WAIT_S)
        worker.wait_until(lambda: bool(device.races.clock("up").get("up")))  # the first part is copied
        worker.transfers.end(["r"])
        worker.step(writes=other)
    finally:
        going_on.set()
    assert worker.wait_loaded("r") == set(), "the blocks are no longer the request's"
    worker.step(reads=other)
    worker.close()


SCENARIOS: Final[dict[Wait, Callable[[SimulatedDevice], None]]] = {
    Wait.GATHER_AFTER_DOWN: saves_more_than_the_ring_holds,
    Wait.DOWN_AFTER_GATHER: saves_more_than_the_ring_holds,
    Wait.STEP_AFTER_ENDED_UP: ends_a_request_that_is_loaded,
}
