"""Least recently used: items are evicted in order of last use.

Owns: that order. Invariant: the order contains the evictable items only, the least recently used first.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from attnstore.core.eviction.base import EvictionPolicy, Item


class LeastRecentlyUsed(EvictionPolicy[Item]):
    """Evicts the least recently used item. Every operation is O(1) per item.

    >>> policy = LeastRecentlyUsed[str]()
    >>> for item in "abc":
    ...     policy.admitted(item)
    >>> policy.touched(["a"])
    >>> policy.withdrawn(["b"])
    >>> policy.victim()
    'c'
    """

    def __init__(self) -> None:
        self._order: OrderedDict[Item, None] = OrderedDict()

    def __len__(self) -> int:
        return len(self._order)

    def __contains__(self, item: object) -> bool:
        return item in self._order

    def admitted(self, item: Item) -> None:
        self._order[item] = None

    def touched(self, items: Sequence[Item]) -> None:
        move_to_end = self._order.move_to_end
        for item in items:
            move_to_end(item)

    def withdrawn(self, items: Sequence[Item]) -> None:
        order = self._order
        for item in items:
            del order[item]

    def returned(self, items: Sequence[Item]) -> None:
        order = self._order
        for item in items:
            order[item] = None

    def removed(self, item: Item) -> None:
        del self._order[item]

    def victim(self) -> Item | None:
        return next(iter(self._order), None)
