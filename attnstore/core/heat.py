"""Hot segments: those used so often that a second copy is worth its memory.

Owns: the counts of uses in the current window. Invariants: memory is bounded, whatever is requested, and shared among tenants. A
segment stays hot while it is used at least a quarter as often as it took to become hot, because with a second copy its node sees
only half of the uses.
"""

from __future__ import annotations

from collections.abc import Sequence

from attnstore.core.fair_share import FairShares
from attnstore.core.hashing import segment_key
from attnstore.limits import HEAT_SEGMENTS_MAX, HEAT_WINDOW_MS, HOT_SEGMENTS_MAX, SEGMENT_BLOCKS

_KEEP_SHARE = 4
_Segment = tuple[str, bytes]
"""Tenant and segment key: segments of two tenants with one key hold different pages."""


class SegmentHeat:
    """`hot_uses` uses within `HEAT_WINDOW_MS` make a segment hot; with 0 no segment becomes hot. Shared by `tenants` tenants."""

    def __init__(self, hot_uses: int, tenants: int = 1) -> None:
        self._hot_uses = hot_uses
        self._tenants = tenants
        self._uses: dict[_Segment, int] = {}
        self._counted = self._shares(HEAT_SEGMENTS_MAX)
        self._kept: frozenset[_Segment] = frozenset()
        self._window_ends_ms = float("-inf")

    def used(self, tenant: str, prefixes: Sequence[Sequence[bytes]]) -> None:
        """Counts one use of each segment of the given prefixes, which are runs of consecutive blocks that a caller found and will
        use.
        """
        if self._hot_uses:
            for segment in {(tenant, key) for prefix in prefixes for key in _keys(prefix)}:
                if segment in self._uses:
                    self._uses[segment] += 1
                elif self._counted.fits(tenant):
                    self._counted.take(tenant)
                    self._uses[segment] = 1

    def hot(self, now_ms: float) -> frozenset[bytes]:
        """Returns the keys of the hot segments, at most `HOT_SEGMENTS_MAX`: for each tenant those that are used most."""
        uses = self._uses
        often = self._kept.union(segment for segment, count in uses.items() if count >= self._hot_uses)
        places = self._shares(HOT_SEGMENTS_MAX)
        hot = []
        for segment in sorted(often, key=lambda segment: (-uses.get(segment, 0), segment)):
            if places.fits(segment[0]):
                places.take(segment[0])
                hot.append(segment)
        if now_ms >= self._window_ends_ms:
            self._kept = frozenset(segment for segment in hot if uses.get(segment, 0) * _KEEP_SHARE >= self._hot_uses)
            uses.clear()
            self._counted = self._shares(HEAT_SEGMENTS_MAX)
            self._window_ends_ms = now_ms + HEAT_WINDOW_MS
        return frozenset(key for _, key in hot)

    def _shares(self, limit: int) -> FairShares:
        return FairShares(limit, "segments", "use them less often", tenants=self._tenants)


def _keys(prefix: Sequence[bytes]) -> list[bytes]:
    """Returns the segment keys of a run. Steps from segment to segment by the index that each block hash contains."""
    keys = []
    at = 0
    while at < len(prefix):
        keys.append(segment_key(prefix[at]))
        at += max(1, SEGMENT_BLOCKS - prefix[at][0])
    return keys
