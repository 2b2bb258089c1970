"""Garbage collection in a node's process, without scanning the pages that it stores.

Owns: which objects Python's garbage collector sees. The collector belongs to the process, so only one node of a process runs this.
Invariant: apart from the objects of running calls, the collector sees at most `VISIBLE_PAGES_MAX` new pages (stored, or held for
attend), `VISIBLE_LEASED_PAGES_MAX` new entries of leases, and what is added within one period. The time of an automatic collection
is therefore not proportional to the number of stored pages. Records of pages are parts of reference cycles, but all cycles are
broken when a page ends, so the records never need a collector.

Objects of a call that runs during a freeze and that become cyclic garbage later stay in memory. Their number is unknown. It is
estimated as the garbage found in the oldest generation before the freeze; when the estimates sum up to `UNSEEN_OBJECTS_MAX`, a full
collection follows.
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
    """Call `freeze` once the process has loaded what it needs, then `run` as a background task."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._frozen_pages = self._frozen_leased_pages = self._frozen_held_pages = 0
        self._frozen_s = 0.0
        self._unseen_objects = 0

    async def run(self) -> None:
        """Calls `look` ten times a second until it is cancelled. A collector triggered by the number of allocations would not do,
        because a full node frees as many pages as it stores.
        """
        while True:
            await asyncio.sleep(_PERIOD_S)
            self.look()

    def look(self) -> None:
        """Calls `freeze` if enough objects are new, or if the last freeze was long ago."""
        if (
            self._store.stored_pages - self._frozen_pages >= VISIBLE_PAGES_MAX
            or self._store.leases.leased_pages - self._frozen_leased_pages >= VISIBLE_LEASED_PAGES_MAX
            or self._store.leases.held_pages - self._frozen_held_pages >= VISIBLE_PAGES_MAX
            or time.monotonic() - self._frozen_s >= _LONG_S
        ):
            self.freeze()

    def freeze(self) -> None:
        """Collects the garbage that the collector sees, and hides all remaining objects from it."""
        held = self._store.leases.held_pages - self._frozen_held_pages
        self._frozen_pages, self._frozen_leased_pages = self._store.stored_pages, self._store.leases.leased_pages
        self._frozen_held_pages += held
        self._frozen_s = time.monotonic()
        # From now on only this method collects the oldest generation: it may contain the objects of a query, hundreds of thousands.
        gc.set_threshold(*gc.get_threshold()[:2], _NEVER)
        gc.collect(1)  # objects that have just become garbage say nothing about later garbage
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
        _log.warning("full garbage collection over all pages", objects=found, ms=round(1e3 * (time.perf_counter() - began_s)))
