"""The worker's half: pages into vLLM's blocks and out of them, beside the engine.

Owns: the threads that load and save, and what they measured. Invariants: a block is written only by the load that vLLM asked for,
and reported only after its last byte; a page that did not come whole and verified is reported as a failed block, and none of it is
written; a block that is saved is copied before `save` returns, so that vLLM may reuse it; memory for copies is bounded, and what
passes the bound is not saved. A load's deadline begins when it is asked for, before it has its turn: a page that is not there by
then is a miss.
"""

from __future__ import annotations

import math
import threading
from collections import deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Final

from attnstore.clock import Clock, Deadline
from attnstore.core.hashing import Namespace
from attnstore.core.layout import PageLayout
from attnstore.errors import AttnStoreError, Retryable
from attnstore.logs import get_logger
from attnstore.types import PageStatus
from attnstore_worker.cache.pool.pages import anonymous_memory
from attnstore_worker.cache.store.base import PageStore
from attnstore_worker.vllm.kv_pages import KvPages
from attnstore_worker.vllm.plan import BlockPlan, Costs, LoadPlan

_LOADS_AT_ONCE: Final = 2
_PART_BYTES: Final = 16 << 20
"""A load goes in parts of so many bytes: while one is put into vLLM's blocks, the next is read."""
_MEASUREMENTS_MAX: Final = 256

_log = get_logger(__name__)


