"""Which page goes first: the eviction policy as an object.

Owns: the contract between whoever holds pages and the order in which they leave.
Invariant: a policy holds exactly the items that are evictable now. Pinned items are withdrawn from the order instead of being
skipped by a scan, so finding a victim costs the same however many pages are pinned.

An item's life in a policy:  admitted -> (touched | withdrawn -> returned)* -> removed, and removed only while it is evictable.
Apart from that life, sequences that wait may announce what they will use: known items or not, and settle it later.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Protocol, TypeVar

Item = TypeVar("Item", bound=Hashable)


class EvictionPolicy(Protocol[Item]):
    """Order of eviction over items of any kind. Sequences are given in order of use: the last one was used last. `touched` may name
    an item several times, all others name each once.

    Items are equal where their content is: a policy may recognise one that comes back after it was removed.
    """

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
        """The item to evict next, None where none is evictable. Removes nothing: asked again it gives the same answer, and
        `removed` follows where the item is really evicted.
        """
        ...

    def announced(self, items: Sequence[Item]) -> None:  # noqa: ARG002 - a default for policies without foresight
        """A sequence that waits behind all others will use the items, in this order. Ignored unless the policy looks ahead."""
        return

    def settled(self, items: Sequence[Item]) -> None:  # noqa: ARG002 - a default for policies without foresight
        """The sequence that announced these items waits no longer: it runs or was cancelled."""
        return
