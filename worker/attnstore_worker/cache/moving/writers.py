"""Writers of sealed blocks from the pool to the store: one per write policy.

Owns: the writers of `WRITE_POLICIES`; the thread and the queue are those of `WriteQueue`.
Invariant: the bytes of a queued page do not change until it is written: its block is held, or the page was copied to staging. A
page that finds no room is only counted: the store misses one page. From a device with memory of its own, a page is copied down
after the step that computed it; its block is released then, and the page is written after the copy has ended.

    write-behind    a block is queued when it is sealed while the engine computes (default)
    write-through   the same, but a step ends only after its blocks are written: once a token is visible, its pages are stored
    on-evict        a page is copied and queued when the pool evicts it: the store gets only the pages that do not fit here

The names are those of processor caches (Jouppi, "Cache write policies and performance", ISCA 1993), where on-evict is write-back.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Final, NamedTuple, Protocol

from attnstore.core.hashing import BlockHash
from attnstore.errors import InvalidArgument
from attnstore_worker.cache.moving.write_queue import WRITE_BATCH_PAGES_MAX, WriteQueue
from attnstore_worker.cache.pool.block_pool import BlockPool
from attnstore_worker.cache.pool.device_blocks import DeviceBlocks
from attnstore_worker.cache.store.remote import RemoteTier
from attnstore_worker.device.base import Event, Wait
from attnstore_worker.device.pages import PagePool
from attnstore_worker.errors import DeviceLost
from attnstore_worker.options import WRITE_POLICIES

_LOG = logging.getLogger(__name__)

STAGED_PAGES: Final = 2 * WRITE_BATCH_PAGES_MAX
"""Pages that on-evict copies at most: one batch that is being written and one that waits. This memory comes on top of the pool."""


class Writer(Protocol):
    """The way to the store. Only the engine's thread calls it."""

    @property
    def pending(self) -> int:
        """Pages in flight."""
        ...

    @property
    def dropped(self) -> int:
        """Pages that were not written: there was no room, or their blocks were needed."""
        ...

    @property
    def reclaimable(self) -> int:
        """Blocks that only the queue holds: `reclaim` would give them back."""
        ...

    def sealed(self, block_hash: BlockHash, block_id: int) -> None:
        """A block was computed and is findable now."""
        ...

    def arrived(self, block_hash: BlockHash) -> None:
        """A block came from the store."""
        ...

    @property
    def writes_evicted(self) -> bool:
        """Whether evicted pages are read at all."""
        ...

    def evicted(self, block_hash: BlockHash, page: memoryview) -> None:
        """A page in host memory leaves the worker. Its bytes stay valid until the call returns."""
        ...

    def evicted_block(self, block_hash: BlockHash, block_id: int) -> None:
        """A page of the pool leaves the worker. Its bytes stay valid until the call returns."""
        ...

    def end_step(self) -> None:
        """All blocks that one step sealed were passed to `sealed`."""
        ...

    @property
    def held(self) -> int:
        """Returns the blocks that are held until they are written."""
        ...

    def reclaim(self) -> bool:
        """Drops the newest block that only the queue holds. Returns False if there is none."""
        ...

    def wait_finished(self, timeout_ms: float) -> None:
        """Waits until a write has ended that `reap` has not seen yet."""
        ...

    def reap(self) -> None:
        """Releases the blocks that were written."""
        ...

    def flush(self, timeout_ms: float) -> bool:
        """Waits until nothing is pending. Returns False if time ran out."""
        ...

    def close(self) -> None:
        """Drops what is queued."""
        ...


class _Page(NamedTuple):
    """A queued page: its block or its slot in staging, and the event after which the page is there (None: it is)."""

    place: int
    written: Event | None


class _Queued:
    """The queue that all policies with a store share. Its thread starts when it is made: after everything that may raise."""

    def __init__(self, write: Callable[[Sequence[BlockHash], Sequence[_Page]], None], pages_max: int) -> None:
        self._queue = WriteQueue(write, pages_max=pages_max)
        self._dropped = 0

    @property
    def pending(self) -> int:
        return self._queue.pending

    @property
    def dropped(self) -> int:
        return self._dropped

    def end_step(self) -> None:
        """Does not wait."""

    def wait_finished(self, timeout_ms: float) -> None:
        self._queue.wait_finished(timeout_ms)

    def flush(self, timeout_ms: float) -> bool:
        return self._queue.flush(timeout_ms)

    def close(self) -> None:
        self._queue.close()


