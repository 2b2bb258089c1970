"""Write-behind: pages are written to the next tier on a thread of their own while the caller computes.

Owns: the queue of pages to write and the thread that writes them.
Invariant: an accepted item is reported exactly once, by `take_finished` or by `cancel_newest`; until then the thread may read its
bytes, and the caller must not change them. A write that has copied the bytes of its batch reports it early, by `copied`.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from typing import Final, Generic, TypeVar

from attnstore import tasks
from attnstore.core.hashing import BlockHash

WRITE_BATCH_PAGES_MAX: Final = 32
"""Pages in one write: enough to fill the stream, few enough that the queue can still be cancelled."""

_Item = TypeVar("_Item")


class WriteQueue(Generic[_Item]):
    """Writes items in the order offered, `WRITE_BATCH_PAGES_MAX` at a time; at most `pages_max` are pending.

    An item stands for the bytes of one page, such as a block's number. A `write` that raises costs the store these pages.
    """

    def __init__(self, write: Callable[[Sequence[BlockHash], Sequence[_Item]], None], *, pages_max: int) -> None:
        self._write = write
        self._pages_max = pages_max
        self._queue: deque[tuple[BlockHash, _Item]] = deque()
        self._finished: list[_Item] = []
        self._writing = 0
        self._batch: list[_Item] = []  # being written, and not reported yet
        self._closing = False
        self._changed = threading.Condition()
        tasks.supervised_thread("write-behind", self._run)

    @property
    def pending(self) -> int:
        """Items that were accepted and are not yet written or cancelled."""
        with self._changed:
            return len(self._queue) + self._writing

    @property
    def unreported(self) -> int:
        """Items that were accepted and not yet reported."""
        with self._changed:
            return len(self._queue) + len(self._batch)

    def offer(self, block_hash: BlockHash, item: _Item) -> bool:
        """Queues a page. Returns False, without effect, if `pages_max` are pending: the store misses the page."""
        with self._changed:
            if len(self._queue) + self._writing >= self._pages_max:
                return False
            self._queue.append((block_hash, item))
            self._changed.notify_all()
            return True

    def copied(self) -> None:
        """Called by a running write: reports its items now, because it does not read their bytes any more."""
        with self._changed:
            self._report()

    def take_finished(self) -> list[_Item]:
        """Returns the items whose write ended, or whose bytes were copied, since the last call."""
        with self._changed:
            finished, self._finished = self._finished, []
            return finished

    def queued(self, may_cancel: Callable[[_Item], bool]) -> int:
        """The number of items that `cancel_newest` could return."""
        with self._changed:
            return sum(may_cancel(item) for _, item in self._queue)

    def cancel_newest(self, may_cancel: Callable[[_Item], bool]) -> _Item | None:
        """Drops the newest queued item that `may_cancel`: the newest, because a prefix without its tail is still useful."""
        with self._changed:
            for index in range(len(self._queue) - 1, -1, -1):
                item = self._queue[index][1]
                if may_cancel(item):
                    del self._queue[index]
                    return item
            return None

    def wait_finished(self, timeout_ms: float) -> bool:
        """Waits until a write has ended that was not taken yet. Returns False if time ran out."""
        with self._changed:
            return self._changed.wait_for(lambda: bool(self._finished), timeout_ms / 1e3)

    def flush(self, timeout_ms: float) -> bool:
        """Waits until nothing is pending. Returns False if time ran out."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._queue and not self._writing, timeout_ms / 1e3)

    def close(self) -> None:
        """Drops queued items and lets the thread end after its current batch, without waiting for it."""
        with self._changed:
            self._closing = True
            self._finished += [item for _, item in self._queue]
            self._queue.clear()
            self._changed.notify_all()

    def _run(self) -> None:
        while batch := self._next_batch():
            try:
                self._write([block_hash for block_hash, _ in batch], [item for _, item in batch])
            finally:  # a failed batch is reported too, because nobody reads its pages any more
                with self._changed:
                    self._writing = 0
                    self._report()

    def _next_batch(self) -> list[tuple[BlockHash, _Item]]:
        with self._changed:
            self._changed.wait_for(lambda: self._queue or self._closing)
            batch = [self._queue.popleft() for _ in range(min(WRITE_BATCH_PAGES_MAX, len(self._queue)))]
            self._batch = [item for _, item in batch]
            self._writing = len(batch)
            return batch

    def _report(self) -> None:
        self._finished += self._batch
        self._batch = []
        self._changed.notify_all()
