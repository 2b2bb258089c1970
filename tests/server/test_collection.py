"""Python's collector in a node sees a bounded part of the pages, and all of them when garbage may have accumulated."""

from __future__ import annotations

import asyncio
import gc
import subprocess
import sys
import weakref
from collections.abc import Iterator
from itertools import count
from types import FrameType

import pytest

from attnstore import aio
from attnstore.arena import MemoryArena
from attnstore.config import ServeOptions
from attnstore.core.layout import DType, PageLayout
from attnstore.core.page_table import ArrivingPage, PageTable
from attnstore.errors import NamespaceUnknown
from attnstore.limits import VISIBLE_LEASED_PAGES_MAX, VISIBLE_PAGES_MAX
from attnstore.server import collection as collection_module
from attnstore.server import node as node_module
from attnstore.server import rpc as rpc_module
from attnstore.server.collection import Collection
from attnstore.server.store import Store
from attnstore.testing import ManualClock
from attnstore.types import Space

LAYOUT = PageLayout(layers=1, kv_heads=1, head_dim=1, block_tokens=1, dtype=DType.OPAQUE)
SPACE = Space("default", b"n" * 32)
OBJECTS_OF_PAGE = 2


class Node:
    """A page table without bytes, which `PageTable.complete` does not need."""

    def __init__(self, capacity_pages: int) -> None:
        ids = count()
        capacity_bytes = capacity_pages * 64
        self.table = PageTable(
            capacity_bytes=capacity_bytes, extent_bytes=capacity_bytes // 8, new_lease_id=lambda: next(ids).to_bytes(16, "big")
        )
        self.table.namespaces.register(SPACE, LAYOUT)
        self.store = Store(self.table, MemoryArena(64, 64), ManualClock(), lambda _: None)
        self.collection = Collection(self.store)
        self.collection.freeze()
        self._numbers = count()

    def keep(self, pages: int) -> list[bytes]:
        hashes = [next(self._numbers).to_bytes(32, "big") for _ in range(pages)]
        for page_hash in hashes:
            arriving = self.table.prepare(SPACE, page_hash, 0, 0.0)
            assert isinstance(arriving, ArrivingPage)
            self.table.complete(arriving, 0.0)
        self.table.take_events()
        return hashes


@pytest.fixture(autouse=True)
def thawed() -> Iterator[None]:
    """The collector belongs to this process: objects of other tests are visible again at the end."""
    thresholds = gc.get_threshold()
    yield
    gc.unfreeze()
    gc.set_threshold(*thresholds)


def visible_objects() -> int:
    """Returns the objects that a full collection visits."""
    return len(gc.get_objects())


