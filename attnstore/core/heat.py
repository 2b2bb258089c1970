"""Which segments are hot: used so often that a second copy of them is worth its memory.

Owns: the counts of uses in the current window. Invariants: memory is bounded whatever is asked for; a segment stays hot while it is
used at least a quarter as often as it took to become hot, because with a second copy its node sees half of the uses.
"""

from __future__ import annotations

from collections.abc import Sequence

from attnstore.core.hashing import segment_key
from attnstore.limits import HEAT_SEGMENTS_MAX, HEAT_WINDOW_MS, HOT_SEGMENTS_MAX, SEGMENT_BLOCKS

_KEEP_SHARE = 4


class SegmentHeat:
    """`hot_uses` uses within `HEAT_WINDOW_MS` make a segment hot; with 0 none ever is."""

    def __init__(self, hot_uses: int) -> None:
        self._hot_uses = hot_uses
        self._uses: dict[bytes, int] = {}
        self._kept: frozenset[bytes] = frozenset()
        self._window_ends_ms = float("-inf")

    def used(self, prefixes: Sequence[Sequence[bytes]]) -> None:
        """One caller found these pages, runs of consecutive blocks, and will use them: one use of each of their segments."""
        if self._hot_uses:
            for key in {key for prefix in prefixes for key in _keys(prefix)}:
                if key in self._uses or len(self._uses) < HEAT_SEGMENTS_MAX:
                    self._uses[key] = self._uses.get(key, 0) + 1

    def hot(self, now_ms: float) -> frozenset[bytes]:
        """The keys of the hot segments, at most `HOT_SEGMENTS_MAX`: those that are used most."""
        uses = self._uses
        often = self._kept.union(key for key, count in uses.items() if count >= self._hot_uses)
        hot = sorted(often, key=lambda key: (-uses.get(key, 0), key))[:HOT_SEGMENTS_MAX]
        if now_ms >= self._window_ends_ms:
            self._kept = frozenset(key for key in hot if uses.get(key, 0) * _KEEP_SHARE >= self._hot_uses)
            uses.clear()
            self._window_ends_ms = now_ms + HEAT_WINDOW_MS
        return frozenset(hot)


def _keys(prefix: Sequence[bytes]) -> list[bytes]:
    """The segments of a run, found by stepping from one to the next: a block says at which place of its segment it is."""
    keys = []
    at = 0
    while at < len(prefix):
        keys.append(segment_key(prefix[at]))
        at += max(1, SEGMENT_BLOCKS - prefix[at][0])
    return keys
