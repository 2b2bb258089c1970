"""Bugs planted in each transition of a load, one a class; the random histories of `test_load_model.py` find every one.

Each method's docstring names the state and the command of the table in `load.py`, and what goes wrong.
"""

from __future__ import annotations

from collections.abc import Collection

import pytest
from hypothesis import Phase

from attnstore_worker.cache.moving.load import Load, LoadEnd, LoadPlan, LoadState
from tests.worker.cache.moving.test_load_model import BLOCKS, run


class EmptyAnswerIsAnAnswer(Load):
    def found(self, hits: int, now_ms: float) -> None:
        """SEARCHING, found(0): plans a load of nothing."""
        super().found(hits, now_ms)
        if self.state is LoadState.FINISHED:
            self.state = LoadState.FOUND


class OneHitTooMany(Load):
    def found(self, hits: int, now_ms: float) -> None:
        """SEARCHING, found(n): one block more than there is."""
        super().found(hits + 1, now_ms)


class FoundTwice(Load):
    def found(self, hits: int, now_ms: float) -> None:
        """Other states, found: begins anew."""
        self.state = LoadState.SEARCHING
        super().found(hits, now_ms)


class LentLeavesTheClaimed(Load):
    def lent(self, hits: int, now_ms: float) -> bool:
        """SEARCHING, lent: blocks that the engine computes arrive too."""
        self.front = self.prompt.resident_blocks
        return super().lent(hits, now_ms)


class LentGoesOn(Load):
    def lent(self, hits: int, now_ms: float) -> bool:
        """SEARCHING, lent: not finished."""
        lent = super().lent(hits, now_ms)
        self.state = LoadState.FOUND if lent else self.state
        return lent


class LentAfterACancel(Load):
    def lent(self, hits: int, now_ms: float) -> bool:
        """ENDED, lent: the pages would never be released."""
        return super().lent(hits, now_ms) or self.state is LoadState.ENDED


class BeginsBeyondTheHits(Load):
    def begin(self, plan: LoadPlan | None, now_ms: float) -> None:
        """FOUND, begin(plan): reads what the tiers do not have."""
        super().begin(plan, now_ms)
        if plan is not None and self.state is LoadState.READING:
            self._pending = range(self._pending.start, plan.end)


class BeginsBeforeTheResidents(Load):
    def begin(self, plan: LoadPlan | None, now_ms: float) -> None:
        """FOUND, begin(plan): reads what is here, into sealed blocks."""
        super().begin(plan, now_ms)
        if plan is not None and self.state is LoadState.READING:
            self._pending = range(plan.begin, self._pending.stop)


class DeclinedGoesOn(Load):
    def begin(self, plan: LoadPlan | None, now_ms: float) -> None:
        """FOUND, begin(None): stays there for ever."""
        if plan is not None:
            super().begin(plan, now_ms)


class BeginsAfterACancel(Load):
    def begin(self, plan: LoadPlan | None, now_ms: float) -> None:
        """ENDED, begin(plan): reads into blocks that are others' by now."""
        if self.state is LoadState.ENDED:
            self.state = LoadState.FOUND
        super().begin(plan, now_ms)


class ReadsTheClaimed(Load):
    def next_batch(self, now_ms: float, blocks_max: int) -> range:
        """READING, next_batch: a block is computed and read at once."""
        front, self.front = self.front, 0
        batch = super().next_batch(now_ms, blocks_max)
        self.front = front
        return batch


class ReadsInOneGo(Load):
    def next_batch(self, now_ms: float, blocks_max: int) -> range:
        """READING, next_batch: more than one read may be."""
        return super().next_batch(now_ms, blocks_max + 1)


class ReadsTheSameAgain(Load):
    def next_batch(self, now_ms: float, blocks_max: int) -> range:
        """READING, next_batch: what is read stays pending."""
        pending = self._pending
        batch = super().next_batch(now_ms, blocks_max)
        self._pending = pending
        return batch


class NeverFinishes(Load):
    def next_batch(self, now_ms: float, blocks_max: int) -> range:
        """READING, next_batch without a block: stays there."""
        state, batch = self.state, super().next_batch(now_ms, blocks_max)
        self.state = state
        return batch


class NeverMeets(Load):
    def next_batch(self, now_ms: float, blocks_max: int) -> range:
        """READING, next_batch: forgets that computing came first."""
        batch = super().next_batch(now_ms, blocks_max)
        self._met = False
        return batch


class MissesArrive(Load):
    def arrived(self, hits: Collection[int], bytes_read: int, *, shared: bool = False) -> None:  # noqa: ARG002
        """READING, arrived: pages that are not whole are used."""
        super().arrived(self.in_flight, bytes_read, shared=shared)


class ArrivedStaysInFlight(Load):
    def arrived(self, hits: Collection[int], bytes_read: int, *, shared: bool = False) -> None:
        """READING, arrived: the read is never over."""
        in_flight = self.in_flight
        super().arrived(hits, bytes_read, shared=shared)
        self.in_flight = in_flight


class ReadsOnAfterAFailure(Load):
    def arrived(self, hits: Collection[int], bytes_read: int, *, shared: bool = False) -> None:
        """READING, arrived without a hit: the rest is still waited for."""
        pending = self._pending
        super().arrived(hits, bytes_read, shared=shared)
        self._pending, self._stopped = pending if self.state is LoadState.READING else range(0), False