@pytest.mark.parametrize("capacity_pages", [VISIBLE_PAGES_MAX, 16 * VISIBLE_PAGES_MAX], ids=["full, evicting", "growing"])
def test_a_collection_sees_no_more_pages_the_more_a_node_keeps(capacity_pages: int) -> None:
    node = Node(capacity_pages)
    before, seen = visible_objects(), []
    for _ in range(8):
        for _ in range(4):
            node.keep(VISIBLE_PAGES_MAX // 4)
            seen.append(visible_objects() - before)
            node.collection.look()
    assert max(seen) < OBJECTS_OF_PAGE * VISIBLE_PAGES_MAX + 1000
    assert seen[-1] < seen[3] + 1000


def test_entries_of_leases_leave_the_view_as_pages_do() -> None:
    node = Node(4096)
    hashes = node.keep(4096)
    leases = 0
    while node.store.leases.leased_pages < VISIBLE_LEASED_PAGES_MAX:
        node.collection.look()
        node.table.match(SPACE, [hashes], 1000, 0.0)
        leases += 1
    assert visible_entries() >= leases * 4096
    node.collection.look()
    assert visible_entries() < 4096


def test_what_queries_hold_leaves_the_view_too_and_is_not_looked_through(monkeypatch: pytest.MonkeyPatch) -> None:
    node = Node(64)
    node.store.leases.counts_held(VISIBLE_PAGES_MAX - 1)
    held = [[each] for each in range(VISIBLE_PAGES_MAX)]
    node.collection.look()
    assert visible_objects() > len(held)
    node.store.leases.counts_held(1)
    generations: list[int] = []
    collect = gc.collect
    monkeypatch.setattr(gc, "collect", lambda generation=2: generations.append(generation) or collect(generation))
    node.collection.look()
    assert visible_objects() < 1000
    assert generations == [1]


def visible_entries() -> int:
    return sum(len(each) for each in gc.get_objects() if type(each) is list)


def test_pages_and_their_leases_go_without_a_collector() -> None:
    node = Node(1024)
    gc.disable()
    try:
        before = visible_objects()
        hashes = node.keep(1024)
        assert visible_objects() >= before + OBJECTS_OF_PAGE * 1024
        lease = node.table.match(SPACE, [hashes[:512]], 1000, 0.0).lease_id
        assert lease is not None
        node.table.pins.release("default", lease, 0.0)
        node.table.delete(SPACE, hashes, 0.0)
        node.table.take_events()
        assert node.table.statistics().pages_sealed == 0
        assert visible_objects() < before + 100
    finally:
        gc.enable()


class Cycle:
    def __init__(self) -> None:
        self.me = self


def test_garbage_out_of_view_is_found_once_much_may_have_gathered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(collection_module, "UNSEEN_OBJECTS_MAX", 100)
    node = Node(64)
    in_flight = Cycle()
    node.collection.freeze()
    gone = weakref.ref(in_flight)
    del in_flight
    node.collection.freeze()
    assert gone() is not None, "it is out of view: only garbage that lives long is a reason to look for it"
    for _ in range(100):
        old = [Cycle() for _ in range(10)]
        gc.collect()  # they belong to the oldest generation now
        del old
        node.collection.freeze()
        if gone() is None:
            break
    assert gone() is None


def kept_frames() -> list[FrameType]:
    frames = [each for each in gc.get_objects() if type(each) is FrameType]  # isinstance accesses objects of torch, which warn
    return [frame for frame in frames if frame.f_code.co_filename == rpc_module.__file__]


async def test_a_refused_call_goes_with_its_request_without_a_collector() -> None:
    options = ServeOptions(listen="127.0.0.1:0", capacity=64 << 20, attend_threads=0)  # type: ignore[arg-type]
    node = node_module.StoreNode(options, lambda *_: None)  # type: ignore[arg-type, return-value]
    await node.start()
    gc.disable()
    try:
        async with aio.connect(f"grpc://{node.address}", transport="grpc") as client:
            for _ in range(20):
                with pytest.raises(NamespaceUnknown):
                    await client.match(SPACE.namespace, [[b"h" * 32]])
        async with asyncio.timeout(10):
            while kept_frames():  # the last answer arrives before the call has ended on the node
                await asyncio.sleep(0.01)
    finally:
        gc.enable()
        await node.stop(0)


WATCHED = """
import gc, sys
from attnstore.cli import main
from attnstore.server.collection import Collection
from attnstore.server.node import StoreNode

start = StoreNode.start

async def watched(node):
    print("frozen", gc.get_freeze_count() > 0)
    await start(node)

StoreNode.start = watched
Collection.look = lambda _: print("looked", flush=True)
main(["serve", "--listen", "127.0.0.1:0", "--capacity", "64MiB"])
"""


def test_a_node_s_process_freezes_before_it_listens_and_goes_on_looking() -> None:
    process = subprocess.Popen([sys.executable, "-c", WATCHED], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        frozen, listening, *looked = [process.stdout.readline().split()[0:2] for _ in range(4)]
    finally:
        process.kill()
        process.communicate()
    assert frozen == ["frozen", "True"]
    assert listening == ["listening", "on"]
    assert looked == [["looked"], ["looked"]]
