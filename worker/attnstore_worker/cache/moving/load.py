"""One load: how the pages of one prompt come from the lower tiers while the engine computes the prompt from its front.

Owns: the whole state of a load, and its words: `Prompt`, the `SearchPlan` and `LoadPlan` that a `Planner` makes, `LoadEnd`.
Planners, observers, the mover and the engine all read the same `Load`.
Invariant: a block is fetched or computed, never both: `claim` gives the engine no block that is in flight or has arrived, and
`next_batch` reads no block that is claimed. After `cancel` nothing arrives; the blocks it returns may be written until `arrived`.

Blocks are numbered from the start of the prompt. The first `resident_blocks` are in the pool at admission:

          resident | claimed ... front |  pending  | in flight |  arrived, ready
    computed, in the pool      computing ->      <- batches      whole and verified

States: SEARCHING (the lower tiers are asked), FOUND (they have blocks, nothing is planned), READING (batches are read, one at a
time), FINISHED (nothing arrives any more, the engine has not taken notice), ENDED (`end` says why). `-` changes nothing.

    command        SEARCHING    FOUND        READING                     FINISHED      ENDED
    found(0)       FINISHED     -            -                           -             -
    found(n)       FOUND        -            -                           -             -
    lent(n)        FINISHED     -            -                           -             -
    begin(plan)    -            READING      -                           -             -
    begin(None)    -            FINISHED     -                           -             -
    next_batch     -            -            READING, FINISHED if none   -             -
    arrived        -            -            READING                     -             none in flight
    replan(plan)   -            -            READING                     -             -
    replan(None)   -            -            READING, no further batch   -             -
    finish         FINISHED     FINISHED     FINISHED                    -             none in flight
    take           -            -            READING                     ENDED         -
    cancel(end)    ENDED        ENDED        ENDED                       ENDED         -

`claim` stops at the blocks in flight, at those that arrived and, until the load is FINISHED, at `compute_before`.
Pure: no I/O, no clock, no thread. Time comes in as `now_ms`, effects go out as return values. Not thread-safe: `Mover` locks.
Computing from the front while pages come from the back is Cake (Jin et al., "Compute or Load KV Cache? Why Not Both?", ICML 2025).
"""

from __future__ import annotations

import copy
import enum
import math
from collections.abc import Collection
from dataclasses import dataclass, field, replace
from typing import Protocol, Self


class FetchOrder(enum.Enum):
    """Which part of a load is fetched first: the first batch, the last batch, or the first layer of all blocks.

    LAYERS is one read. Where the engine has nothing else to compute and the transport sends by layers, each layer of the next chunk
    is computed as soon as that layer of all blocks is there; otherwise the engine waits for the blocks.
    """

    FRONT_TO_BACK = "front_to_back"
    BACK_TO_FRONT = "back_to_front"
    LAYERS = "layers"


@dataclass(frozen=True, slots=True)
class Prompt:
    """The facts before the lower tiers are asked. `number` distinguishes admissions. `usable_blocks` is how many blocks may come
    from a cache: the last token is always computed. `host_blocks` of the resident blocks come up from HOST.
    """

    number: int
    tokens: int
    block_tokens: int
    page_bytes: int
    layers: int
    resident_blocks: int
    usable_blocks: int
    host_blocks: int = 0


@dataclass(frozen=True, slots=True)
class SearchPlan:
    """Ask the lower tiers for at most `deadline_ms`, and compute the blocks before `compute_before` meanwhile."""

    deadline_ms: float
    compute_before: int = 0


@dataclass(frozen=True, slots=True)
class LoadPlan:
    """Fetch blocks `[begin, end)`, `batch_blocks` in one read, until `deadline_ms` after the plan was made. Compute the others:
    those before `compute_before` during the load. Where the two fronts meet, fetching stops.

    Blocks before `Load.front` and from `Load.hit_end` on are ignored.
    """

    begin: int
    end: int
    batch_blocks: int
    deadline_ms: float
    order: FetchOrder = FetchOrder.FRONT_TO_BACK
    compute_before: int = 0


