"""The contract of an eviction policy: which item is evicted next.

Owns: the interface between the holder of items and the order of their eviction.
Invariant: a policy contains exactly the items that are evictable now. Pinned items are withdrawn from the order instead of being
skipped by a scan, so the cost of finding a victim does not depend on how many items are pinned.

The life of an item in a policy: admitted -> (touched | withdrawn -> returned)* -> removed. It is removed only while it is
evictable. Independently of that, waiting sequences may announce the items that they will use, known or not, and settle the
announcement later.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Protocol, TypeVar

Item = TypeVar("Item", bound=Hashable)


class EvictionPolicy(Protocol[Item]):
    """The eviction order of items of any kind. Items are given in order of use, the most recently used last. `touched` may name an
    item several times; all other methods name each item once.

    Items compare equal if their content is equal, so a policy may recognise an item that returns after its removal.
    """

    def __len__(self) -> int:
        """Returns the number of evictable items."""
        ...

    def __contains__(self, item: object) -> bool:
        """Returns whether the item is evictable."""
        ...

    def admitted(self, item: Item) -> None:
        """Adds a new, evictable item."""
        ...

    def touched(self, items: Sequence[Item]) -> None:
        """Records that evictable items were used."""
        ...

    def withdrawn(self, items: Sequence[Item]) -> None:
        """Withdraws evictable items that were pinned: they must not be victims until they are returned. A policy may keep its
        knowledge of them.
        """
        ...

    def returned(self, items: Sequence[Item]) -> None:
        """Makes withdrawn items evictable again after their last pin; they count as used until now."""
        ...

    def removed(self, item: Item) -> None:
        """Removes an evictable item that was evicted or deleted."""
        ...

    def victim(self) -> Item | None:
        """Returns the item to evict next, or None if none is evictable. Changes nothing: the caller evicts the item and then calls
        `removed`.
        """
        ...

    def announced(self, items: Sequence[Item]) -> None:  # noqa: ARG002 - a default for policies without foresight
        """Announces that a sequence, queued behind all others, will use the items in this order. Ignored unless the policy looks
        ahead.
        """
        return

    def settled(self, items: Sequence[Item]) -> None:  # noqa: ARG002 - a default for policies without foresight
        """Ends an announcement: its sequence now runs or was cancelled."""
        return
