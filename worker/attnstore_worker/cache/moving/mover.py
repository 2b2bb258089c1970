"""The threads that read pages from the lower tiers, with their lock and the quarantine of blocks.

Owns: `Mover`, the running loads (each is a `Load`, changed under one lock) and the quarantine of blocks that a cancelled load may
still write; `Threads`, calls on a bounded number of daemon threads; `read_in_parts`, a read through two halves of staging memory.
Invariants: no byte lands in a buffer after its read is reported as over: only then is a quarantined block released, and only then
does `read_in_parts` return. No lock is held while a source or a planner is called.

The path of a page of a prompt:

    CacheManager.admit   cache/manager.py         holds resident blocks, lets `Loads` prepare the load (the engine's thread)
    Mover.start          cache/moving/mover.py    starts a thread
    Mover._run           cache/moving/mover.py    asks, plans, and reads one batch after the other, as `Load` says
    RemoteTier.read      cache/store/remote.py    turns every failure into a miss
    PageStore.read       attnstore/client         the client, its transport and the socket

vLLM's transfers use `Threads`, `read_in_parts` and the `WriteQueue` of this package.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from typing import Final, TypeVar

from attnstore.clock import Clock
from attnstore.core.hashing import BlockHash
from attnstore.limits import CHANNEL_READ_HASHES_MAX
from attnstore.types import Lease, ReadResult
from attnstore_worker.cache.moving.load import Load, LoadEnd, LoadState, Planner
from attnstore_worker.cache.moving.staged_reads import StagedBlocks
from attnstore_worker.cache.pool.block_table import LentBlocks
from attnstore_worker.cache.store.base import Lender, PageSource
from attnstore_worker.errors import PagesLost

_LOG = logging.getLogger(__name__)
_Result = TypeVar("_Result")

_GIVE_UP_POLL_S: Final = 0.02
"""How often a wait for a layer asks whether to give up."""


class Threads:
    """Runs calls in the order given on at most `threads_max` daemon threads.

    Daemons, so that a read that never ends cannot keep the process alive. A thread ends when no call waits.
    """

    def __init__(self, name: str, threads_max: int) -> None:
        self._name = f"attnstore-{name}"
        self._threads_max = threads_max
        self._waiting: deque[Callable[[], None]] = deque()
        self._running = 0
        self._changed = threading.Condition()

    def submit(self, call: Callable[[], _Result]) -> Future[_Result]:
        """Runs a call. The result is the call's result or error.

        Raises `RuntimeError` if no thread runs and none can be started: the call then never runs.
        """
        future: Future[_Result] = Future()
        with self._changed:  # a running thread, which takes its next call under the lock, does not find a call that is refused
            self._waiting.append(partial(_settle, future, call))
            if self._running < self._threads_max:
                self._start_thread()
        return future

    def wait_idle(self, timeout_ms: float) -> bool:
        """Waits until all calls have ended. Returns False if time ran out."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._running, timeout_ms / 1e3)

    def _start_thread(self) -> None:
        self._running += 1
        try:
            threading.Thread(target=self._drain, name=self._name, daemon=True).start()
        except Exception:
            self._running -= 1
            if not self._running:
                self._waiting.pop()
                raise

    def _drain(self) -> None:
        while True:
            with self._changed:
                if not self._waiting:
                    self._running -= 1
                    self._changed.notify_all()
                    return
                run = self._waiting.popleft()
            run()


def _settle(future: Future[_Result], call: Callable[[], _Result]) -> None:
    try:
        result = call()
    except BaseException as error:
        future.set_exception(error)
    else:
        future.set_result(result)


PartReader = Callable[[range, Sequence[memoryview]], int]
"""Reads the pages with these numbers into the buffers. Returns how many leading ones are complete and verified."""
PartTaker = Callable[[range, Sequence[memoryview]], None]
"""Takes the pages with these numbers out of the buffers, which are overwritten after it has returned."""