class LoadState(enum.Enum):
    """See the module."""

    SEARCHING = "searching"
    FOUND = "found"
    READING = "reading"
    FINISHED = "finished"
    ENDED = "ended"


class LoadEnd(enum.Enum):
    """Why a load is over.

    LENT: the pages are used where they lie. COMPLETE: all planned blocks were fetched or failed. MET: the computed front reached
    the blocks that had arrived. NOT_FOUND: no lower tier had a block. DECLINED: the planner wanted none. LATE: the deadline passed,
    or the planner gave the load up. RELEASED: the sequence was cancelled or preempted.
    """

    LENT = "lent"
    COMPLETE = "complete"
    MET = "met"
    NOT_FOUND = "not_found"
    DECLINED = "declined"
    LATE = "late"
    RELEASED = "released"


class Planner(Protocol):
    """Decides about every load. Called from several threads; must not block and must not raise.

    A plan is advice about time: whatever it says, the tokens are the same. The loads that a planner gets are snapshots.
    """

    def search(self, prompt: Prompt) -> SearchPlan | None:
        """Called before the lower tiers are asked. None means: compute everything that is not resident."""
        ...

    def plan(self, load: Load) -> LoadPlan | None:
        """Called when the lower tiers have at least one block. None means: compute instead."""
        ...

    def replan(self, load: Load, now_ms: float) -> LoadPlan | None:
        """Called repeatedly during a load, at least after each read. None gives up pages that have not arrived.

        A new plan keeps the order. It cannot revoke requested pages or computed blocks.
        """
        ...

    def prefetches(self, prompt: Prompt) -> bool:
        """Returns whether the pages of a waiting prompt are fetched before its turn, which uses only the link."""
        ...


