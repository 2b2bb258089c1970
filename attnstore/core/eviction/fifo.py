"""First in, first out: items are evicted in order of arrival, however often they are used.

Owns: `ArrivalOrder`, the queue that FIFO and S3-FIFO consist of, and the plain FIFO policy over one such queue.
Invariant: the queue is empty or its first item is unpinned, so a victim is found without a search.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Generic

from attnstore.core.eviction.base import EvictionPolicy, Item


class ArrivalOrder(Generic[Item]):
    """A queue in which a pinned item keeps its place until it becomes the first; then it leaves the queue.

    An item that left rejoins at the front when it is unpinned, because its turn had already come. Each operation is O(1) amortised:
    an item leaves at most once per pin.
    """

    def __init__(self) -> None:
        self._queue: OrderedDict[Item, None] = OrderedDict()
        self._pinned: set[Item] = set()  # in the queue
        self._aside: set[Item] = set()  # pinned and out of the queue

    def __len__(self) -> int:
        """Returns the number of unpinned items."""
        return len(self._queue) - len(self._pinned)

    def __contains__(self, item: object) -> bool:
        """Returns whether the item belongs to this order and is unpinned."""
        return item in self._queue and item not in self._pinned

    @property
    def size(self) -> int:
        """The number of items in this order, pinned or not."""
        return len(self._queue) + len(self._aside)

    def owns(self, item: Item) -> bool:
        """Returns whether the item belongs to this order, pinned or not."""
        return item in self._queue or item in self._aside

    def front(self) -> Item | None:
        """Returns the first unpinned item."""
        return next(iter(self._queue), None)

    def append(self, item: Item) -> None:
        """Adds a new item at the end."""
        self._queue[item] = None

    def remove(self, item: Item) -> None:
        """Removes an unpinned item."""
        del self._queue[item]
        self._settle()

    def requeue(self, item: Item) -> None:
        """Moves an unpinned item to the end."""
        self._queue.move_to_end(item)
        self._settle()

    def pin(self, item: Item) -> None:
        """Keeps an item from becoming the first."""
        self._pinned.add(item)
        self._settle()

    def unpin(self, item: Item) -> None:
        """Undoes `pin`."""
        if item in self._pinned:
            self._pinned.remove(item)
        else:
            self._aside.remove(item)
            self._queue[item] = None
            self._queue.move_to_end(item, last=False)

    def _settle(self) -> None:
        while self._pinned and (first := self.front()) in self._pinned:
            assert first is not None
            del self._queue[first]
            self._pinned.remove(first)
            self._aside.add(first)


class FirstInFirstOut(EvictionPolicy[Item]):
    """Evicts the item that arrived first. Every operation is O(1) amortised per item.

    >>> policy = FirstInFirstOut[str]()
    >>> for item in "abc":
    ...     policy.admitted(item)
    >>> policy.touched(["a"])
    >>> policy.victim()
    'a'
    """

    def __init__(self) -> None:
        self._order: ArrivalOrder[Item] = ArrivalOrder()

    def __len__(self) -> int:
        return len(self._order)

    def __contains__(self, item: object) -> bool:
        return item in self._order

    def admitted(self, item: Item) -> None:
        self._order.append(item)

    def touched(self, items: Sequence[Item]) -> None:
        """No-op: use does not change the order."""

    def withdrawn(self, items: Sequence[Item]) -> None:
        for item in items:
            self._order.pin(item)

    def returned(self, items: Sequence[Item]) -> None:
        # In reverse, so that items that rejoin at the front end up in the given order.
        for item in reversed(items):
            self._order.unpin(item)

    def removed(self, item: Item) -> None:
        self._order.remove(item)

    def victim(self) -> Item | None:
        return self._order.front()
