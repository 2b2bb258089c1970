"""Whose turn it is to compute: a bounded queue for the node's cores, fair between tenants, that lets callers ride together.

Owns: `FairTurns`. Invariants: one computation runs at a time; a caller waits no longer than its deadline for it to begin; the
tenant that has used the least goes first, so that no tenant can keep another waiting for more than the computation that runs;
whatever a caller leaves with, its place and its turn do not stay behind.

Nobody hands work to another thread while there is no queue: the caller computes on its own thread, which spares the two wake-ups
that would cost as much as a small computation. Where callers wait, the first of them computes for all that can be answered together
(flat combining, Hendler et al. 2010). Fairness is start-time fair queueing (Goyal et al. 1996): a tenant's virtual time grows by
the cost of what it was given, and one that was idle starts at the time of those who were not.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Final, Generic, TypeVar

from attnstore.clock import Clock, Deadline
from attnstore.core.fair_share import FairShares
from attnstore.errors import DeadlineExceeded, Overloaded

J = TypeVar("J")
R = TypeVar("R")

_NEW_SAMPLE_WEIGHT: Final = 0.2


@dataclass(slots=True, eq=False)
class _Caller(Generic[J, R]):
    job: J
    kind: Hashable
    tenant: str
    cost: float
    woken: threading.Event = field(default_factory=threading.Event)
    leads: list[_Caller[J, R]] | None = None  # the batch that this caller is to compute, itself first
    result: R | None = None
    error: BaseException | None = None


class FairTurns(Generic[J, R]):
    """`run(jobs)` gives one result for each; jobs with equal `kind(job)` may be run together, at most `together_max`."""

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
        """Callers that wait for their turn."""
        return self._places.used

    def take(self, job: J, *, tenant: str, cost: float, deadline: Deadline) -> R:
        """The job's result; `cost` in any unit that grows with the time it takes. Blocks.

        Raises `Overloaded` at once where the queue is full or, by what computing has cost so far, could not be done by the
        deadline; `DeadlineExceeded` where the turn did not come in time; and what `run` raises.
        """
        caller = _Caller[J, R](job, self._kind(job), tenant, cost)
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
        if caller.tenant not in self._waiting:
            self._waiting[caller.tenant] = deque()
            self._virtual[caller.tenant] = max(self._virtual.get(caller.tenant, 0.0), self._now)
        self._waiting[caller.tenant].append(caller)

    def _cost_ahead(self, caller: _Caller[J, R]) -> float:
        """What is computed until the caller's is done: its tenant's, and of each other tenant's no more than that."""
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
        caller.woken.wait()  # it rides in a computation that runs, which ends

    def _leave(self, caller: _Caller[J, R]) -> None:
        """Takes a caller out that waits no longer. The turn, if it has it by now, goes to those who were to ride with it."""
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
        """Gives the turn to the caller whose tenant has used the least, and to whoever can ride with it."""
        if not self._waiting:
            self._busy = False
            # Where nobody waits everybody starts anew.
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
        """Has the first of these callers compute for all of them; the next ones in the queue where there are none."""
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
