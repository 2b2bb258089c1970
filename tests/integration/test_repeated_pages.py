"""A peer sends a list, not a set: pages named twice, on every transport, leave the page table intact."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable

import pytest

import attnstore
from attnstore import DType, PageLayout, PageStatus
from attnstore.config import ServeOptions
from attnstore.server.node import StoreNode
from tests.samples import Batch, eventually, make_batch

ATTENDED = PageLayout(layers=2, kv_heads=2, head_dim=64, dtype=DType.FP32)
LEASE_MS = 60_000


class Door:
    """A node in this process, whose table can be inspected, and a client over one transport."""

    def __init__(self, node: StoreNode, client: attnstore.Client, batch: Batch) -> None:
        self._node = node
        self.client = client
        self.batch = batch
        self.space = batch.namespace

    def store(self) -> None:
        """Stores the batch, with each page twice in one call."""
        hashes, pages = self.batch.hashes * 2, self.batch.pages * 2
        verdicts = self.client.write(self.space, hashes, pages).verdicts
        assert verdicts[:3] == (PageStatus.STORED,) * 3
        assert set(verdicts[3:]) == {PageStatus.ALREADY_PRESENT}
        self.check()

    def lease(self, *prefixes: list[bytes]) -> attnstore.Lease:
        found = self.client.match(self.space, prefixes, lease_ms=LEASE_MS)
        assert found.hits == tuple(map(len, prefixes))
        assert found.lease is not None
        self.check()
        return found.lease

    def release(self, lease: attnstore.Lease) -> None:
        assert self.client.release(lease)
        self.check()

    def check(self) -> None:
        store = self._node._store
        with store._lock:
            store._table.check()

    def pinned(self) -> int:
        return self._node._store.statistics().pages_pinned


@pytest.fixture(params=["grpc", "tcp", "shm"])
async def door(request: pytest.FixtureRequest) -> AsyncIterator[Door]:
    options = ServeOptions(listen="127.0.0.1:0", capacity=16 << 20, attend_threads=1)  # type: ignore[arg-type]
    node = StoreNode(options, lambda url, _token: attnstore.aio.connect(url))
    await node.start()
    batch = make_batch(3, model=request.node.nodeid, layout=ATTENDED)

    def connected() -> attnstore.Client:
        client = attnstore.connect(f"grpc://{node.address}", transport=request.param)
        client.register_layout(batch.namespace, batch.layout)
        return client

    client = await asyncio.to_thread(connected)
    try:
        yield Door(node, client, batch)
    finally:
        await asyncio.to_thread(client.close)
        await node.stop(0)


def leases(door: Door) -> None:
    first, second, third = door.batch.hashes
    for prefixes in ([[first, first]], [[first, second, first, third]], [[first, second], [first, second]], [[first]] * 3):
        together, alone = door.lease(*prefixes), door.lease([first])
        door.release(together)
        assert door.pinned() == 1
        door.release(alone)
        assert door.pinned() == 0
    kept = door.lease([first, first])
    assert door.client.delete(door.space, [first, first]) == (PageStatus.PINNED,) * 2
    door.check()
    door.release(kept)


def reads(door: Door) -> None:
    first, second, _ = door.batch.hashes
    asked = [first, second, first, first]
    expected = [door.batch.pages[door.batch.hashes.index(name)] for name in asked]
    lease = door.lease([first, second, first])
    for options in ({}, {"lease": lease}, {"on_layer": lambda _layer, _pages: None}):
        buffers = [bytearray(door.batch.layout.page_bytes) for _ in asked]
        assert door.client.read(door.space, asked, buffers, **options).leading_hits == len(asked)
        assert buffers == expected
        door.check()
    door.release(lease)


def deletes(door: Door) -> None:
    first, second, _ = door.batch.hashes
    missing, ok = PageStatus.MISSING, PageStatus.OK
    assert door.client.delete(door.space, [first, first, second, first]) == (ok, missing, ok, missing)
    door.check()


def attends(door: Door) -> None:
    first, second, _ = door.batch.hashes
    lease = door.lease([first, second])
    with (
        door.client.attend(door.space, q_heads=2, scale=0.125) as stream,
        pytest.raises(attnstore.errors.InvalidArgument, match="twice"),
    ):
        stream.open([first, first, second, first], lease)
    door.check()
    with door.client.attend(door.space, q_heads=2, scale=0.125) as stream:
        set_id = stream.open([first, second], lease)
        out, lse = bytearray(2 * 2 * 64 * 4), bytearray(2 * 2 * 4)
        stream.ask(0, [(set_id, 1), (set_id, 1)], bytes(len(out)))
        stream.receive(memoryview(out), memoryview(lse))
        assert out[: len(out) // 2] == out[len(out) // 2 :]
        door.check()
        stream.close_set(set_id)
        stream.close_set(set_id)
    door.release(lease)


@pytest.mark.filterwarnings("ignore:The given buffer is not writable")  # torch, about bytes that gRPC received
@pytest.mark.parametrize("ask", [leases, reads, deletes, attends])
async def test_pages_that_are_named_twice_leave_the_table_whole_and_nothing_pinned(door: Door, ask: Callable[[Door], None]) -> None:
    def run() -> None:
        door.store()
        ask(door)

    await asyncio.to_thread(run)
    assert await asyncio.to_thread(eventually, lambda: door.pinned() == 0)
    door.check()
