"""The worker's half: pages into vLLM's blocks and out of them, beside the engine.

Owns: the loads that wait or run, the pages that wait to be written, and the measurements. Threads, reads in parts and the write
queue are those of `cache.moving`; the store is a `RemoteTier`, whose methods never raise. Invariants: a block is written only by
the load that vLLM requested, and reported only after its last byte; a page that is not complete and verified is reported as a
failed block, and none of it is written; a saved block is copied before `save` returns, so that vLLM may reuse it; memory for copies
is bounded, and a page beyond the bound is not saved. A load's deadline begins with its request, before its turn: a page that has
not arrived by then is a miss.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from itertools import count
from typing import Final

from attnstore.clock import Clock, Deadline
from attnstore.core.hashing import BlockHash
from attnstore.errors import DeadlineExceeded
from attnstore.logs import get_logger
from attnstore.types import PageStatus
from attnstore_worker.cache.moving.mover import Threads, read_in_parts
from attnstore_worker.cache.moving.write_queue import WriteQueue
from attnstore_worker.cache.pool.tier import Tier
from attnstore_worker.cache.store.remote import RemoteTier
from attnstore_worker.cache.store.transfer import Transfer, TransferKind
from attnstore_worker.device.pages import anonymous_memory
from attnstore_worker.vllm.kv_pages import KvPages
from attnstore_worker.vllm.plan import BlockPlan, RequestLoad

_LOADS_AT_ONCE: Final = 2
_PART_BYTES: Final = 16 << 20
"""A load is read in parts of this many bytes: while one is copied into vLLM's blocks, the next is read."""
_MEASURED_LOADS_MAX: Final = 256

_log = get_logger(__name__)

_Halves = tuple[Sequence[memoryview], Sequence[memoryview]]


