"""A first measurement of the link, so that the gate knows it before the first request does.

Owns: one page of zeros in the namespace of this engine's own pages, under a name that no block has. So no tenant depends on what
another may do. The page is written once and read a few times. The first read opens the connection and, over shm, maps an extent,
which no later one has to: it says nothing about the link and would make it look uncertain.
"""

from __future__ import annotations

import math
from typing import Final

from attnstore.clock import Clock, Deadline
from attnstore.core.hashing import Namespace, block_hash
from attnstore.core.layout import PageLayout
from attnstore_worker.cache.store.base import PageStore
from attnstore_worker.vllm.plan import Costs

_READS: Final = 3
_NAME: Final = b"attnstore-link-probe"


def probe_link(store: PageStore, space: Namespace, layout: PageLayout, clock: Clock, *, deadline_ms: float) -> Costs:
    """`(bytes, ms)` of a few reads of a page, the first of all left out. `deadline_ms` bounds all calls. Raises their errors."""
    deadline = Deadline(clock, deadline_ms)
    name = block_hash(space, (), (_NAME,))
    page = memoryview(bytearray(layout.page_bytes))
    store.register_layout(space, layout, deadline_ms=deadline.left_ms())
    store.write(space, [name], [page], deadline_ms=math.ceil(deadline.left_ms()))
    loads = []
    for _ in range(1 + _READS):
        began_ms = clock.now_ms()
        if store.read(space, [name], [page], lease=None, deadline_ms=deadline.left_ms()).leading_hits:
            loads.append((layout.page_bytes, clock.now_ms() - began_ms))
    return Costs(tuple(loads[1:]))
