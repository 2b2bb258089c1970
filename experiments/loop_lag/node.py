"""A node whose event loop and lock are observed, on a thread of this process, and a process that moves pages over tcp beside it."""

from __future__ import annotations

import asyncio
import gc
import subprocess
import sys
import threading
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn, TypeVar

from attnstore import DType, PageLayout, namespace
from attnstore.config import ServeOptions
from attnstore.core.hashing import page_checksum
from attnstore.server.node import StoreNode
from attnstore.server.store import Store
from attnstore.types import PageStatus, Space
from experiments.loop_lag.probe import LoopProbe, TimedLock

R = TypeVar("R")

LAYOUT = PageLayout(layers=1, kv_heads=1, head_dim=512, block_tokens=1, dtype=DType.OPAQUE)
"""1 KiB per page, so that many pages fit little memory."""
SPACE = Space("default", namespace(LAYOUT, model=b"loop lag"))
_BULK = """
import sys, attnstore
from attnstore import DType, PageLayout, block_hashes, namespace
layout = PageLayout(layers=8, kv_heads=8, head_dim=128, block_tokens=16, dtype=DType.BF16)
name = namespace(layout, model=b"bulk")
hashes = block_hashes(name, range(64 * 16), 16)
with attnstore.connect(sys.argv[1], transport="tcp") as client:
    client.register_layout(name, layout)
    pages = [bytes(layout.page_bytes)] * 64
    buffers = [bytearray(layout.page_bytes) for _ in hashes]
    while True:
        client.delete(name, hashes)
        client.write(name, hashes, pages)
        client.read(name, hashes, buffers)
        print("moved", flush=True)
"""


class WatchedNode:
    """`probe` observes the loop, `lock` is the store's. Garbage is collected as in a node's process."""

    def __init__(self, *, attend_threads: int) -> None:
        self._attend_threads = attend_threads
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="watched-node", daemon=True)
        self._thresholds = gc.get_threshold()
        self.probe = LoopProbe()
        self.lock = TimedLock()

    def __enter__(self) -> WatchedNode:
        self._thread.start()
        self.run(self._start())
        return self

    def __exit__(self, *_: object) -> None:
        self.run(self._stop())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
        gc.unfreeze()
        gc.set_threshold(*self._thresholds)

    def run(self, coroutine: Coroutine[Any, Any, R]) -> R:
        """Runs a coroutine on the node's event loop and waits for it."""
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result()

    @property
    def address(self) -> str:
        return str(self._node.address)

    @property
    def store(self) -> Store:
        return self._node._store

    def settle(self) -> None:
        """Discards the measurements so far."""
        self.probe.take()
        self.lock.take()

    def keep(self, hashes: list[bytes], space: Space = SPACE, layout: PageLayout = LAYOUT) -> None:
        """Stores a page under each hash that has none, on this thread."""
        self.store.spaces.register(space, layout)
        if self.store.leases.match(space, [hashes], lease_ms=0).hits == (len(hashes),):
            return
        page = bytes(layout.page_bytes)
        checksum = page_checksum(page)
        for page_hash in hashes:
            arriving = self.store.prepare(space, page_hash, checksum)
            if not isinstance(arriving, PageStatus):
                arriving.data[:] = page
                self.store.seal(arriving)

    async def _start(self) -> None:
        options = ServeOptions.model_validate(
            {"listen": "127.0.0.1:0", "capacity": 512 << 20, "attend_threads": self._attend_threads}
        )
        self._node = StoreNode(options, _no_peer)
        self._node._store._lock = self.lock  # type: ignore[assignment]
        self._node.collection.freeze()
        await self._node.start()
        self._background = [asyncio.create_task(run) for run in (self._node.collection.run(), self.probe.run())]

    async def _stop(self) -> None:
        for task in self._background:
            task.cancel()
        await self._node.stop(0)


def _no_peer(*_: object) -> NoReturn:
    raise AssertionError("a node that is in no cluster has no peers")


@contextmanager
def bulk_traffic(address: str) -> Iterator[None]:
    """Starts a process that writes and reads 32 MiB of pages over tcp repeatedly."""
    process = subprocess.Popen([sys.executable, "-c", _BULK, f"grpc://{address}"], stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None
        assert process.stdout.readline(), "the bulk traffic did not begin"
        yield
    finally:
        process.kill()
        process.communicate()