class Transfers:
    """Moves pages between `tier` and vLLM's blocks. The tier's deadline bounds a load, a write and `flush`; `save_bytes_max` is the
    memory for pages that wait to be written.
    """

    def __init__(self, tier: RemoteTier, pages: KvPages, clock: Clock, *, save_bytes_max: int) -> None:
        self._tier = tier
        self._pages = pages
        self._clock = clock
        self._loaders = Threads("load", _LOADS_AT_ONCE)
        self._readers = Threads("read", _LOADS_AT_ONCE)
        self._part_pages = max(1, _PART_BYTES // pages.page_bytes)
        self._staging: deque[_Halves] = deque()  # of the loads that have ended: new memory must be zeroed first
        self._lock = threading.Lock()
        self._loaded: set[str] = set()
        self._failed_blocks: set[int] = set()
        self._loads: deque[Transfer] = deque(maxlen=_MEASURED_LOADS_MAX)
        self._save_pages_max = max(1, save_bytes_max // pages.page_bytes)
        self._writes: WriteQueue[int] = WriteQueue(self._write, pages_max=self._save_pages_max)
        self._copies: dict[int, bytearray] = {}  # by the number of their place in the queue
        self._places = count()
        self._end: Deadline | None = None  # once `flush` has been called

    def load(self, load: RequestLoad) -> None:
        """Starts a load; `take_loaded` names it when it is over, within the deadline."""
        try:
            self._loaders.submit(partial(self._load, load, Deadline(self._clock, self._tier.deadline_ms)))
        except RuntimeError:  # no thread is available
            _log.exception("a load could not be started", request=load.request_id)
            self._end_load(load, 0)

    def save(self, blocks: Sequence[BlockPlan]) -> None:
        """Copies blocks that are complete and hands them to the writer. Returns when they may be reused."""
        self._writes.take_finished()
        room = max(0, self._save_pages_max - self._writes.pending)
        for block in blocks[:room]:
            place = next(self._places)
            self._copies[place] = self._pages.gather(block.block_id)
            self._writes.offer(BlockHash(block.page_hash), place)
        if blocks[room:]:
            _log.warning("the store takes pages more slowly than they are computed", dropped_pages=len(blocks[room:]))

    def take_loaded(self) -> set[str]:
        """Returns the requests whose loads have ended since the last call. Call `take_failed_blocks` after this, never before."""
        with self._lock:
            loaded, self._loaded = self._loaded, set()
            return loaded

    def take_failed_blocks(self) -> set[int]:
        """Returns the blocks with useless content since the last call."""
        with self._lock:
            failed, self._failed_blocks = self._failed_blocks, set()
            return failed

    def take_loads(self) -> tuple[Transfer, ...]:
        """Returns the loads that found pages since the last call, each as one read from its turn to its last block."""
        with self._lock:
            loads = tuple(self._loads)
            self._loads.clear()
            return loads

    def flush(self) -> None:
        """Waits until no page waits to be written and no load runs, or the deadline is over; then ends."""
        end = self._end = Deadline(self._clock, self._tier.deadline_ms)
        with suppress(DeadlineExceeded):
            self._writes.flush(end.left_ms())
        self._writes.close()
        with suppress(DeadlineExceeded):
            self._loaders.wait_idle(end.left_ms())

    def _load(self, load: RequestLoad, deadline: Deadline) -> None:
        began_ms = self._clock.now_ms()
        good = 0
        try:
            if self._end is None:
                good = self._load_leading(load.blocks, deadline)
        except Exception:
            _log.exception("a load failed", request=load.request_id)
        if good:
            with self._lock:
                ended_ms, size_bytes = self._clock.now_ms(), good * self._pages.page_bytes
                asked = len(load.blocks)
                self._loads.append(
                    Transfer(Tier.REMOTE, TransferKind.READ, began_ms, ended_ms, asked, good, size_bytes, failed=False)
                )
        self._end_load(load, good)

    def _end_load(self, load: RequestLoad, good: int) -> None:
        with self._lock:
            self._failed_blocks.update(block.block_id for block in load.blocks[good:])
            self._loaded.add(load.request_id)

    def _load_leading(self, blocks: Sequence[BlockPlan], deadline: Deadline) -> int:
        """Loads blocks up to the first whose page does not arrive. Returns how many."""

        def read(part: range, buffers: Sequence[memoryview]) -> int:
            hashes = [BlockHash(blocks[index].page_hash) for index in part]
            try:
                left_ms = deadline.left_ms()
            except DeadlineExceeded:
                return 0
            return self._tier.read(hashes, buffers[: len(part)], None, deadline_ms=left_ms).leading_hits

        def scatter(part: range, buffers: Sequence[memoryview]) -> None:
            for index, page in zip(part, buffers, strict=False):
                self._pages.scatter(blocks[index].block_id, page)

        halves = self._staging.pop() if self._staging else _halves(self._part_pages, self._pages.page_bytes)
        try:
            return read_in_parts(self._readers, len(blocks), halves, read, scatter)
        finally:
            self._staging.append(halves)

    def _write(self, hashes: Sequence[BlockHash], places: Sequence[int]) -> None:
        copies = [self._copies.pop(place) for place in places]
        try:
            left_ms = self._tier.deadline_ms if self._end is None else self._end.left_ms()
        except DeadlineExceeded:
            return
        verdicts = self._tier.write(hashes, [memoryview(copy) for copy in copies], deadline_ms=left_ms).verdicts
        unkept = {verdict for verdict in verdicts if not verdict.is_kept} - {PageStatus.ARRIVING}
        if unkept:
            _log.warning("pages were not saved", verdicts=sorted(verdict.name for verdict in unkept))


def _halves(part_pages: int, page_bytes: int) -> _Halves:
    """Returns memory in which one part of a load arrives while the other is copied into blocks."""
    memory = memoryview(anonymous_memory(2 * part_pages * page_bytes))
    pages = [memory[index * page_bytes : (index + 1) * page_bytes] for index in range(2 * part_pages)]
    return pages[:part_pages], pages[part_pages:]
