"""The planners without measurements: fetch everything, fetch ahead in small reads, fetch nothing.

Owns: `FetchAll`, `FetchAhead` and `RecomputeAll`. Invariant: their answers depend on the load alone, never on the link.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Final

from attnstore_worker.cache.moving.load import Load, LoadPlan, Prompt, SearchPlan

AHEAD_BLOCKS: Final = 8
"""Pages in one read of a prefetch; they are read again if the sequence's turn comes during the read."""


class FetchAll:
    """Fetches every hit in one read and computes nothing meanwhile. Can be slower than recomputing."""

    def __init__(self, deadline_ms: float) -> None:
        self._deadline_ms = deadline_ms

    def search(self, prompt: Prompt) -> SearchPlan:
        """Always searches."""
        del prompt
        return SearchPlan(self._deadline_ms)

    def plan(self, load: Load) -> LoadPlan:
        """Fetches all hits at once."""
        begin = load.prompt.resident_blocks
        return LoadPlan(begin, load.hit_end, load.hit_end - begin, self._deadline_ms)

    def replan(self, load: Load, now_ms: float) -> LoadPlan | None:
        """Keeps the plan until the deadline."""
        del now_ms
        return load.plan

    def prefetches(self, prompt: Prompt) -> bool:
        """Always prefetches."""
        del prompt
        return True


class FetchAhead(FetchAll):
    """Fetches every hit in small reads from the front: for a waiting sequence, whose turn may come at any time."""

    def plan(self, load: Load) -> LoadPlan:
        """Fetches all hits, `AHEAD_BLOCKS` at a time."""
        return replace(super().plan(load), batch_blocks=AHEAD_BLOCKS)


class RecomputeAll:
    """Never loads pages."""

    def search(self, prompt: Prompt) -> None:
        """Never searches."""
        del prompt

    def plan(self, load: Load) -> None:
        """Never loads."""
        del load

    def replan(self, load: Load, now_ms: float) -> None:
        """Never loads."""
        del load, now_ms

    def prefetches(self, prompt: Prompt) -> bool:
        """Never prefetches."""
        del prompt
        return False
