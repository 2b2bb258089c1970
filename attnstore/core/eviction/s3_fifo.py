"""S3-FIFO: three queues that evict items used once before items used again.

Owns: a small queue for new items, a main queue for items that were used again, and a ghost queue of items evicted from the small
queue. Source: Yang, Zhang, Qiu, Yue, Rashmi, "FIFO queues are all you need for cache eviction", SOSP 2023.
Invariant: an item is in the small or the main queue, never in both, and in the ghost queue only while it is in neither.

It suits a store of prompts, because most prompts never return: they pass through a tenth of the memory. Two differences from the
paper: queue sizes are shares of the items present, because a class of pages need not have a fixed capacity; and pinned items leave
the queue (see `ArrivalOrder`).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Final

from attnstore.core.eviction.base import EvictionPolicy, Item
from attnstore.core.eviction.fifo import ArrivalOrder

USES_MAX: Final = 3
"""The maximum of a use count: two bits, as in the paper."""
USES_TO_STAY: Final = 2
"""The number of uses after the first that moves an item from the small queue to the main queue."""
SMALL_SHARE: Final = 10
"""The small queue evicts while it has at least one in this many of all items."""

assert 1 <= USES_TO_STAY <= USES_MAX


class S3Fifo(EvictionPolicy[Item]):
    """Evicts new items with little reuse before old items with reuse. O(1) amortised per item and use.

    The ghost queue keeps as many removed items as the main queue should hold.

    >>> policy = S3Fifo[str]()
    >>> for item in "abc":
    ...     policy.admitted(item)
    >>> policy.touched(["a"])
    >>> policy.touched(["a"])
    >>> policy.victim()
    'b'
    """

    def __init__(self) -> None:
        self._small: ArrivalOrder[Item] = ArrivalOrder()
        self._main: ArrivalOrder[Item] = ArrivalOrder()
        self._ghosts: OrderedDict[Item, None] = OrderedDict()
        self._uses: dict[Item, int] = {}

    def __len__(self) -> int:
        return len(self._small) + len(self._main)

    def __contains__(self, item: object) -> bool:
        return item in self._small or item in self._main

    def admitted(self, item: Item) -> None:
        self._uses[item] = 0
        if item in self._ghosts:
            del self._ghosts[item]
            self._main.append(item)
        else:
            self._small.append(item)

    def touched(self, items: Sequence[Item]) -> None:
        for item in items:
            self._uses[item] = min(self._uses[item] + 1, USES_MAX)

    def withdrawn(self, items: Sequence[Item]) -> None:
        self.touched(items)
        for item in items:
            self._home(item).pin(item)

    def returned(self, items: Sequence[Item]) -> None:
        # In reverse, so that items that rejoin at the front end up in the given order.
        for item in reversed(items):
            self._home(item).unpin(item)

    def removed(self, item: Item) -> None:
        del self._uses[item]
        home = self._home(item)
        home.remove(item)
        if home is self._small:
            self._ghosts[item] = None
        present = self._small.size + self._main.size
        while len(self._ghosts) > max(1, present - present // SMALL_SHARE):
            self._ghosts.popitem(last=False)

    def victim(self) -> Item | None:
        # Each iteration consumes a use or a promotion, so the loop is O(1) amortised.
        while self._small or self._main:
            if self._small_gives():
                item = self._small.front()
                assert item is not None
                if self._uses[item] < USES_TO_STAY:
                    return item
                self._uses[item] = 0
                self._small.remove(item)
                self._main.append(item)
            else:
                item = self._main.front()
                assert item is not None
                if not self._uses[item]:
                    return item
                self._uses[item] -= 1
                self._main.requeue(item)
        return None

    def _small_gives(self) -> bool:
        present = self._small.size + self._main.size
        return bool(self._small) and (not self._main or self._small.size * SMALL_SHARE >= present)

    def _home(self, item: Item) -> ArrivalOrder[Item]:
        return self._small if self._small.owns(item) else self._main
