"""How sealed blocks get from the pool to the store: one writer for each write policy.

Owns: `WRITE_POLICIES` and the writers; their thread and queue are a `SwapOut`'s.
Invariant: the bytes of a page that is to be written do not change until it is: its block is held, or it was copied to a staging
pool. A page that finds no room on the way is only counted: the store misses one page.

    write-behind    a block is queued when it is sealed; the engine computes on (default)
    write-through   the same, and the step in which it was sealed ends when its write has: who sees the token can rely on the pages
    on-evict        a page is copied aside and queued when the pool evicts it: the store gets what does not fit here, and no more

The names are those of processor caches (Jouppi, "Cache write policies and performance", ISCA 1993), where on-evict is write-back.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final, Protocol

from attnstore.core.hashing import BlockHash
from attnstore.errors import InvalidArgument
from attnstore_worker.cache.moving.swap_out import BATCH_BLOCKS_MAX, SwapOut
from attnstore_worker.cache.pool.block_pool import BlockPool
from attnstore_worker.cache.pool.pages import PagePool
from attnstore_worker.cache.store.remote import RemoteTier

STAGED_PAGES: Final = 2 * BATCH_BLOCKS_MAX
"""Pages that on-evict copies aside at most: one batch that is written and one that waits. They come on top of the pool's memory."""


class Writer(Protocol):
    """The way to the store. The engine's thread calls everything here."""

    @property
    def pending(self) -> int:
        """Pages on their way."""
        ...

    @property
    def dropped(self) -> int:
        """Pages that were not written for lack of room, or because their blocks were needed."""
        ...

    @property
    def reclaimable(self) -> int:
        """Blocks that nobody but the queue holds: `reclaim` would give them back."""
        ...

    def sealed(self, block_hash: BlockHash, block_id: int) -> None:
        """A block was computed and can be found now."""
        ...

    def arrived(self, block_hash: BlockHash) -> None:
        """A block came from the store."""
        ...

    def evicted(self, block_hash: BlockHash, page: memoryview) -> None:
        """A page leaves the worker; its bytes are there until this returns."""
        ...

    def end_step(self) -> None:
        """All that one step sealed was told of."""
        ...

    @property
    def held(self) -> int:
        """Blocks that are held until they are written."""
        ...

    def reclaim(self) -> bool:
        """Gives up the newest block that only the queue holds. False where there is none."""
        ...

    def wait_finished(self, timeout_ms: float) -> None:
        """Waits for a write to end that `reap` has not seen yet."""
        ...

    def reap(self) -> None:
        """Lets go of what was written."""
        ...

    def flush(self, timeout_ms: float) -> bool:
        """Waits until nothing is pending. False when time ran out."""
        ...

    def close(self) -> None:
        """Drops what is queued."""
        ...


class _Queued:
    """What the policies with a store share: their `SwapOut`."""

    def __init__(self, pages: PagePool, remote: RemoteTier, queue_blocks_max: int) -> None:
        def write(hashes: Sequence[BlockHash], slots: Sequence[int]) -> None:
            remote.write(hashes, [pages.page(slot) for slot in slots])

        self._swap_out = SwapOut(write, queue_blocks_max=queue_blocks_max)
        self._dropped = 0

    @property
    def pending(self) -> int:
        return self._swap_out.pending

    @property
    def dropped(self) -> int:
        return self._dropped

    def end_step(self) -> None:
        """The writes go on behind the next step."""

    def wait_finished(self, timeout_ms: float) -> None:
        self._swap_out.wait_finished(timeout_ms)

    def flush(self, timeout_ms: float) -> bool:
        return self._swap_out.flush(timeout_ms)

    def close(self) -> None:
        self._swap_out.close()