class WriteBehind(_Queued):
    """Holds each sealed block until it is written, or until its page was copied down from the device."""

    writes_evicted = False

    def __init__(self, pool: BlockPool, pages: PagePool | DeviceBlocks, remote: RemoteTier) -> None:
        self._pool = pool
        self._pages = pages
        self._remote = remote
        if isinstance(pages, DeviceBlocks):
            copies = min(WRITE_BATCH_PAGES_MAX, pages.capacity)
            self._staging = pages.device.host_pages(pages.layout, copies * pages.layout.page_bytes)
        super().__init__(self._write if isinstance(pages, PagePool) else self._write_copies, pages.capacity)

    @property
    def held(self) -> int:
        return self._queue.unreported

    @property
    def reclaimable(self) -> int:
        return self._queue.queued(self._is_held_once)

    def sealed(self, block_hash: BlockHash, block_id: int) -> None:
        self._pool.hold(block_id)
        computed = None if isinstance(self._pages, PagePool) else self._pages.computed()
        if not self._queue.offer(block_hash, _Page(block_id, computed)):
            self._dropped += 1
            self._pool.release([block_id])

    def arrived(self, block_hash: BlockHash) -> None:
        """No-op: the store has it already."""

    def evicted(self, block_hash: BlockHash, page: memoryview) -> None:
        """No-op: it was queued when it was sealed."""

    def evicted_block(self, block_hash: BlockHash, block_id: int) -> None:
        """No-op: it was queued when it was sealed."""

    def reclaim(self) -> bool:
        cancelled = self._queue.cancel_newest(self._is_held_once)
        if cancelled is None:
            return False
        self._dropped += 1
        self._pool.release([cancelled.place])
        return True

    def reap(self) -> None:
        self._pool.release([page.place for page in self._queue.take_finished()])

    def _is_held_once(self, page: _Page) -> bool:
        return self._pool.holders(page.place) == 1

    def _write(self, hashes: Sequence[BlockHash], pages: Sequence[_Page]) -> None:
        assert isinstance(self._pages, PagePool)
        self._remote.write(hashes, [self._pages.page(page.place) for page in pages])

    def _write_copies(self, hashes: Sequence[BlockHash], pages: Sequence[_Page]) -> None:
        """Copies pages down, lets their blocks be used again, and writes the copies."""
        assert isinstance(self._pages, DeviceBlocks)
        slots = range(len(pages))
        computed = pages[-1].written  # pages are queued in the order of the steps that compute them
        assert computed is not None
        after = [(Wait.DOWN_AFTER_COMPUTE, computed)]
        try:
            copied = self._pages.copies.down([page.place for page in pages], self._staging.tensor, slots, after=after)
            copied.wait(Wait.WRITTEN_AFTER_DOWN)
        except DeviceLost:
            _LOG.exception("%d pages were not copied down; the store misses them", len(pages))
            return
        self._queue.copied()
        _write_slots(self._remote, hashes, self._pages, self._staging, slots)


class WriteThrough(WriteBehind):
    """Ends a step when its blocks are written, or after the store's deadline."""

    def __init__(self, pool: BlockPool, pages: PagePool | DeviceBlocks, remote: RemoteTier) -> None:
        super().__init__(pool, pages, remote)
        self._deadline_ms = remote.deadline_ms

    def end_step(self) -> None:
        """Waits for the writes."""
        self.flush(self._deadline_ms)


