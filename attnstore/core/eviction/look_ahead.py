"""Look-ahead eviction: items that waiting sequences will use are evicted last.

Owns: the announced uses of items, and the order among items that have one. All other items are in another policy, from which an
awaited item is withdrawn like a pinned one.
Invariant: an evictable item is either in the other policy (no sequence waits for it) or awaited (at least one does), never both.

The engine's queue tells about the future what no history can. For announced items this is the optimal rule (Belady, "A study of
replacement algorithms for a virtual-storage computer", 1966): evict items without a known use first, then the item whose next use
is farthest. CachedAttention (Gao et al., USENIX ATC 2024) calls it scheduler-aware eviction.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from heapq import heapify, heappop, heappush
from itertools import count

from attnstore.core.eviction.base import EvictionPolicy, Item
from attnstore.core.eviction.lru import LeastRecentlyUsed


class LookAhead(EvictionPolicy[Item]):
    """Evicts items that no sequence waits for, by `others` (default: least recently used), then the awaited item that is used last.

    O(1) per item that no sequence waits for, O(log n) per item of the n awaited ones; amortised.

    >>> policy = LookAhead[str]()
    >>> for item in "abc":
    ...     policy.admitted(item)
    >>> policy.announced(["a", "b"])
    >>> policy.victim()
    'c'
    >>> policy.removed("c")
    >>> policy.victim()
    'b'
    """

    def __init__(self, others: EvictionPolicy[Item] | None = None) -> None:
        self._others = LeastRecentlyUsed[Item]() if others is None else others
        self._spared: set[Item] = set()
        self._clock = count()
        self._uses: dict[Item, deque[int]] = {}  # next uses of each awaited item, in order of announcement
        self._farthest: list[tuple[int, Item]] = []  # heap of (-next use, item); outdated entries are skipped

    def __len__(self) -> int:
        return len(self._others) + len(self._spared)

    def __contains__(self, item: object) -> bool:
        return item in self._spared or item in self._others

    def admitted(self, item: Item) -> None:
        self._others.admitted(item)
        if item in self._uses:
            self._others.withdrawn([item])
            self._spare(item)

    def touched(self, items: Sequence[Item]) -> None:
        self._others.touched([item for item in items if item not in self._spared])

    def withdrawn(self, items: Sequence[Item]) -> None:
        self._others.withdrawn([item for item in items if item not in self._spared])
        self._spared.difference_update(items)

    def returned(self, items: Sequence[Item]) -> None:
        for item in items:
            if item in self._uses:
                self._spare(item)
        self._others.returned([item for item in items if item not in self._uses])

    def removed(self, item: Item) -> None:
        if item in self._spared:
            self._spared.remove(item)
            self._others.returned([item])
        self._others.removed(item)

    def victim(self) -> Item | None:
        unawaited = self._others.victim()
        if unawaited is not None:
            return unawaited
        while self._spared and not self._is_true(self._farthest[0]):
            heappop(self._farthest)
        return self._farthest[0][1] if self._spared else None

    def announced(self, items: Sequence[Item]) -> None:
        for item in items:
            self._uses.setdefault(item, deque()).append(next(self._clock))
            if item in self._others:
                self._others.withdrawn([item])
                self._spare(item)

    def settled(self, items: Sequence[Item]) -> None:
        # In reverse, so that of the items no longer awaited the last of the sequence is evicted first.
        for item in reversed(items):
            uses = self._uses[item]
            uses.popleft()
            if not uses:
                del self._uses[item]
            if item not in self._spared:
                continue
            if uses:
                self._spare(item)
            else:
                self._spared.remove(item)
                self._others.returned([item])

    def _spare(self, item: Item) -> None:
        self._spared.add(item)
        heappush(self._farthest, (-self._uses[item][0], item))
        if len(self._farthest) > 2 * len(self._spared) + 64:
            self._farthest = [(-self._uses[item][0], item) for item in self._spared]
            heapify(self._farthest)

    def _is_true(self, entry: tuple[int, Item]) -> bool:
        next_use, item = entry
        return item in self._spared and self._uses[item][0] == -next_use