class Transfers:
    """`deadline_ms` bounds a load, a write and `flush`; `save_bytes_max` is the memory for pages that wait to be written."""

    def __init__(
        self,
        store: PageStore,
        space: Namespace,
        layout: PageLayout,
        pages: KvPages,
        clock: Clock,
        *,
        deadline_ms: float,
        save_bytes_max: int,
    ) -> None:
        self._store = RegisteredStore(store, space, layout)
        self._space = space
        self._pages = pages
        self._clock = clock
        self._deadline_ms = deadline_ms
        self._save_pages_max = max(1, save_bytes_max // pages.page_bytes)
        self._loaders = ThreadPoolExecutor(_LOADS_AT_ONCE, "attnstore-load")
        self._saver = ThreadPoolExecutor(1, "attnstore-save")
        self._lock = threading.Lock()
        self._loaded: set[str] = set()
        self._failed_blocks: set[int] = set()
        self._saving = 0
        self._dropped = 0
        self._end: Deadline | None = None  # once `flush` has been called
        self._load_costs: deque[tuple[int, float]] = deque(maxlen=_MEASUREMENTS_MAX)
        self._part_pages = max(1, _PART_BYTES // pages.page_bytes)
        self._readers = ThreadPoolExecutor(_LOADS_AT_ONCE, "attnstore-read")
        self._staging: deque[_Staging] = deque()  # of the loads that have ended

    def load(self, plan: LoadPlan) -> None:
        """Starts a load; `take_loaded` names it when it is over, within the deadline."""
        self._loaders.submit(self._load, plan, Deadline(self._clock, self._deadline_ms))

    def save(self, blocks: Sequence[BlockPlan]) -> None:
        """Copies blocks that are complete and hands them to the writer. Returns when they may be reused."""
        with self._lock:
            room = max(0, self._save_pages_max - self._saving)
            taken, dropped = blocks[:room], blocks[room:]
            self._saving += len(taken)
            self._dropped += len(dropped)
        if dropped:
            _log.warning("the store takes pages more slowly than they are computed", dropped_pages=len(dropped))
        if taken:
            try:
                copies = [self._pages.gather(block.block_id) for block in taken]
                self._saver.submit(self._save, [block.page_hash for block in taken], copies)
            except BaseException:
                self._saved(len(taken))
                raise

    def take_loaded(self) -> set[str]:
        """Requests whose loads have ended since the last call. Ask for failed blocks after this, never before."""
        with self._lock:
            loaded, self._loaded = self._loaded, set()
            return loaded

    def take_failed_blocks(self) -> set[int]:
        """Blocks that hold nothing of use, since the last call."""
        with self._lock:
            failed, self._failed_blocks = self._failed_blocks, set()
            return failed

    def take_load_costs(self) -> tuple[tuple[int, float], ...]:
        """`(bytes, ms)` of the loads since the last call."""
        with self._lock:
            costs = tuple(self._load_costs)
            self._load_costs.clear()
            return costs

    def flush(self) -> None:
        """Waits until what was handed to the writer is written or refused, or the deadline is over; then ends."""
        self._end = Deadline(self._clock, self._deadline_ms)
        self._loaders.shutdown(wait=True, cancel_futures=True)
        self._readers.shutdown(wait=True)
        self._saver.shutdown(wait=True)

    def _load(self, plan: LoadPlan, deadline: Deadline) -> None:
        began_ms = self._clock.now_ms()
        good = 0
        try:
            staging = self._staging.pop() if self._staging else _Staging(self._part_pages, self._pages.page_bytes)
            try:
                good = self._load_leading(plan.blocks, staging, deadline)
            finally:
                self._staging.append(staging)
        except Exception:
            _log.exception("a load failed", request=plan.request_id)
        with self._lock:
            if good:
                self._load_costs.append((good * self._pages.page_bytes, self._clock.now_ms() - began_ms))
            self._failed_blocks.update(block.block_id for block in plan.blocks[good:])
            self._loaded.add(plan.request_id)

    def _load_leading(self, blocks: Sequence[BlockPlan], staging: _Staging, deadline: Deadline) -> int:
        """Loads blocks up to the first that is not to be had; how many. No byte comes into `staging` after it has returned."""
        parts = [blocks[first : first + self._part_pages] for first in range(0, len(blocks), self._part_pages)]
        loaded = 0
        reading = self._readers.submit(self._read, parts[0], staging.halves[0], deadline)
        for index, part in enumerate(parts):
            pages, hits = staging.halves[index % 2], reading.result()
            if hits == len(part) and index + 1 < len(parts):
                reading = self._readers.submit(self._read, parts[index + 1], staging.halves[(index + 1) % 2], deadline)
            try:
                for block, page in zip(part[:hits], pages, strict=False):
                    self._pages.scatter(block.block_id, page)
            except BaseException:
                wait([reading])
                raise
            loaded += hits
            if hits < len(part):
                break
        return loaded

    def _read(self, blocks: Sequence[BlockPlan], pages: Sequence[memoryview], deadline: Deadline) -> int:
        """Reads pages up to the first that is not to be had; how many."""
        hashes = [block.page_hash for block in blocks]
        try:
            store = self._store.ready(deadline)
            answer = store.read(self._space, hashes, pages[: len(blocks)], lease=None, deadline_ms=deadline.left_ms())
        except AttnStoreError as error:
            _log.warning("pages were not read", pages=len(blocks), reason=str(error))
            return 0
        return answer.leading_hits

    def _save(self, hashes: Sequence[bytes], copies: Sequence[bytearray]) -> None:
        try:
            views = [memoryview(copy) for copy in copies]
            deadline = self._end or Deadline(self._clock, self._deadline_ms)
            store = self._store.ready(deadline)
            verdicts = store.write(self._space, hashes, views, deadline_ms=math.ceil(deadline.left_ms())).verdicts
            refused = [verdict.name for verdict in verdicts if not verdict.is_kept and verdict is not PageStatus.ARRIVING]
            if refused:
                _log.warning("the store refused pages", verdicts=sorted(set(refused)), pages=len(refused))
        except Retryable as error:
            _log.warning("pages were not saved", pages=len(hashes), reason=str(error))
        except AttnStoreError:
            _log.exception("pages were not saved", pages=len(hashes))
        finally:
            self._saved(len(hashes))

    def _saved(self, pages: int) -> None:
        with self._lock:
            self._saving -= pages


class _Staging:
    """Where the pages of one load arrive: two halves, of a part each. Kept for the next load: new memory must be zeroed first."""

    def __init__(self, part_pages: int, page_bytes: int) -> None:
        memory = memoryview(anonymous_memory(2 * part_pages * page_bytes))
        pages = [memory[index * page_bytes : (index + 1) * page_bytes] for index in range(2 * part_pages)]
        self.halves = (pages[:part_pages], pages[part_pages:])


class RegisteredStore:
    """A store and a namespace that is made known to it before the first use, whenever the store is there for that."""

    def __init__(self, store: PageStore, space: Namespace, layout: PageLayout) -> None:
        self._store = store
        self._space = space
        self._layout = layout
        self._registered = False

    def ready(self, deadline: Deadline) -> PageStore:
        """The store, which knows the namespace. Raises its errors. From any thread: registering twice is harmless."""
        if not self._registered:
            self._store.register_layout(self._space, self._layout, deadline_ms=deadline.left_ms())
            self._registered = True
        return self._store


def costs_of(transfers: Transfers, steps: Sequence[tuple[int, float]]) -> Costs:
    """What is to be told to the scheduler."""
    return Costs(transfers.take_load_costs(), tuple(steps))