class WriteOnEvict(_Queued):
    """Copies evicted pages to a staging pool and writes them from there, except those that came from the store."""

    held = 0
    reclaimable = 0
    writes_evicted = True

    def __init__(self, pages: PagePool | DeviceBlocks, remote: RemoteTier) -> None:
        size_bytes = STAGED_PAGES * pages.layout.page_bytes
        self._pages = pages
        self._remote = remote
        self._staging = (
            PagePool(pages.layout, size_bytes) if isinstance(pages, PagePool) else pages.device.host_pages(pages.layout, size_bytes)
        )
        self._free = list(range(STAGED_PAGES))
        self._in_store: set[BlockHash] = set()
        super().__init__(self._write, STAGED_PAGES)

    def sealed(self, block_hash: BlockHash, block_id: int) -> None:
        """No-op: it is written when the pool evicts it."""

    def arrived(self, block_hash: BlockHash) -> None:
        self._in_store.add(block_hash)

    def evicted(self, block_hash: BlockHash, page: memoryview) -> None:
        if (slot := self._slot_for(block_hash)) is not None:
            _report_access(self._pages, self._staging, [slot], writes=True)
            self._staging.page(slot)[:] = page
            self._queue.offer(block_hash, _Page(slot, None))  # the queue has room for every slot

    def evicted_block(self, block_hash: BlockHash, block_id: int) -> None:
        if isinstance(self._pages, PagePool):
            self.evicted(block_hash, self._pages.page(block_id))
        elif (slot := self._slot_for(block_hash)) is not None:
            copied = self._pages.copy_down(block_id, self._staging.tensor, slot)
            if copied is None:
                self._dropped += 1
                self._free.append(slot)
            else:
                self._queue.offer(block_hash, _Page(slot, copied))

    def reclaim(self) -> bool:
        """No-op: no block is held."""
        return False

    def reap(self) -> None:
        self._free += [page.place for page in self._queue.take_finished()]

    def _slot_for(self, block_hash: BlockHash) -> int | None:
        """Returns a free slot for a page; None if the store has the page, or if no slot is free."""
        if block_hash in self._in_store:
            self._in_store.remove(block_hash)
            return None
        self.reap()
        if not self._free:
            self._dropped += 1
            return None
        return self._free.pop()

    def _write(self, hashes: Sequence[BlockHash], pages: Sequence[_Page]) -> None:
        try:
            for page in pages:
                if page.written is not None:
                    page.written.wait(Wait.WRITTEN_AFTER_DOWN)
        except DeviceLost:
            _LOG.exception("%d pages were not copied down; the store misses them", len(pages))
            return
        _write_slots(self._remote, hashes, self._pages, self._staging, [page.place for page in pages])


class WriteNothing:
    """Without a store."""

    pending = 0
    dropped = 0
    held = 0
    reclaimable = 0
    writes_evicted = False

    def sealed(self, block_hash: BlockHash, block_id: int) -> None:
        """No-op."""

    def arrived(self, block_hash: BlockHash) -> None:
        """No-op."""

    def evicted(self, block_hash: BlockHash, page: memoryview) -> None:
        """No-op."""

    def evicted_block(self, block_hash: BlockHash, block_id: int) -> None:
        """No-op."""

    def end_step(self) -> None:
        """No-op."""

    def reclaim(self) -> bool:
        """No-op: no block is held."""
        return False

    def wait_finished(self, timeout_ms: float) -> None:
        """No-op."""

    def reap(self) -> None:
        """No-op."""

    def flush(self, timeout_ms: float) -> bool:
        """No-op."""
        del timeout_ms
        return True

    def close(self) -> None:
        """No-op."""


def _write_slots(
    remote: RemoteTier, hashes: Sequence[BlockHash], pool: PagePool | DeviceBlocks, staging: PagePool, slots: Sequence[int]
) -> None:
    _report_access(pool, staging, slots, writes=False)
    remote.write(hashes, [staging.page(slot) for slot in slots])


def _report_access(pool: PagePool | DeviceBlocks, staging: PagePool, slots: Sequence[int], *, writes: bool) -> None:
    if isinstance(pool, DeviceBlocks) and pool.device.accesses is not None:
        pool.device.accesses.host(staging.tensor, slots, writes=writes)


_WRITERS: Final[dict[str, Callable[[BlockPool, PagePool | DeviceBlocks, RemoteTier], Writer]]] = {
    "write-behind": WriteBehind,
    "write-through": WriteThrough,
    "on-evict": lambda _, pages, remote: WriteOnEvict(pages, remote),
}
assert tuple(_WRITERS) == WRITE_POLICIES


def create_writer(policy: str, pool: BlockPool, pages: PagePool | DeviceBlocks, remote: RemoteTier | None) -> Writer:
    """Returns the writer for one of `WRITE_POLICIES`, from `pool` and its `pages` to `remote`; without one, a writer that does
    nothing.

    Raises `InvalidArgument` for an unknown policy.
    """
    if policy not in _WRITERS:
        raise InvalidArgument(f"write policy {policy!r} is unknown; choose {', '.join(WRITE_POLICIES)}")
    return WriteNothing() if remote is None else _WRITERS[policy](pool, pages, remote)
