"""Swap-in from a store node on this machine, against the same read into host memory.

Owns: `compare_swap_in`. Both sides are a load of the worker's cache, from `admit` until every page has arrived: into the blocks of
the device, and into blocks in host memory, which need no copy up. Over tcp the device's pages pass through staging; over shm the
device copies them from the node's memory, and the host does so itself.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Final

import torch

from attnstore.clock import MonotonicClock
from attnstore.core.hashing import BlockHash, Namespace, block_hashes
from attnstore.core.layout import PageLayout
from attnstore.limits import MIB
from attnstore.testing import StoreProcess
from attnstore_worker.cache import PageStore, Unobserved, create_cache, open_store
from attnstore_worker.device.base import Device
from attnstore_worker.device.host import HostDevice
from attnstore_worker.device.pages import PagePool
from attnstore_worker.options import EngineOptions
from experiments.gpu import targets
from experiments.gpu.phase import Phase

_NAMESPACE: Final = Namespace(b"swap-in".ljust(32))
_TRANSPORTS: Final = ("tcp", "shm")
_DEADLINE_MS: Final = 20_000
_WRITE_PAGES: Final = 32
_WARM_UPS: Final = 2
_REPEATS: Final = 5
_WAIT_MS: Final = 100.0


def compare_swap_in(phase: Phase, name: str, layout: PageLayout) -> None:
    """Reads the pages of one prompt of `layout` from a node over each transport; compares the bytes, then the times."""
    size_bytes = (2 if phase.quick else 256) * MIB
    pages = PagePool(layout, size_bytes)
    pages.tensor.view(torch.int16).random_(-(1 << 15), 1 << 15)
    tokens = list(range(pages.capacity * layout.block_tokens + 1))
    hashes = block_hashes(_NAMESPACE, tokens, layout.block_tokens)
    with StoreProcess("--capacity", f"{2 * size_bytes // MIB + 64}MiB") as node:
        for transport in _TRANSPORTS:
            with open_store(node.url, deadline_ms=_DEADLINE_MS, transport=transport) as store:
                _fill(store, layout, hashes, pages)
                _compare(phase, f"{name}, {transport}", _Loads(phase.device, store, layout, tokens, hashes), pages, store)


def _compare(phase: Phase, name: str, device: _Loads, pages: PagePool, store: PageStore) -> None:
    host = _Loads(HostDevice(), store, device.layout, device.tokens, device.hashes)
    for loads, where in ((device, "the device"), (host, "host memory")):
        phase.rows.check(f"pages of a node arrive in {where} as they were, {name}", *loads.compared(pages))
    times: dict[_Loads, list[float]] = {device: [], host: []}
    for turn in range(_WARM_UPS + _REPEATS if phase.timings else 0):
        for loads, taken in times.items():
            took_ms = loads.take()
            if turn >= _WARM_UPS:
                taken.append(took_ms)
    for loads in times:
        loads.close()
    if phase.timings:
        device_ms, host_ms = (sorted(taken)[_REPEATS // 2] for taken in times.values())
        gb_per_s = pages.tensor.nbytes / 1e6 / device_ms
        against = "the same read into host memory"
        phase.compare(f"swap-in from a node, {name}", gb_per_s, "GB/s", against, host_ms / device_ms, targets.SWAP_IN_FROM_NODE)


class _Loads:
    """Loads of the prompt `tokens` from `store` into blocks of `device`."""

    def __init__(
        self, device: Device, store: PageStore, layout: PageLayout, tokens: list[int], hashes: Sequence[BlockHash]
    ) -> None:
        self.layout = layout
        self.tokens = tokens
        self.hashes = hashes
        options = EngineOptions(
            pool_bytes=(len(hashes) + 1) * layout.page_bytes, block_tokens=layout.block_tokens, store_deadline_ms=_DEADLINE_MS
        )
        self._cache = create_cache(
            layout,
            _NAMESPACE,
            options,
            store=store,
            clock=MonotonicClock(),
            planner=None,
            observer=Unobserved(),
            device=device,
        )

    def take(self, expected: PagePool | None = None) -> float:
        """Returns how long a load took in milliseconds. Raises `AssertionError` if not every page arrived, or if one is not as
        expected.
        """
        begin_s = time.perf_counter()
        table, load = self._cache.admit(self.tokens, list(self.hashes))
        loaded = 0
        while not load.over:
            loaded = self._cache.loads.advance(table, load, loaded)
            if not load.over:
                self._cache.loads.wait(_WAIT_MS)
        took_ms = (time.perf_counter() - begin_s) * 1e3
        try:
            assert loaded == len(self.hashes) * self.layout.block_tokens, f"{loaded} tokens of {len(self.tokens) - 1} arrived"
            if expected is not None:
                blocks = self._cache.pages.tensor[table.block_ids[: len(self.hashes)]].cpu()
                assert torch.equal(blocks.view(torch.int16), expected.tensor.view(torch.int16)), "pages have other bytes"
        finally:
            self._cache.release(table)
            self._cache.drop_cached()
            self._cache.check()
        return took_ms

    def compared(self, expected: PagePool) -> tuple[bool, str]:
        """Returns whether a load brings the expected pages, and what was compared or found wrong."""
        try:
            self.take(expected)
        except AssertionError as wrong:
            return False, str(wrong)
        return True, f"{len(self.hashes)} pages"

    def close(self) -> None:
        """Ends the cache."""
        self._cache.close()


def _fill(store: PageStore, layout: PageLayout, hashes: Sequence[BlockHash], pages: PagePool) -> None:
    store.register_layout(_NAMESPACE, layout)
    for begin in range(0, len(hashes), _WRITE_PAGES):
        part = range(begin, min(begin + _WRITE_PAGES, len(hashes)))
        views = [pages.page(index) for index in part]
        verdicts = store.write(_NAMESPACE, [hashes[index] for index in part], views, deadline_ms=_DEADLINE_MS).verdicts
        assert all(verdict.is_kept for verdict in verdicts)
