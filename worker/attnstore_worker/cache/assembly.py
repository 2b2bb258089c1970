"""Assembly of the worker's KV memory: its tiers and their connections.

Owns: `create_cache`. Invariants: with pages in place, the pool lies in a window next to them; otherwise creation fails. Blocks in
host memory are read and written in place; only those of a device with memory of its own are reached through staging.
"""

from __future__ import annotations

from attnstore.clock import Clock
from attnstore.core.eviction import create_eviction_policy
from attnstore.core.hashing import Namespace
from attnstore.core.layout import PageLayout
from attnstore.errors import InvalidArgument
from attnstore_worker.cache.manager import CacheManager
from attnstore_worker.cache.moving.load import Planner
from attnstore_worker.cache.planning.observation import Observer
from attnstore_worker.cache.pool.copy_times import CopyTime
from attnstore_worker.cache.pool.device_blocks import DeviceBlocks
from attnstore_worker.cache.pool.host_tier import HostTier, PinnedHostTier
from attnstore_worker.cache.pool.page_window import PageWindow
from attnstore_worker.cache.store.base import PageStore, SharedStore
from attnstore_worker.cache.store.remote import RemoteTier
from attnstore_worker.cache.store.shared_copies import SharedCopies
from attnstore_worker.cache.store.shared_tier import SharedTier
from attnstore_worker.cache.store.transfer import Transfer, TransferKind
from attnstore_worker.device.base import Device
from attnstore_worker.device.host import HostDevice
from attnstore_worker.device.pages import PagePool
from attnstore_worker.options import EngineOptions, SharedUse


def create_cache(
    layout: PageLayout,
    namespace: Namespace,
    options: EngineOptions,
    *,
    store: PageStore | None,
    clock: Clock,
    planner: Planner | None,
    observer: Observer,
    device: Device | None = None,
) -> CacheManager:
    """Returns a manager over these tiers, with its blocks on `device` (default: the processor).

    Raises `InvalidArgument` or `PoolTooSmall` for invalid options, `OutOfDeviceMemory` for a pool that the device has no room for.
    """
    remote, lender, window = None, None, None
    device = device or HostDevice()
    if options.shared is SharedUse.IN_PLACE and not device.addressable:
        raise InvalidArgument(
            f"attention on {device.name} does not read host memory, so no page is used in place: set shared to 'copy'"
        )
    if store is not None:
        deadline_ms = options.store_deadline_ms
        remote = RemoteTier(store, namespace, layout, deadline_ms=deadline_ms, clock=clock, observer=observer)
        if options.shared is SharedUse.IN_PLACE:
            if not isinstance(store, SharedStore):
                raise InvalidArgument("this store lends no pages for use in place: name one node of this host, or copy pages")
            window = PageWindow(layout)
            lender = SharedTier(store, namespace, window, layout.page_bytes, deadline_ms=deadline_ms)
    pages: PagePool | DeviceBlocks
    host: HostTier | PinnedHostTier | None = None
    shared: SharedCopies | None = None

    def copied(time: CopyTime) -> None:
        kind = TransferKind.COPY if time.layers is None else TransferKind.COPY_LAYERS
        told_ms, size_bytes = clock.now_ms(), time.pages * layout.layer_slice(0, time.layers or layout.layers)[1]
        began_ms = told_ms - time.elapsed_ms
        observer.transferred(Transfer(time.tier, kind, began_ms, told_ms, time.pages, time.pages, size_bytes, failed=False))

    if not device.addressable:
        pages = DeviceBlocks(device, layout, options.pool_bytes, copied)
        lends: object = store
        if isinstance(lends, SharedStore) and remote is not None:
            shared = SharedCopies(lends, namespace, pages, remote)
        if options.host_pool_bytes:
            host = PinnedHostTier(pages, options.host_pool_bytes, create_eviction_policy(options.eviction))
    else:
        pages = PagePool(layout, options.pool_bytes) if window is None else window.pool(options.pool_bytes)
        if options.host_pool_bytes:
            host = HostTier(layout, options.host_pool_bytes, create_eviction_policy(options.eviction))
    return CacheManager(
        pages,
        namespace,
        remote=remote,
        clock=clock,
        policy=create_eviction_policy(options.eviction),
        host=host,
        lender=lender,
        shared=shared,
        planner=planner,
        observer=observer,
        write_policy=options.write_policy,
    )
