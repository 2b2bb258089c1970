"""Write-behind: sealed blocks go to the next tier on a thread of their own while the engine computes on.

Owns: the queue of blocks to write and the thread that writes them.
Invariant: a block that was accepted is reported exactly once, by `take_finished` or by `cancel_newest`; until then its bytes
are read by this thread and the caller must keep holding it.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from typing import Final

from attnstore import tasks
from attnstore.core.hashing import BlockHash

BATCH_BLOCKS_MAX: Final = 32
"""Pages in one write: enough to fill the stream, few enough that the queue can still be cancelled."""

WriteBatch = Callable[[Sequence[BlockHash], Sequence[int]], None]


class SwapOut:
    """Writes blocks in the order offered, `BATCH_BLOCKS_MAX` at a time. A `write` that raises costs the store these pages."""

    def __init__(self, write: WriteBatch, *, queue_blocks_max: int) -> None:
        self._write = write
        self._queue_blocks_max = queue_blocks_max
        self._queue: deque[tuple[BlockHash, int]] = deque()
        self._finished: list[int] = []
        self._writing = 0
        self._closing = False
        self._changed = threading.Condition()
        tasks.supervised_thread("swap-out", self._run)

    @property
    def pending(self) -> int:
        """Blocks accepted and not yet written or cancelled."""
        with self._changed:
            return len(self._queue) + self._writing

    def offer(self, block_hash: BlockHash, block_id: int) -> bool:
        """Queues a block. False, with nothing accepted, when the queue is full: the store misses one page."""
        with self._changed:
            if len(self._queue) >= self._queue_blocks_max:
                return False
            self._queue.append((block_hash, block_id))
            self._changed.notify_all()
            return True

    def take_finished(self) -> list[int]:
        """The blocks whose transfer ended since the last call."""
        with self._changed:
            finished, self._finished = self._finished, []
            return finished

    def queued(self, may_cancel: Callable[[int], bool]) -> int:
        """How many blocks `cancel_newest` could give back."""
        with self._changed:
            return sum(may_cancel(block_id) for _, block_id in self._queue)

    def cancel_newest(self, may_cancel: Callable[[int], bool]) -> int | None:
        """Drops the newest queued block that `may_cancel`: the newest, because a prefix without its tail is still of use."""
        with self._changed:
            for index in range(len(self._queue) - 1, -1, -1):
                block_id = self._queue[index][1]
                if may_cancel(block_id):
                    del self._queue[index]
                    return block_id
            return None

    def wait_finished(self, timeout_ms: float) -> bool:
        """Waits until a transfer has ended that was not yet taken."""
        with self._changed:
            return self._changed.wait_for(lambda: bool(self._finished), timeout_ms / 1e3)

    def flush(self, timeout_ms: float) -> bool:
        """Waits until nothing is pending. False when time ran out."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._queue and not self._writing, timeout_ms / 1e3)

    def close(self) -> None:
        """Drops what is queued and lets the thread end after the batch that it is writing, without waiting for it."""
        with self._changed:
            self._closing = True
            self._finished += [block_id for _, block_id in self._queue]
            self._queue.clear()
            self._changed.notify_all()

    def _run(self) -> None:
        while batch := self._next_batch():
            try:
                self._write([block_hash for block_hash, _ in batch], [block_id for _, block_id in batch])
            finally:  # a batch that failed is reported all the same: nobody reads its blocks any more
                with self._changed:
                    self._finished += [block_id for _, block_id in batch]
                    self._writing = 0
                    self._changed.notify_all()

    def _next_batch(self) -> list[tuple[BlockHash, int]]:
        with self._changed:
            self._changed.wait_for(lambda: self._queue or self._closing)
            batch = [self._queue.popleft() for _ in range(min(BATCH_BLOCKS_MAX, len(self._queue)))]
            self._writing = len(batch)
            return batch
