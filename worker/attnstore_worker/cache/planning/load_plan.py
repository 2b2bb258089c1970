"""What is decided about a prompt whose pages lie in a lower tier: the seam between the manager, which acts, and a planner.

Owns: the facts that a planner is given, the plans that it returns, and `FetchAll` and `RecomputeAll`, the planners that need no
measurement.
Invariant: a plan is advice about time. Whatever it says, and whatever becomes of its transfers, the tokens are the same.

Blocks are numbered from the start of the prompt. The first `resident_blocks` are in the pool already; the last token is never
taken from a cache, so only `usable_blocks` can be loaded.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, replace
from typing import Final, Protocol

AHEAD_BLOCKS: Final = 8
"""Pages in one read of a prefetch: what is lost, and read again, when the sequence's turn comes during one."""


class Order(enum.Enum):
    """What of a load is fetched first: the first batch, the last one, or of all blocks the first layer.

    LAYERS is one read. The chunk behind the blocks is computed as they come, each layer as soon as that layer of all of them is
    there, where nobody has anything else to compute and the transport sends by layers; else the blocks are waited for.
    """

    FRONT_TO_BACK = "front_to_back"
    BACK_TO_FRONT = "back_to_front"
    LAYERS = "layers"


@dataclass(frozen=True, slots=True)
class Prompt:
    """What is known before any lower tier was asked. `number` tells admissions apart."""

    number: int
    tokens: int
    block_tokens: int
    page_bytes: int
    layers: int
    resident_blocks: int
    usable_blocks: int


@dataclass(frozen=True, slots=True)
class SearchPlan:
    """Ask the lower tiers, for at most `deadline_ms`, and compute the blocks before `compute_before` meanwhile."""

    deadline_ms: float
    compute_before: int = 0


@dataclass(frozen=True, slots=True)
class Found:
    """The lower tiers have blocks `[prompt.resident_blocks, hit_end)`. The engine has computed, or is computing, those before
    `front`. The search took `search_ms`.
    """

    prompt: Prompt
    hit_end: int
    front: int
    search_ms: float


@dataclass(frozen=True, slots=True)
class LoadPlan:
    """Fetch blocks `[begin, end)`, `batch_blocks` in one read, until `deadline_ms` after the load began; the rest is computed, and
    of it the blocks before `compute_before` meanwhile, towards the pages. Where both meet, what is not fetched yet stays where it
    is (Cake: Jin et al., "Compute or Load KV Cache? Why Not Both?", ICML 2025).

    Blocks before `Found.front` and behind `Found.hit_end` are ignored.
    """

    begin: int
    end: int
    batch_blocks: int
    deadline_ms: float
    order: Order = Order.FRONT_TO_BACK
    compute_before: int = 0


@dataclass(frozen=True, slots=True)
class LoadProgress:
    """How far a load is, `elapsed_ms` after it began. `arrived_blocks` came whole and verified; `front` as in `Found`. Blocks
    `in_flight` are being read, for `in_flight_ms` by now; those `pending` will be, if the plan stays as it is.
    """

    found: Found
    plan: LoadPlan
    arrived_blocks: int
    front: int
    pending: range
    in_flight: range
    in_flight_ms: float
    elapsed_ms: float


class Planner(Protocol):
    """Decides for every prompt. Called from several threads; must not block and must not raise."""

    def search(self, prompt: Prompt) -> SearchPlan | None:
        """Before the lower tiers are asked. None: compute everything that is not resident."""
        ...

    def load(self, found: Found) -> LoadPlan | None:
        """When their answer is there and holds at least one block. None: compute instead."""
        ...

    def replan(self, progress: LoadProgress) -> LoadPlan | None:
        """Asked again and again during a load, at least after each read. None abandons what has not arrived.

        A new plan keeps the order. It cannot take back what was asked for, nor what was computed.
        """
        ...

    def prefetches(self, prompt: Prompt) -> bool:
        """Whether a waiting prompt's pages are fetched before its turn. That computes nothing and costs the link's time only."""
        ...


class FetchAll:
    """Fetches every hit in one read and computes nothing meanwhile. Needs no measurement, and can be slower than recomputing."""

    def __init__(self, deadline_ms: float) -> None:
        self._deadline_ms = deadline_ms

    def search(self, prompt: Prompt) -> SearchPlan:
        """Always."""
        del prompt
        return SearchPlan(self._deadline_ms)

    def load(self, found: Found) -> LoadPlan:
        """All hits at once."""
        begin = found.prompt.resident_blocks
        return LoadPlan(begin, found.hit_end, found.hit_end - begin, self._deadline_ms)

    def replan(self, progress: LoadProgress) -> LoadPlan:
        """The same until the deadline."""
        return progress.plan

    def prefetches(self, prompt: Prompt) -> bool:
        """Always."""
        del prompt
        return True


class FetchAhead(FetchAll):
    """Fetches every hit in small reads from the front: for a sequence that waits, whose turn may come at any time."""

    def load(self, found: Found) -> LoadPlan:
        """All hits, `AHEAD_BLOCKS` at a time."""
        return replace(super().load(found), batch_blocks=AHEAD_BLOCKS)


class RecomputeAll:
    """Asks nobody for pages."""

    def search(self, prompt: Prompt) -> None:
        """Never."""
        del prompt

    def load(self, found: Found) -> None:
        """Nothing."""
        del found

    def replan(self, progress: LoadProgress) -> None:
        """Nothing."""
        del progress

    def prefetches(self, prompt: Prompt) -> bool:
        """Never."""
        del prompt
        return False
