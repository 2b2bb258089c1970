"""A bounded queue for the node's cores, fair between tenants, that batches callers.

Owns: `FairTurns`. Invariants: one computation runs at a time; it begins before the caller's deadline or the caller gives up; the
tenant with the least use goes first, so a tenant delays another by at most the running computation; a caller that leaves with an
error leaves neither its place nor its turn behind.

Without a queue the caller computes on its own thread, which saves two thread wake-ups that would cost as much as a small
computation. If callers wait, the first of them computes for all that can be answered together (flat combining, Hendler et al.
2010). Fairness is start-time fair queueing (Goyal et al. 1996): a tenant's virtual time grows by the cost of its computations, and
a tenant that was idle starts at the virtual time of the busy ones.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Final, Generic, TypeVar

from attnstore.clock import Clock, Deadline
from attnstore.core.fair_share import FairShares
from attnstore.errors import DeadlineExceeded, Overloaded

J = TypeVar("J")
R = TypeVar("R")

_NEW_SAMPLE_WEIGHT: Final = 0.2
_NEVER_WOKEN: Final = threading.Event()


@dataclass(slots=True, eq=False)
class _Caller(Generic[J, R]):
    """`kind` and `woken` are there once the caller waits: most callers find the cores free."""

    job: J
    tenant: str
    cost: float
    kind: Hashable = None
    woken: threading.Event = _NEVER_WOKEN
    leads: list[_Caller[J, R]] | None = None  # the batch that this caller must compute, its own job first
    result: R | None = None
    error: BaseException | None = None


class FairTurns(Generic[J, R]):
    """`run(jobs)` returns one result per job; jobs with equal `kind(job)` may be run together, at most `together_max`."""

    def __init__(
        self,
        run: Callable[[Sequence[J]], Sequence[R]],
        kind: Callable[[J], Hashable],
        clock: Clock,
        *,
        waiting_max: int,
        together_max: int,
        tenants: int = 1,
    ) -> None:
        self._run = run
        self._kind = kind
        self._clock = clock
        self._places = FairShares(waiting_max, "queries that wait for its cores", "fetch the pages, or try later", tenants=tenants)
        self._together_max = together_max
        self._lock = threading.Lock()
        self._busy = False
        self._waiting: dict[str, deque[_Caller[J, R]]] = {}  # no queue is empty
        self._virtual: dict[str, float] = {}
        self._now = 0.0
        self._cost_per_ms: float | None = None

    @property
    def waiting(self) -> int:
        """The number of callers that wait for their turn."""
        return self._places.used

    def take(self, job: J, *, tenant: str, cost: float, deadline: Deadline) -> R:
        """Returns the job's result. Blocks. `cost` has any unit that is proportional to time.

        Raises `Overloaded` at once if the queue is full or if, by the measured cost rate, the deadline cannot be met. Raises
        `DeadlineExceeded` if the turn did not come in time, and what `run` raises.
        """
        caller = _Caller[J, R](job, tenant, cost)
        with self._lock:
            if self._busy:
                self._enqueue(caller, deadline.left_ms())
            else:
                self._busy = True
                self._charge(caller)
                caller.leads = [caller]
        try:
            if caller.leads is None:
                self._wait(caller, deadline)
            if caller.leads is not None:
                self._lead(caller.leads)
        except BaseException:
            self._leave(caller)
            raise
        if caller.error is not None:
            raise caller.error
        assert caller.result is not None
        return caller.result

    def _enqueue(self, caller: _Caller[J, R], left_ms: float) -> None:
        self._places.require(caller.tenant)
        ahead_ms = self._cost_ahead(caller) / self._cost_per_ms if self._cost_per_ms else 0.0
        if ahead_ms > left_ms:
            raise Overloaded(
                f"this node's cores are busy for {ahead_ms:.0f} ms and the query allows {left_ms:.0f}; fetch the pages"
            )
        self._places.take(caller.tenant)
        caller.kind, caller.woken = self._kind(caller.job), threading.Event()
        if caller.tenant not in self._waiting:
            self._waiting[caller.tenant] = deque()
            self._virtual[caller.tenant] = max(self._virtual.get(caller.tenant, 0.0), self._now)
        self._waiting[caller.tenant].append(caller)

    def _cost_ahead(self, caller: _Caller[J, R]) -> float:
        """Returns the cost computed before the caller's job is done: all of its own tenant's, and at most as much of each other
        tenant's.
        """
        waiting = {tenant: sum(other.cost for other in queue) for tenant, queue in self._waiting.items()}
        own = waiting.pop(caller.tenant, 0.0) + caller.cost
        return own + sum(min(own, cost) for cost in waiting.values())

    def _wait(self, caller: _Caller[J, R], deadline: Deadline) -> None:
        try:
            left_ms = deadline.left_ms()
        except DeadlineExceeded:
            left_ms = 0.0
        if caller.woken.wait(left_ms / 1000):
            return
        with self._lock:
            if caller.woken.is_set():
                return
            if caller in self._waiting.get(caller.tenant, ()):
                raise DeadlineExceeded("this node's cores were busy with others' queries until the deadline")
        caller.woken.wait()  # its job is part of a running computation, which ends

    def _leave(self, caller: _Caller[J, R]) -> None:
        """Removes a caller that no longer waits. If it has got the turn meanwhile, the callers of its batch get it."""
        with self._lock:
            if caller in self._waiting.get(caller.tenant, ()):
                self._dequeue(caller)
            elif caller.leads is not None:
                self._give_turn(caller.leads[1:])

    def _lead(self, batch: list[_Caller[J, R]]) -> None:
        began_ms = self._clock.now_ms()
        try:
            for caller, result in zip(batch, self._run([caller.job for caller in batch]), strict=True):
                caller.result = result
        except BaseException as error:
            for caller in batch:
                caller.error = error
        took_ms = max(self._clock.now_ms() - began_ms, 1e-3)
        with self._lock:
            rate = sum(caller.cost for caller in batch) / took_ms
            known = self._cost_per_ms
            self._cost_per_ms = rate if known is None else known + _NEW_SAMPLE_WEIGHT * (rate - known)
            batch[0].leads = None
            self._pass_on()
        for caller in batch[1:]:
            caller.woken.set()

    def _pass_on(self) -> None:
        """Gives the turn to the caller whose tenant has the least use, and to the callers that can be batched with it."""
        if not self._waiting:
            self._busy = False
            # With an empty queue all virtual times start anew.
            self._virtual.clear()
            self._now = 0.0
            return
        first = self._waiting[min(self._waiting, key=lambda tenant: self._virtual[tenant])][0]
        self._now = self._virtual[first.tenant]
        riders = [caller for queue in self._waiting.values() for caller in queue if caller is not first]
        batch = [first, *[caller for caller in riders if caller.kind == first.kind]][: self._together_max]
        for caller in batch:
            self._dequeue(caller)
            self._charge(caller)
        self._give_turn(batch)

    def _give_turn(self, batch: list[_Caller[J, R]]) -> None:
        """Makes the first of these callers compute for all of them. If there are none, takes the next from the queue."""
        if not batch:
            self._pass_on()
            return
        batch[0].leads = batch
        batch[0].woken.set()

    def _dequeue(self, caller: _Caller[J, R]) -> None:
        queue = self._waiting[caller.tenant]
        queue.remove(caller)
        if not queue:
            del self._waiting[caller.tenant]
        self._places.give_back(caller.tenant)

    def _charge(self, caller: _Caller[J, R]) -> None:
        self._virtual[caller.tenant] = max(self._virtual.get(caller.tenant, 0.0), self._now) + caller.cost
