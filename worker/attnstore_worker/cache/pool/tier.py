"""The tiers by name, and what is counted of each.

Owns: `Tier`, `TierStatistics` and `TierCounter`. Invariant: a block of a prompt is asked of a tier only if no tier above had it, so
a block hits in one tier at most, and `queried_tokens` of a tier is what those above it missed, as far as it was asked.
"""

from __future__ import annotations

import enum
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass


class Tier(enum.Enum):
    """From the fastest down. SHARED and REMOTE are the same store, reached through mapped memory or through a network."""

    HBM = "hbm"
    HOST = "host"
    SHARED = "shared"
    REMOTE = "remote"


@dataclass(frozen=True, slots=True)
class TierStatistics:
    """Counts since the start. `bytes_read`: pages copied up from the tier; those that are used in place are not copied.

    A prompt that is fetched ahead, or preempted, is asked for again. SHARED and REMOTE are asked together: their queried tokens are
    those of the store. `evicted_blocks`: 0 for a store, which says it itself.
    """

    queried_tokens: int = 0
    hit_tokens: int = 0
    bytes_read: int = 0
    evicted_blocks: int = 0


class TierCounter:
    """Counts blocks of one size."""

    def __init__(self, block_tokens: int, page_bytes: int) -> None:
        self._block_tokens = block_tokens
        self._page_bytes = page_bytes
        self._queried: Counter[Tier] = Counter()
        self._hits: Counter[Tier] = Counter()
        self._copied: Counter[Tier] = Counter()

    def queried(self, tier: Tier, blocks: int) -> None:
        """A tier was asked for so many blocks."""
        self._queried[tier] += blocks

    def copied(self, tier: Tier, blocks: int) -> None:
        """So many of them were there and were copied up."""
        self._hits[tier] += blocks
        self._copied[tier] += blocks

    def used_in_place(self, tier: Tier, blocks: int) -> None:
        """So many of them were there and are used where they lie."""
        self._hits[tier] += blocks

    def statistics(self, evicted_blocks: Mapping[Tier, int]) -> dict[Tier, TierStatistics]:
        """A snapshot of every tier."""
        return {
            tier: TierStatistics(
                self._queried[tier] * self._block_tokens,
                self._hits[tier] * self._block_tokens,
                self._copied[tier] * self._page_bytes,
                evicted_blocks.get(tier, 0),
            )
            for tier in Tier
        }