def read_in_parts(
    readers: Threads, pages: int, halves: tuple[Sequence[memoryview], Sequence[memoryview]], read: PartReader, take: PartTaker
) -> int:
    """Reads pages `[0, pages)` in parts of the size of one of the `halves`. Returns how many were taken: those before the first
    that `read` did not get. While `take` empties one half, the next part is read into the other, on `readers`.

    Raises what `read` or `take` raises. No byte lands in a buffer after the call has ended.
    """
    parts = [range(first, min(first + len(halves[0]), pages)) for first in range(0, pages, len(halves[0]))]
    taken = 0
    reading = readers.submit(partial(read, parts[0], halves[0])) if parts else None
    for index, part in enumerate(parts):
        assert reading is not None
        hits, ahead = reading.result(), None
        if hits == len(part) and index + 1 < len(parts):
            ahead = readers.submit(partial(read, parts[index + 1], halves[(index + 1) % 2]))
        try:
            take(part[:hits], halves[index % 2])
        except BaseException:
            if ahead is not None:
                ahead.exception()  # waits for its end
            raise
        taken += hits
        if ahead is None:
            break
        reading = ahead
    return taken


@dataclass(frozen=True, slots=True, eq=False)
class LoadJob:
    """A load that is SEARCHING, and what it needs. `buffers[i]` and `hashes[i]` are those of block `prompt.resident_blocks + i`.

    Pages are read into `buffers`, which are the blocks, or into the blocks `staged` of a device with memory of its own.
    """

    load: Load
    planner: Planner
    source: PageSource
    hashes: Sequence[BlockHash]
    buffers: Sequence[memoryview]
    lender: Lender | None
    staged: StagedBlocks | None = None


