"""Rehashes pages in place: idle pages at a bounded rate, and pages that a reader reported as wrong.

Owns: the thread that hashes, and the position of the walk. A page that no longer matches its checksums is removed
(`Store.is_intact`).
Invariants: nothing is hashed on the event loop or under the store's lock, and no page is protected from eviction; idle pages are
hashed at `rate` bytes per second at most, reported pages at `REPORTED_BYTES_PER_S_MAX` for all tenants together, one page of each
tenant in turn.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Final

from attnstore import tasks
from attnstore.errors import InvalidArgument, NamespaceUnknown, Overloaded, Unavailable
from attnstore.limits import REPORTED_BYTES_PER_S_MAX, REPORTED_HASHES_MAX
from attnstore.server.store import Store
from attnstore.types import PageStatus, Space

_BATCHES_PER_S: Final = 10
_PAUSE_S: Final = 1.0
"""Pause between two walks over all pages."""


class Scrubber:
    """`rate` is the number of bytes of idle pages hashed per second; 0 hashes none. Belongs to the event loop on which it is
    started.
    """

    def __init__(self, store: Store, rate: int) -> None:
        self._store = store
        self._rate = rate
        self._worker = ThreadPoolExecutor(1, "attnstore-scrub")
        self._turn = asyncio.Lock()  # serves in order of arrival; a tenant has one report at a time
        self._reporting: set[str] = set()
        self._task: asyncio.Task[None] | None = None
        self._stopping = False

    def start(self) -> None:
        """Begins to walk over idle pages."""
        if self._rate:
            self._task = tasks.supervised("scrub", self._walk)

    async def stop(self) -> None:
        """Stops after the page that is being hashed."""
        self._stopping = True
        try:
            if self._task is not None:
                await tasks.end(self._task)
        finally:
            await tasks.on_thread("stop", self._worker.shutdown)

    async def verify(self, space: Space, page_hashes: Sequence[bytes]) -> list[PageStatus]:
        """Hashes pages that a reader reports. Returns OK for an intact page, MISSING for one that is not stored or was not intact.

        Raises `InvalidArgument` for too many, `Overloaded` while another report of the tenant is processed.
        """
        if len(page_hashes) > REPORTED_HASHES_MAX:
            raise InvalidArgument(f"{len(page_hashes)} pages are reported; at most {REPORTED_HASHES_MAX} fit one request")
        if space.tenant in self._reporting:
            raise Overloaded("another report of this tenant is being processed; read the page again before reporting it again")
        self._reporting.add(space.tenant)
        try:
            return [await self._verify_reported(space, page_hash) for page_hash in page_hashes]
        finally:
            self._reporting.discard(space.tenant)

    async def _verify_reported(self, space: Space, page_hash: bytes) -> PageStatus:
        async with self._turn:
            if self._stopping:
                raise Unavailable("the node is draining")
            view = self._store.peek(space, page_hash)
            if view is None:
                return PageStatus.MISSING
            intact = await asyncio.get_running_loop().run_in_executor(self._worker, self._store.is_intact, view)
            await asyncio.sleep(len(view.data) / REPORTED_BYTES_PER_S_MAX)
        return PageStatus.OK if intact else PageStatus.MISSING

    async def _walk(self) -> None:
        while True:
            for pages in self._store.spaces.sealed():
                await self._walk_over(pages)
            await asyncio.sleep(_PAUSE_S)

    async def _walk_over(self, pages: Sequence[tuple[Space, bytes]]) -> None:
        """Hashes pages of one extent, all of one size."""
        loop = asyncio.get_running_loop()
        at = 0
        while at < len(pages):
            try:
                together = max(1, self._rate // _BATCHES_PER_S // self._store.layout_of(pages[at][0]).page_bytes)
            except NamespaceUnknown:  # the namespace was forgotten meanwhile
                together = 1
            due_s = loop.time()
            due_s += await loop.run_in_executor(self._worker, self._hash, pages[at : at + together]) / self._rate
            await asyncio.sleep(due_s - loop.time())
            at += together
        await asyncio.sleep(0)

    def _hash(self, pages: Sequence[tuple[Space, bytes]]) -> int:
        """Hashes those of the pages that are still stored. Returns the number of bytes."""
        hashed_bytes = 0
        for space, page_hash in pages:
            with suppress(NamespaceUnknown):  # the namespace was forgotten meanwhile
                view = self._store.peek(space, page_hash)
                if view is not None:
                    self._store.is_intact(view)
                    hashed_bytes += len(view.data)
        return hashed_bytes
