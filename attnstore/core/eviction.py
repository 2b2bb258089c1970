"""Which page goes first: the eviction policy as an object.

Owns: the order of the evictable pages of one class.
Invariant: a policy holds exactly the items that are evictable now. Pinned items are withdrawn from the order instead of being
skipped by a scan, so finding a victim costs the same however many pages are pinned.

An item's life in a policy:  admitted -> (touched | withdrawn -> returned)* -> removed, and removed only while it is evictable.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Sequence
from typing import Protocol, TypeVar

Item = TypeVar("Item", bound=Hashable)


class EvictionPolicy(Protocol[Item]):
    """Order of eviction over items of any kind. Sequences are given in order of use: the last one was used last."""

    def __len__(self) -> int:
        """How many items are evictable."""
        ...

    def __contains__(self, item: object) -> bool:
        """Whether the item is evictable."""
        ...

    def admitted(self, item: Item) -> None:
        """A new item became evictable."""
        ...

    def touched(self, items: Sequence[Item]) -> None:
        """Evictable items were used."""
        ...

    def withdrawn(self, items: Sequence[Item]) -> None:
        """Evictable items were pinned: they must not be victims until they are returned. A policy may keep what it knows of
        them.
        """
        ...

    def returned(self, items: Sequence[Item]) -> None:
        """The last pin of withdrawn items is gone; they were in use until now."""
        ...

    def removed(self, item: Item) -> None:
        """An evictable item left: evicted or deleted."""
        ...

    def victim(self) -> Item | None:
        """The item to evict next, None where none is evictable. Changes nothing: `removed` follows where it is really
        evicted.
        """
        ...


class LeastRecentlyUsed(EvictionPolicy[Item]):
    """Evicts what was used longest ago. Every operation is O(1) for each item.

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
