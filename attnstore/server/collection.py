"""How a node's process collects cyclic garbage: without looking at the pages that it keeps.

Owns: the view of Python's collector, which is the process's. Only one node of a process runs this.
Invariant: beside what calls in flight use, the collector sees at most `VISIBLE_PAGES_MAX` new pages, stored or held for queries, or
`VISIBLE_LEASED_PAGES_MAX` new entries of leases, and what comes within one period. So no collection of its own takes time in
proportion to the pages that the node has. Records of pages refer to what refers to them, but leave all of it when a page ends, so
they never need a collector.

Garbage of a call that ran at a freeze, and that became cyclic later, stays. How much that is nobody sees; as much as the oldest
generation had of it before the freeze is taken for it, and a full collection comes where that sums up to `UNSEEN_OBJECTS_MAX`.
"""

from __future__ import annotations

import asyncio
import gc
import time
from typing import Final

from attnstore.limits import UNSEEN_OBJECTS_MAX, VISIBLE_LEASED_PAGES_MAX, VISIBLE_PAGES_MAX
from attnstore.logs import get_logger
from attnstore.server.store import Store

_PERIOD_S: Final = 0.1
_LONG_S: Final = 60.0
_NEVER: Final = 1 << 30

_log = get_logger(__name__)


class Collection:
    """`freeze` once the process has loaded what it needs, then `run` as a background task."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._frozen_pages = self._frozen_leased_pages = self._frozen_held_pages = 0
        self._frozen_s = 0.0
        self._unseen_objects = 0

    async def run(self) -> None:
        """Looks ten times a second, until it is cancelled. A collector that counts what is allocated would not do: a full node
        frees as many pages as it stores.
        """
        while True:
            await asyncio.sleep(_PERIOD_S)
            self.look()

    def look(self) -> None:
        """`freeze` where so much is new, or where that was long ago."""
        if (
            self._store.stored_pages - self._frozen_pages >= VISIBLE_PAGES_MAX
            or self._store.leased_pages - self._frozen_leased_pages >= VISIBLE_LEASED_PAGES_MAX
            or self._store.held_pages - self._frozen_held_pages >= VISIBLE_PAGES_MAX
            or time.monotonic() - self._frozen_s >= _LONG_S
        ):
            self.freeze()

    def freeze(self) -> None:
        """Collects what garbage the collector sees, and takes all else out of its view."""
        held = self._store.held_pages - self._frozen_held_pages
        self._frozen_pages, self._frozen_leased_pages = self._store.stored_pages, self._store.leased_pages
        self._frozen_held_pages += held
        self._frozen_s = time.monotonic()
        # From now on only this collects the oldest generation: it may hold what a query holds, hundreds of thousands of objects.
        gc.set_threshold(*gc.get_threshold()[:2], _NEVER)
        gc.collect(1)  # what has just become garbage tells nothing of what becomes it late
        if held < VISIBLE_PAGES_MAX:
            self._unseen_objects += gc.collect()
        if self._unseen_objects > UNSEEN_OBJECTS_MAX:
            self._collect_all()
        gc.freeze()

    def _collect_all(self) -> None:
        began_s = time.perf_counter()
        gc.unfreeze()
        found = gc.collect()
        self._unseen_objects = 0
        _log.warning("looked through all pages for garbage", objects=found, ms=round(1e3 * (time.perf_counter() - began_s)))