class WriteBehind(_Queued):
    """Holds each sealed block until it is written."""

    def __init__(self, pool: BlockPool, pages: PagePool, remote: RemoteTier) -> None:
        super().__init__(pages, remote, pages.capacity)
        self._pool = pool

    @property
    def held(self) -> int:
        return self._swap_out.pending

    @property
    def reclaimable(self) -> int:
        return self._swap_out.queued(self._is_held_once)

    def sealed(self, block_hash: BlockHash, block_id: int) -> None:
        self._pool.hold(block_id)
        if not self._swap_out.offer(block_hash, block_id):
            self._dropped += 1
            self._pool.release([block_id])

    def arrived(self, block_hash: BlockHash) -> None:
        """It is in the store already."""

    def evicted(self, block_hash: BlockHash, page: memoryview) -> None:
        """It was queued when it was sealed."""

    def reclaim(self) -> bool:
        cancelled = self._swap_out.cancel_newest(self._is_held_once)
        if cancelled is None:
            return False
        self._dropped += 1
        self._pool.release([cancelled])
        return True

    def reap(self) -> None:
        self._pool.release(self._swap_out.take_finished())

    def _is_held_once(self, block_id: int) -> bool:
        return self._pool.holders(block_id) == 1


class WriteThrough(WriteBehind):
    """Ends a step when what it sealed is written, or after the tier's deadline."""

    def __init__(self, pool: BlockPool, pages: PagePool, remote: RemoteTier) -> None:
        super().__init__(pool, pages, remote)
        self._deadline_ms = remote.deadline_ms

    def end_step(self) -> None:
        """Waits."""
        self.flush(self._deadline_ms)


class WriteOnEvict(_Queued):
    """Copies each evicted page that the store does not have to a staging pool, and writes it from there."""

    held = 0
    reclaimable = 0

    def __init__(self, pages: PagePool, remote: RemoteTier) -> None:
        self._staging = PagePool(pages.layout, STAGED_PAGES * pages.layout.page_bytes)
        super().__init__(self._staging, remote, STAGED_PAGES)
        self._free = list(range(STAGED_PAGES))
        self._in_store: set[BlockHash] = set()

    def sealed(self, block_hash: BlockHash, block_id: int) -> None:
        """It is written when it goes."""

    def arrived(self, block_hash: BlockHash) -> None:
        self._in_store.add(block_hash)

    def evicted(self, block_hash: BlockHash, page: memoryview) -> None:
        if block_hash in self._in_store:
            self._in_store.remove(block_hash)
            return
        self.reap()
        if not self._free:
            self._dropped += 1
            return
        slot = self._free.pop()
        self._staging.page(slot)[:] = page
        self._swap_out.offer(block_hash, slot)  # its queue has room for every slot

    def reclaim(self) -> bool:
        """No block is held."""
        return False

    def reap(self) -> None:
        self._free += self._swap_out.take_finished()


class WriteNothing:
    """Without a store."""

    pending = 0
    dropped = 0
    held = 0
    reclaimable = 0

    def sealed(self, block_hash: BlockHash, block_id: int) -> None:
        """Stays here."""

    def arrived(self, block_hash: BlockHash) -> None:
        """From nowhere."""

    def evicted(self, block_hash: BlockHash, page: memoryview) -> None:
        """Is gone."""

    def end_step(self) -> None:
        """Nothing was begun."""

    def reclaim(self) -> bool:
        """No block is held."""
        return False

    def wait_finished(self, timeout_ms: float) -> None:
        """Nothing is on its way."""

    def reap(self) -> None:
        """Nothing is on its way."""

    def flush(self, timeout_ms: float) -> bool:
        """Nothing is on its way."""
        del timeout_ms
        return True

    def close(self) -> None:
        """Nothing to end."""


_WRITERS: Final[dict[str, Callable[[BlockPool, PagePool, RemoteTier], Writer]]] = {
    "write-behind": WriteBehind,
    "write-through": WriteThrough,
    "on-evict": lambda _, pages, remote: WriteOnEvict(pages, remote),
}
WRITE_POLICIES: Final = tuple(_WRITERS)


def create_writer(policy: str, pool: BlockPool, pages: PagePool, remote: RemoteTier | None) -> Writer:
    """The writer for one of `WRITE_POLICIES`, from `pool` and its `pages` to `remote`.

    Raises `InvalidArgument` for an unknown policy.
    """
    if policy not in _WRITERS:
        raise InvalidArgument(f"write policy {policy!r} is unknown; choose {', '.join(WRITE_POLICIES)}")
    return WriteNothing() if remote is None else _WRITERS[policy](pool, pages, remote)