class ArrivesAfterACancel(Load):
    def arrived(self, hits: Collection[int], bytes_read: int, *, shared: bool = False) -> None:
        """ENDED, arrived: bytes in blocks that the table has no more."""
        super().arrived(hits, bytes_read, shared=shared)
        if self.state is LoadState.ENDED:
            self._untaken += hits


class PlansMoreAfterAFailure(Load):
    def replan(self, plan: LoadPlan | None) -> bool:
        """READING, replan(plan): a tier that failed is asked again."""
        self._stopped = False
        return super().replan(plan)


class ReplansTheOrder(Load):
    def replan(self, plan: LoadPlan | None) -> bool:
        """READING, replan(plan): turns round half way."""
        kept = super().replan(plan)
        if plan is not None and self.state is LoadState.READING:
            self.plan = plan
        return kept


class ReplansBeyondTheHits(Load):
    def replan(self, plan: LoadPlan | None) -> bool:
        """READING, replan(plan): reads what the tiers do not have."""
        self.hit_end, hit_end = BLOCKS, self.hit_end
        kept = super().replan(plan)
        self.hit_end = hit_end
        return kept


class NeverGivesUp(Load):
    def replan(self, plan: LoadPlan | None) -> bool:
        """READING, replan(None): reads on."""
        return super().replan(plan if plan is not None else self.plan)


class GivesUpSilently(Load):
    def replan(self, plan: LoadPlan | None) -> bool:
        """READING, replan(None): the engine goes on waiting."""
        super().replan(plan)
        return True


class ClaimsWhatIsInFlight(Load):
    def claim(self, end: int) -> int:
        """READING, claim: a block is computed and read at once."""
        in_flight, self.in_flight = self.in_flight, range(0)
        front = super().claim(end)
        self.in_flight = in_flight
        return front


class ClaimsWhatArrived(Load):
    def claim(self, end: int) -> int:
        """Any state, claim: computes over a verified page that was not taken."""
        untaken, self._untaken = self._untaken, []
        front = super().claim(end)
        self._untaken = untaken
        return front


class ClaimsWhatIsReady(Load):
    def claim(self, end: int) -> int:
        """Any state, claim: computes over a verified page."""
        ready, self.ready = self.ready, set()
        front = super().claim(end)
        self.ready = ready
        return front


class ClaimsBeyondThePlan(Load):
    def claim(self, end: int) -> int:
        """SEARCHING, FOUND, READING, claim: leaves nothing to fetch."""
        state, in_flight = self.state, self.in_flight
        self.state = LoadState.FINISHED
        front = super().claim(min(end, in_flight.start) if in_flight else end)
        self.state = state
        return front


class ClaimsAreTakenBack(Load):
    def claim(self, end: int) -> int:
        """Any state, claim: a smaller one gives blocks to the reads."""
        self.front = self.prompt.resident_blocks
        return super().claim(end)


class FinishGoesOn(Load):
    def finish(self) -> None:
        """SEARCHING, FOUND, READING, finish: the engine waits for nobody."""


class FinishForgetsTheRead(Load):
    def finish(self) -> None:
        """READING, finish: the blocks of the read that raised are never given free."""
        in_flight = self.in_flight
        super().finish()
        self.in_flight = in_flight


class TakesTwice(Load):
    def take(self, now_ms: float) -> list[int]:
        """READING, take: a block is sealed twice."""
        taken = super().take(now_ms)
        self._untaken = list(taken)
        return taken


class TakenIsNotReady(Load):
    def take(self, now_ms: float) -> list[int]:
        """READING, take: what arrived is computed."""
        taken = super().take(now_ms)
        self.ready = set()
        return taken


class TakeNeverEnds(Load):
    def take(self, now_ms: float) -> list[int]:
        """FINISHED, take: observers are never told."""
        state, taken = self.state, super().take(now_ms)
        self.state = state
        return taken


class CancelReturnsNothing(Load):
    def cancel(self, end: LoadEnd, now_ms: float) -> range:
        """READING, cancel: blocks that are written are given to others."""
        super().cancel(end, now_ms)
        return range(0)


class CancelGoesOn(Load):
    def cancel(self, end: LoadEnd, now_ms: float) -> range:
        """READING, cancel: the next batch is read."""
        state, in_flight = self.state, super().cancel(end, now_ms)
        self.state = state
        return in_flight


class CancelKeepsItsPlan(Load):
    def cancel(self, end: LoadEnd, now_ms: float) -> range:
        """READING, cancel: blocks stay pending."""
        pending, in_flight = self._pending, super().cancel(end, now_ms)
        self._pending = pending
        return in_flight


class CancelledTwice(Load):
    def cancel(self, end: LoadEnd, now_ms: float) -> range:
        """ENDED, cancel: another end."""
        if self.state is LoadState.ENDED:
            self.state = LoadState.FINISHED
        return super().cancel(end, now_ms)


class PassesOneAtATime(Load):
    def pass_ready(self, block: int) -> int:
        """pass_ready: computes what is ready."""
        return super().pass_ready(block) if block not in self.ready else super().pass_ready(block) - 1


MUTANTS = [mutant for mutant in Load.__subclasses__() if mutant.__module__ == __name__]


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.__name__)
def test_a_planted_bug_in_any_transition_is_found(mutant: type[Load]) -> None:
    with pytest.raises((AssertionError, IndexError, ExceptionGroup)):
        run(mutant, steps=12, max_examples=3000, phases=[Phase.generate], derandomize=True, report_multiple_bugs=False)
