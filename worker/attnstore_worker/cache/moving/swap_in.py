"""One sequence's way to its pages in the lower tiers: search, plan, and reads in batches, on a thread of its own.

Owns: `SwapIn`, the state that this thread and the engine share: which blocks are still to be fetched, which are being written
now, which have arrived, and which the engine has claimed to compute them.
Invariant: a block is fetched or computed, never both at once: the engine computes only what it has claimed, and no claimed block
is in a read that begins later. While a block is in flight its bytes may change at any moment, so whoever cancels must keep the
blocks that `cancel` returns until `done`.

          resident | claimed ...  front |  to be fetched  | in flight |  arrived
    computed, in the pool       computing ->           <- batches        whole and verified
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from dataclasses import replace

from attnstore.clock import Clock
from attnstore.core.hashing import BlockHash
from attnstore.limits import CHANNEL_READ_HASHES_MAX
from attnstore.types import Lease
from attnstore_worker.cache.moving.layer_gate import LayerGate
from attnstore_worker.cache.planning.load_plan import Found, LoadPlan, LoadProgress, Order, Planner, Prompt, SearchPlan
from attnstore_worker.cache.pool.block_table import LentBlocks
from attnstore_worker.cache.store.base import Lender, OnLayer, PageSource

_LOG = logging.getLogger(__name__)


class SwapIn:
    """A search and a load that run. `buffers[i]` and `hashes[i]` are those of block `prompt.resident_blocks + i`.

    Pages that `lender` lends are not read at all: the blocks arrive at once, as those of `lent`, whose first is block
    `prompt.resident_blocks`. `changed` is set whenever the engine might go on. The methods are the engine's.
    """

    def __init__(
        self,
        source: PageSource,
        planner: Planner,
        prompt: Prompt,
        search: SearchPlan,
        hashes: Sequence[BlockHash],
        buffers: Sequence[memoryview],
        *,
        clock: Clock,
        changed: threading.Event,
        lender: Lender | None = None,
    ) -> None:
        self.prompt = prompt
        self.search = search
        self.started_ms = clock.now_ms()
        self.found: Found | None = None
        self.plan: LoadPlan | None = None
        self.planned_ms = self.started_ms
        self.gate: LayerGate | None = None
        self.bytes_read = 0
        self.lent: LentBlocks | None = None
        self.shared: set[int] = set()
        """The blocks that came through memory shared with the store's node."""
        self._lender = lender
        self._source = source
        self._planner = planner
        self._hashes = hashes
        self._buffers = buffers
        self._clock = clock
        self._changed = changed
        self._lock = threading.Lock()
        self._front = prompt.resident_blocks
        self._pending = range(0)
        self._in_flight = range(0)
        self._asked_ms = self.started_ms
        self._arrived: list[int] = []
        self._arrived_blocks = 0
        self._met = False
        self._failed = False
        self._over = False
        self._done = threading.Event()
        # A daemon, so that a read that never ends cannot keep the process alive.
        threading.Thread(target=self._run, name="attnstore-swap-in", daemon=True).start()

    @property
    def over(self) -> bool:
        """Nothing will arrive any more; what has, may still have to be taken."""
        return self._over

    @property
    def done(self) -> bool:
        """No byte lands any more."""
        return self._done.is_set()

    @property
    def met(self) -> bool:
        """Blocks that were to be fetched were claimed before."""
        return self._met

    @property
    def due_ms(self) -> float:
        """When the stage that runs must be over."""
        if self.plan is not None:
            return self.planned_ms + self.plan.deadline_ms
        return self.started_ms + self.search.deadline_ms

    def take_arrived(self) -> list[int]:
        """The blocks that arrived since the last call."""
        with self._lock:
            arrived, self._arrived = self._arrived, []
            return arrived

    def claim(self, end: int) -> int:
        """Claims the blocks before `end`, as far as none is in flight; returns the first one that is not the engine's."""
        with self._lock:
            if not self._over:
                end = min(end, (self.plan or self.search).compute_before)
            if not self._over and self._in_flight:
                end = min(end, self._in_flight.start)
            for block in self._arrived:
                if block >= self._front:
                    end = min(end, block)
            self._front = max(self._front, end)
            return self._front

    def progress(self) -> LoadProgress | None:
        """How far the load is; None before it was planned."""
        with self._lock:
            if self.found is None or self.plan is None:
                return None
            now_ms = self._clock.now_ms()
            return LoadProgress(
                self.found,
                self.plan,
                self._arrived_blocks,
                self._front,
                range(max(self._pending.start, self._front), self._pending.stop),
                self._in_flight,
                now_ms - self._asked_ms if self._in_flight else 0.0,
                now_ms - self.planned_ms,
            )

    def replan(self) -> bool:
        """Has the planner look at the load again. False where it gives up what has not arrived. From any thread."""
        progress = self.progress()
        if progress is None:
            return True
        plan = self._planner.replan(progress)
        with self._lock:
            if plan is None or self._over or self._failed:
                self._pending = range(0)
                return plan is not None
            self.plan = plan = replace(plan, order=progress.plan.order)
            if plan.order is Order.BACK_TO_FRONT:
                self._pending = range(max(plan.begin, self.prompt.resident_blocks), self._pending.stop)
            else:
                self._pending = range(self._pending.start, min(plan.end, progress.found.hit_end))
            return True

    def cancel(self) -> range:
        """Lets nothing arrive from now on. The blocks in flight, which may be written until `done`, are returned."""
        with self._lock:
            self._over = True
            self._pending = range(0)
            if self.gate is not None:
                self.gate.close(complete=False)
            return self._in_flight

    def _run(self) -> None:
        lease = None
        try:
            match = self._source.match(self._hashes)
            lease = match.lease
            if self._lend(match.hits[0], lease):
                lease = None
            elif self._begin(match.hits[0]):
                while batch := self._next_batch():
                    self._fetch(batch, lease)
                    self.replan()
        except Exception:  # a planner's or a source's mistake must not cost a sequence its life
            _LOG.exception("a swap-in failed; what has not arrived is recomputed")
        finally:
            with self._lock:
                self._over = True
            self._done.set()
            self._changed.set()
        self._source.release(lease)

    def _lend(self, hits: int, lease: Lease | None) -> bool:
        """Borrows the pages instead of reading them. True where the lease is not this thread's any more."""
        if self._lender is None or lease is None:
            return False
        pages = self._lender.borrow(self._hashes[:hits], lease)
        if pages is None:
            return False
        hit_end = self.prompt.resident_blocks + hits
        with self._lock:
            if not self._over:
                self._over = True
                self.found = Found(self.prompt, hit_end, self._front, self._clock.now_ms() - self.started_ms)
                self.lent = pages
                self.shared.update(range(self._front, hit_end))
                self._arrived += range(self._front, hit_end)
                self._arrived_blocks += max(0, hit_end - self._front)
                return True
        pages.release()
        return True

    def _begin(self, hits: int) -> bool:
        """Has the load planned. False where there is none."""
        if not hits:
            return False
        first = self.prompt.resident_blocks
        with self._lock:
            front = self._front
        self.found = Found(self.prompt, first + hits, front, self._clock.now_ms() - self.started_ms)
        plan = self._planner.load(self.found)
        if plan is None:
            return False
        with self._lock:
            self.planned_ms = self._clock.now_ms()
            self.plan = plan
            if not self._over:
                self._pending = range(max(plan.begin, first), min(plan.end, first + hits))
        return True

    def _next_batch(self) -> range:
        assert self.plan is not None
        size = CHANNEL_READ_HASHES_MAX if self.plan.order is Order.LAYERS else max(1, self.plan.batch_blocks)
        with self._lock:
            pending = range(max(self._pending.start, self._front), self._pending.stop)
            self._met |= len(pending) < len(self._pending)
            if self.plan.order is Order.BACK_TO_FRONT:
                batch, self._pending = pending[-size:], pending[:-size]
            else:
                batch, self._pending = pending[:size], pending[size:]
            self._in_flight = batch
            self._asked_ms = self._clock.now_ms()
            return batch

    def _fetch(self, batch: range, lease: Lease | None) -> None:
        first = self.prompt.resident_blocks
        part = slice(batch.start - first, batch.stop - first)
        deadline_ms = max(1.0, self.due_ms - self._clock.now_ms())
        gate = self._gate_for(batch)
        on_layer = self._telling(gate) if gate is not None else None
        result = self._source.read(self._hashes[part], self._buffers[part], lease, deadline_ms=deadline_ms, on_layer=on_layer)
        hits = [block for block, status in zip(batch, result.statuses, strict=True) if status.is_hit]
        with self._lock:
            self.bytes_read += result.bytes_read
            if result.transport == "shm":
                self.shared.update(hits)
            if not self._over:
                self._in_flight = range(0)
                self._arrived += hits
                self._arrived_blocks += len(hits)
            if not hits:  # the tier has failed or lost the pages: more of it would be more waiting
                self._failed = True
                self._pending = range(0)
            if gate is not None:
                gate.close(complete=len(hits) == len(batch) and not self._over)
        self._changed.set()

    def _gate_for(self, batch: range) -> LayerGate | None:
        """A gate for the last read of a load by layers, which nearly always is its only one."""
        assert self.plan is not None
        with self._lock:
            if self.plan.order is Order.LAYERS and not self._pending:
                self.gate = LayerGate(batch)
            return self.gate

    def _telling(self, gate: LayerGate) -> OnLayer:
        def tell(layer: int, pages: int) -> None:
            gate.tell(layer, pages)
            if layer == 0:
                self._changed.set()

        return tell