@dataclass(slots=True, eq=False)
class Load:
    """See the module. Fields are read by anybody and changed by the commands only.

    A load without a `search` has ended: everything that is not resident is computed. An `observed` load is one that there was
    something to decide about, for a sequence that runs: its end is told to observers.
    Blocks `[resident_blocks, hit_end)` were found in the lower tiers, `search_ms` after the load began. Blocks before `front` are
    claimed. `arrived_blocks` came whole and verified; those in `shared`
    came through shared memory, those in `ready` lie ahead of the computed front, which has passed `used_blocks`, `shared_blocks`
    of them from shared memory. Blocks `layered` arrive by layers: the first `layers` layers of all of them are there.
    """

    prompt: Prompt
    search: SearchPlan | None
    started_ms: float
    observed: bool = True
    state: LoadState = LoadState.SEARCHING
    hit_end: int = 0
    search_ms: float = 0.0
    plan: LoadPlan | None = None
    planned_ms: float = 0.0
    front: int = 0
    in_flight: range = range(0)
    asked_ms: float = 0.0
    arrived_blocks: int = 0
    bytes_read: int = 0
    shared: set[int] = field(default_factory=set)
    ready: set[int] = field(default_factory=set)
    used_blocks: int = 0
    shared_blocks: int = 0
    layered: range | None = None
    layers: int = 0
    layers_complete: bool = False
    layers_lost: bool = False
    end: LoadEnd | None = None
    ended_ms: float = 0.0
    _pending: range = range(0)
    _untaken: list[int] = field(default_factory=list)
    _lent: bool = False
    _met: bool = False
    _stopped: bool = False

    def __post_init__(self) -> None:
        self.front = self.hit_end = self.prompt.resident_blocks
        if self.search is None:
            self.state = LoadState.ENDED
            self.ended_ms = self.started_ms

    @property
    def running(self) -> bool:
        """True if blocks may still arrive or have to be taken."""
        return self.state is not LoadState.ENDED

    @property
    def over(self) -> bool:
        """True if all blocks that are not computed yet have to be computed."""
        return self.state is LoadState.ENDED and not self.ready

    @property
    def pending(self) -> range:
        """The blocks that will be read if the plan stays as it is."""
        return range(max(self._pending.start, self.front), self._pending.stop)

    @property
    def due_ms(self) -> float:
        """When the running stage must be over; infinite if none runs."""
        if self.search is None or not self.running:
            return math.inf
        if self.plan is None:
            return self.started_ms + self.search.deadline_ms
        return self.planned_ms + self.plan.deadline_ms

    def snapshot(self) -> Self:
        """A copy for a planner: later commands do not change its numbers and ranges."""
        return copy.copy(self)

    def found(self, hits: int, now_ms: float) -> None:
        """The lower tiers have the first `hits` blocks that are not resident."""
        if self.state is not LoadState.SEARCHING:
            return
        self.state = LoadState.FOUND if hits else LoadState.FINISHED
        self.hit_end, self.search_ms = self.prompt.resident_blocks + hits, now_ms - self.started_ms

    def lent(self, hits: int, now_ms: float) -> bool:
        """Records that the first `hits` blocks that are not resident can be used in place: they arrive at once, without a read.

        Returns False if the load does not need them any more.
        """
        if self.state is not LoadState.SEARCHING:
            return False
        self.found(hits, now_ms)
        self.state, self._lent = LoadState.FINISHED, True
        arrived = range(self.front, self.prompt.resident_blocks + hits)
        self.shared.update(arrived)
        self._untaken += arrived
        self.arrived_blocks += len(arrived)
        return True

    def begin(self, plan: LoadPlan | None, now_ms: float) -> None:
        """Takes the planner's answer to the found blocks."""
        if self.state is not LoadState.FOUND:
            return
        if plan is None:
            self.state = LoadState.FINISHED
            return
        self.state, self.plan, self.planned_ms = LoadState.READING, plan, now_ms
        self._pending = range(max(plan.begin, self.prompt.resident_blocks), min(plan.end, self.hit_end))

    def next_batch(self, now_ms: float, blocks_max: int) -> range:
        """Takes the next blocks to read, at most `blocks_max`; none if the load is finished or was cancelled."""
        if self.state is not LoadState.READING or self.plan is None:
            return range(0)
        assert not self.in_flight, "one read at a time"
        pending, by_layers = self.pending, self.plan.order is FetchOrder.LAYERS
        self._met |= len(pending) < len(self._pending)
        size = blocks_max if by_layers else min(blocks_max, max(1, self.plan.batch_blocks))
        if self.plan.order is FetchOrder.BACK_TO_FRONT:
            self.in_flight, self._pending = pending[-size:], pending[:-size]
        else:
            self.in_flight, self._pending = pending[:size], pending[size:]
        self.asked_ms = now_ms
        if not self.in_flight:
            self.state = LoadState.FINISHED
        elif by_layers and not self._pending:  # the last read of a load by layers, which is nearly always its only one
            self.layered = self.in_flight
        return self.in_flight

    def layer_arrived(self, layer: int, pages: int) -> None:
        """Records that of the first `pages` blocks of `layered`, this layer and those before it have arrived."""
        self.layers = layer + 1
        self.layers_lost |= self.layered is None or pages < len(self.layered)

    def arrived(self, hits: Collection[int], bytes_read: int, *, shared: bool = False) -> None:
        """Ends the read of the blocks in flight: those in `hits` are complete and verified; says whether they came through shared
        memory.
        """
        if not self.in_flight:
            return
        batch, self.in_flight = self.in_flight, range(0)
        self.bytes_read += bytes_read
        if self.state is not LoadState.READING:
            return
        if self.layered is not None:
            self.layers_complete = len(hits) == len(batch)
            self.layers_lost |= not self.layers_complete
        if shared:
            self.shared.update(hits)
        self._untaken += hits
        self.arrived_blocks += len(hits)
        if not hits:  # the tier has failed or lost the pages: further reads would only wait
            self._stop_reading()

    def replan(self, plan: LoadPlan | None) -> bool:
        """Takes the planner's new answer. Returns False if it gives up pages that have not arrived."""
        if self.state is not LoadState.READING or self.plan is None:
            return True
        if plan is None:
            self._stop_reading()
        if plan is None or self._stopped:
            return plan is not None
        self.plan = replace(plan, order=self.plan.order)
        if self.plan.order is FetchOrder.BACK_TO_FRONT:
            self._pending = range(max(plan.begin, self.prompt.resident_blocks), self._pending.stop)
        else:
            self._pending = range(self._pending.start, min(plan.end, self.hit_end))
        return True

    def claim(self, end: int) -> int:
        """Claims blocks before `end` for computing; returns the first block that is not the engine's."""
        if self.search is not None and self.state not in {LoadState.FINISHED, LoadState.ENDED}:
            end = min(end, (self.plan or self.search).compute_before)
            if self.in_flight:
                end = min(end, self.in_flight.start)
        for block in (*self._untaken, *self.ready):
            if self.front <= block < end:
                end = block
        self.front = max(self.front, end)
        return self.front

    def finish(self) -> None:
        """Ends reading, for whatever reason."""
        if self.state in {LoadState.SEARCHING, LoadState.FOUND, LoadState.READING}:
            self.state = LoadState.FINISHED
        self.in_flight = self._pending = range(0)
        self.layers_lost |= self.layered is not None and not self.layers_complete

    def take(self, now_ms: float) -> list[int]:
        """Returns the blocks that arrived since the last call; they are `ready` now. Ends a finished load."""
        taken, self._untaken = self._untaken, []
        self.ready.update(taken)
        if self.state is LoadState.FINISHED:
            self._close(self._natural_end(), now_ms)
        return taken

    def cancel(self, end: LoadEnd, now_ms: float) -> range:
        """Ends the load: nothing arrives from now on. Returns the blocks in flight, which may be written until `arrived`."""
        if self.state is LoadState.ENDED:
            return range(0)
        self._pending = range(0)
        self.layers_lost = True
        self._close(end, now_ms)
        return self.in_flight

    def pass_ready(self, block: int) -> int:
        """Moves the computed front, which is at `block`, over the ready blocks. Returns the first block that is not ready."""
        while block in self.ready:
            self.ready.remove(block)
            self.used_blocks += 1
            self.shared_blocks += block in self.shared
            block += 1
        return block

    def cut(self, block: int) -> None:
        """Drops the ready blocks from `block` on, for which the table has no room."""
        self.ready = {ready for ready in self.ready if ready < block}

    def may_compute_behind(self, computed_tokens: int) -> bool:
        """Returns whether the computed front is directly before the blocks that arrive by layers, and their first layer has
        arrived.
        """
        if self.layered is None or self.layers_lost or not self.running:
            return False
        return computed_tokens == self.layered.start * self.prompt.block_tokens and (self.layers > 0 or self.layers_complete)

    def has_layer(self, layer: int | None) -> bool:
        """Returns whether a layer of all blocks of `layered` has arrived; with None, whether all of them are complete
        and verified.
        """
        return self.layers_complete or (layer is not None and self.layers > layer)

    def _stop_reading(self) -> None:
        """For good: a later plan would not know which blocks were read already."""
        self._stopped, self._pending = True, range(0)

    def _close(self, end: LoadEnd, now_ms: float) -> None:
        self.state, self.end, self.ended_ms = LoadState.ENDED, end, now_ms

    def _natural_end(self) -> LoadEnd:
        if self._lent:
            return LoadEnd.LENT
        if self.hit_end == self.prompt.resident_blocks:
            return LoadEnd.NOT_FOUND
        if self.plan is None:
            return LoadEnd.DECLINED
        return LoadEnd.MET if self._met else LoadEnd.COMPLETE
