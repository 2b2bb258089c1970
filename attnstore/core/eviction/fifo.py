"""First in, first out: the order of eviction is the order of arrival, whatever is used in between.

Owns: `ArrivalOrder`, the queue that FIFO and S3-FIFO are made of, and the plain policy over one such queue.
Invariant: the queue is empty or its first item is not pinned, so a victim is found without a search.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Generic

from attnstore.core.eviction.base import EvictionPolicy, Item


class ArrivalOrder(Generic[Item]):
    """A queue in which a pinned item keeps its place until it becomes the first; then it steps aside.

    When it is unpinned it rejoins at the front, because its turn was there already. Each operation is O(1) amortised: an item
    steps aside at most once each time it is pinned.
    """

    def __init__(self) -> None:
        self._queue: OrderedDict[Item, None] = OrderedDict()
        self._pinned: set[Item] = set()  # in the queue
        self._aside: set[Item] = set()  # pinned and out of the queue

    def __len__(self) -> int:
        """How many items are not pinned."""
        return len(self._queue) - len(self._pinned)

    def __contains__(self, item: object) -> bool:
        """Whether the item is here and not pinned."""
        return item in self._queue and item not in self._pinned

    @property
    def size(self) -> int:
        """How many items belong here, pinned or not."""
        return len(self._queue) + len(self._aside)

    def owns(self, item: Item) -> bool:
        """Whether the item belongs here, pinned or not."""
        return item in self._queue or item in self._aside

    def front(self) -> Item | None:
        """The first item that is not pinned."""
        return next(iter(self._queue), None)

    def append(self, item: Item) -> None:
        """Adds a new item at the end."""
        self._queue[item] = None

    def remove(self, item: Item) -> None:
        """Takes out an item that is not pinned."""
        del self._queue[item]
        self._settle()

    def requeue(self, item: Item) -> None:
        """Sends an item that is not pinned to the end."""
        self._queue.move_to_end(item)
        self._settle()

    def pin(self, item: Item) -> None:
        """Exempts an item from being the first."""
        self._pinned.add(item)
        self._settle()

    def unpin(self, item: Item) -> None:
        """Gives a pinned item its place again."""
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
    """Evicts what arrived first. Every operation is O(1) amortised for each item.

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
        """Use changes nothing."""

    def withdrawn(self, items: Sequence[Item]) -> None:
        for item in items:
            self._order.pin(item)

    def returned(self, items: Sequence[Item]) -> None:
        # Backwards, so that those that rejoin at the front stand there in the order given.
        for item in reversed(items):
            self._order.unpin(item)

    def removed(self, item: Item) -> None:
        self._order.remove(item)

    def victim(self) -> Item | None:
        return self._order.front()
