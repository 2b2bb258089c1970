"""The size of a pool as a share of the memory that is free.

Owns: `pool_blocks`. It is asked after the weights are loaded, the largest step has run and graphs are captured: what they take is
not free then.
"""

from __future__ import annotations

from attnstore.core.layout import PageLayout
from attnstore.memory_limit import memory_bytes, resident_bytes
from attnstore.sizes import Share, size_text
from attnstore_worker.device.base import Device
from attnstore_worker.errors import PoolTooSmall


def pool_blocks(device: Device, layout: PageLayout, share: Share, *, reserve_bytes: int = 0) -> int:
    """Returns the blocks of a pool that takes `share` of the device's free memory, of which `reserve_bytes` stay free in any case.

    A device that does not bound its memory has that which this process may still use. Raises `PoolTooSmall` if no page fits.
    """
    free = device.free_bytes()
    if free is None:
        free = memory_bytes() - resident_bytes()
    pool_bytes = int(max(0, free - reserve_bytes) * share)
    if pool_bytes < layout.page_bytes:
        beside = f", {size_text(reserve_bytes)} of it reserved" if reserve_bytes else ""
        raise PoolTooSmall(
            f"a pool of {share} of the {size_text(max(0, free))} that {device.name} has free{beside} cannot hold one page of "
            f"{layout.page_bytes} bytes"
        )
    return pool_bytes // layout.page_bytes
