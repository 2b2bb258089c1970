"""A match of many pages, executed on the page table in slices.

Owns: the progress of the match, and the lease that grows with it. Invariants: if a lease is requested, a page that counts as a hit
is leased from the moment it is found; if not, the pages count as used from tail to head, as with a single command.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from attnstore.core.page import Page, PageState
from attnstore.core.page_table import MatchOutcome, PageTable
from attnstore.limits import MATCH_PAGES_MAX
from attnstore.types import Space

_Run = tuple[int, int, Sequence[bytes]]
"""A run of hashes: index of its prefix, number of hashes of the prefix before it, and the hashes."""


class SlicedMatch:
    """The owner of the table calls `advance` until it returns True; then `outcome` is available."""

    def __init__(self, table: PageTable, space: Space, prefixes: Sequence[Sequence[bytes]], lease_ms: int) -> None:
        self._table = table
        self._space = space
        self._prefixes = prefixes
        self._lease_ms = lease_ms
        self._granted_ms = 0
        self._hits = [0] * len(prefixes)
        self._to_find = _batches(prefixes)
        self._to_touch: list[list[Page]] = []
        self.lease_id: bytes | None = None

    def advance(self, now_ms: float) -> bool:
        """Matches up to `MATCH_PAGES_MAX` pages. Returns True if that was the last slice. Raises as `PageTable.match` does."""
        batch = next(self._to_find, None)
        if batch is not None:
            self._find(batch, now_ms)
        elif self._to_touch:
            self._touch(self._to_touch.pop())
        return batch is None and not self._to_touch

    def _touch(self, pages: Sequence[Page]) -> None:
        """The pages of a slice count as used, but for those that are gone meanwhile."""
        sealed = [page for page in reversed(pages) if page.state is PageState.SEALED]
        if sealed:
            self._table.pins.touch(sealed[0].namespace, sealed)

    def outcome(self) -> MatchOutcome:
        """Returns the result."""
        return MatchOutcome(tuple(self._hits), self.lease_id, self._granted_ms)

    def _find(self, batch: list[_Run], now_ms: float) -> None:
        asked = [run for run in batch if self._hits[run[0]] == run[1]]
        runs = [run for _, _, run in asked]
        if self._lease_ms == 0:
            hits, pages = self._table.find(self._space, runs)
            self._to_touch.append(pages)
        else:
            found = self._table.match(self._space, runs, self._lease_ms, now_ms, self.lease_id)
            hits, self.lease_id = found.hits, found.lease_id
            self._granted_ms = found.lease_ms or self._granted_ms
        for (prefix, _, _), more in zip(asked, hits, strict=True):
            self._hits[prefix] += more
        self._table.missed(sum(len(run) for _, _, run in batch) - sum(map(len, runs)))


def _batches(prefixes: Sequence[Sequence[bytes]]) -> Iterator[list[_Run]]:
    """Yields the prefixes in batches of at most `MATCH_PAGES_MAX` runs with at most `MATCH_PAGES_MAX` hashes together."""
    batch: list[_Run] = []
    room = MATCH_PAGES_MAX
    for index, prefix in enumerate(prefixes):
        begin = 0
        while True:
            run = prefix[begin : begin + room]
            batch.append((index, begin, run))
            begin += len(run)
            room -= max(1, len(run))
            if room <= 0:
                yield batch
                batch, room = [], MATCH_PAGES_MAX
            if begin == len(prefix):
                break
    if batch:
        yield batch