class Mover:
    """The running loads, each on a thread of its own. All methods may be called from any thread."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._layer_moved = threading.Condition(self._lock)
        self._changed = threading.Event()
        self._jobs: dict[Load, LoadJob] = {}
        self._lent: dict[Load, LentBlocks] = {}
        self._quarantine: list[tuple[Load, list[int]]] = []

    def start(self, job: LoadJob) -> None:
        """Starts a load. Pages that the job's lender lends are not read: `take` returns them and their blocks at once."""
        with self._lock:
            self._jobs[job.load] = job
        try:
            threading.Thread(target=self._run, args=(job,), name="attnstore-load", daemon=True).start()
        except RuntimeError:  # no thread is available
            _LOG.exception("a load could not be begun; its blocks are computed")
            self._finish(job.load)

    def claim(self, load: Load, end: int) -> int:
        """As `Load.claim`."""
        with self._lock:
            return load.claim(end)

    def take(self, load: Load) -> tuple[list[int], LentBlocks | None]:
        """As `Load.take`. Lent pages are returned with their blocks, and the caller releases them."""
        with self._lock:
            return load.take(self._clock.now_ms()), self._lent.pop(load, None)

    def replan(self, load: Load) -> bool:
        """Asks the planner about a load again. Returns False if it gives up pages that have not arrived. Raises what the planner
        raises.
        """
        now_ms = self._clock.now_ms()
        with self._lock:
            job = self._jobs.get(load)
            if job is None or load.state is not LoadState.READING:
                return True
            seen = load.snapshot()
        plan = job.planner.replan(seen, now_ms)
        with self._lock:
            return load.replan(plan)

    def cancel(self, load: Load, end: LoadEnd) -> range:
        """As `Load.cancel`. The caller holds the blocks that are returned and hands them to `quarantine`."""
        with self._lock:
            in_flight = load.cancel(end, self._clock.now_ms())
            self._layer_moved.notify_all()
            return in_flight

    def quarantine(self, load: Load, block_ids: list[int]) -> None:
        """Keeps blocks of a cancelled load until no byte lands in them; `take_released` returns them then."""
        with self._lock:
            self._quarantine.append((load, block_ids))

    @property
    def quarantined(self) -> int:
        """Blocks in quarantine."""
        return sum(len(block_ids) for _, block_ids in self._quarantine)

    def take_released(self) -> list[int]:
        """Returns the quarantined blocks that nothing writes any more."""
        if not self._quarantine:
            return []
        with self._lock:
            released = [block_id for load, block_ids in self._quarantine if load not in self._jobs for block_id in block_ids]
            self._quarantine = [(load, block_ids) for load, block_ids in self._quarantine if load in self._jobs]
            return released

    def wait_layer(self, load: Load, layer: int | None, give_up: Callable[[], bool]) -> None:
        """Waits for a layer of the blocks that arrive by layers; with None, for the end of their read with all of them complete and
        verified. On a device with memory of its own, the running step waits for the copy of the layer.

        Raises `PagesLost` if that is impossible, or if `give_up()` is true.
        """
        while True:
            with self._layer_moved:
                moved = self._layer_moved.wait_for(lambda: load.layers_lost or load.has_layer(layer), _GIVE_UP_POLL_S)
                if load.layers_lost:
                    raise PagesLost("not all pages of the step came")
                job = self._jobs.get(load)
            if moved:
                if job is not None and job.staged is not None and layer is not None:
                    job.staged.order_layer(layer)
                return
            if give_up():  # without the lock, which it may need
                raise PagesLost("the pages of the step did not come in time")

    def wait(self, timeout_ms: float) -> None:
        """Waits until a load has progressed, `wake` was called, or the time is up."""
        self._changed.wait(timeout_ms / 1e3)
        self._changed.clear()

    def wake(self) -> None:
        """Ends a running `wait`, or the next one."""
        self._changed.set()

    def _run(self, job: LoadJob) -> None:
        """Runs a whole load, on its thread."""
        load, source, first, lease = job.load, job.source, job.load.prompt.resident_blocks, None
        try:
            match = source.match(job.hashes)
            hits, lease = match.hits[0], match.lease
            if lease is not None and self._borrow(job, hits, lease):
                lease = None
            else:
                self._plan(job, hits)
            while batch := self._next_batch(load):
                part = slice(batch.start - first, batch.stop - first)
                on_layer = partial(self._layer_arrived, load) if load.layered is not None else None
                if job.staged is not None:
                    result = job.staged.read(source, job.hashes[part], part, lease, on_layer)
                else:
                    deadline_ms = max(1.0, load.due_ms - self._clock.now_ms())
                    result = source.read(job.hashes[part], job.buffers[part], lease, deadline_ms=deadline_ms, on_layer=on_layer)
                self._arrived(load, batch, result)
                self.replan(load)
        except Exception:  # an error of a planner or a source must not end a sequence
            _LOG.exception("a load failed; the blocks that have not arrived are computed")
        finally:
            self._finish(load)
        source.release(lease)

    def _finish(self, load: Load) -> None:
        with self._layer_moved:
            load.finish()
            del self._jobs[load]
            self._layer_moved.notify_all()
        self._changed.set()

    def _borrow(self, job: LoadJob, hits: int, lease: Lease) -> bool:
        """Borrows the pages instead of reading them. Returns True if the lease was passed on with them."""
        pages = job.lender.borrow(job.hashes[:hits], lease) if job.lender is not None else None
        if pages is None:
            return False
        with self._lock:
            if job.load.lent(hits, self._clock.now_ms()):
                self._lent[job.load] = pages
                return True
        pages.release()  # the load was cancelled
        return True

    def _plan(self, job: LoadJob, hits: int) -> None:
        with self._lock:
            job.load.found(hits, self._clock.now_ms())
            seen = job.load.snapshot()
        if hits:
            plan = job.planner.plan(seen)
            with self._lock:
                job.load.begin(plan, self._clock.now_ms())

    def _next_batch(self, load: Load) -> range:
        with self._lock:
            return load.next_batch(self._clock.now_ms(), CHANNEL_READ_HASHES_MAX)

    def _layer_arrived(self, load: Load, layer: int, pages: int) -> None:
        with self._layer_moved:
            load.layer_arrived(layer, pages)
            self._layer_moved.notify_all()
        if layer == 0:
            self._changed.set()

    def _arrived(self, load: Load, batch: range, result: ReadResult) -> None:
        hits = [block for block, status in zip(batch, result.statuses, strict=True) if status.is_hit]
        with self._layer_moved:
            load.arrived(hits, result.bytes_read, shared=result.transport == "shm")
            self._layer_moved.notify_all()
        self._changed.set()
