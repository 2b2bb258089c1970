"""A first measurement of the link, so that the gate knows it before the first request does.

Owns: one page of zeros in a namespace of its own, written once and read a few times. The first read opens the connection and, over
shm, maps an extent, which no later one has to: it says nothing about the link and would make it look uncertain.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Final

from attnstore.clock import Clock
from attnstore.core.hashing import block_hash, namespace
from attnstore.core.layout import PageLayout
from worker.cache.page_store import PageStore
from worker.vllm.plan import Costs

_READS: Final = 3


def probe_link(store: PageStore, layout: PageLayout, clock: Clock, *, deadline_ms: float) -> Costs:
    """`(bytes, ms)` of a few reads of a page of the layout's size, the first of all left out. Raises the errors of the store."""
    layout = replace(layout, tp_rank=0, tp_size=1)
    space = namespace(layout, model=b"attnstore-link-probe")
    name = block_hash(space, ())
    page = memoryview(bytearray(layout.page_bytes))
    store.register_layout(space, layout)
    store.write(space, [name], [page], deadline_ms=int(deadline_ms))
    loads = []
    for _ in range(1 + _READS):
        began_ms = clock.now_ms()
        if store.read(space, [name], [page], lease=None, deadline_ms=deadline_ms).leading_hits:
            loads.append((layout.page_bytes, clock.now_ms() - began_ms))
    return Costs(tuple(loads[1:]))
