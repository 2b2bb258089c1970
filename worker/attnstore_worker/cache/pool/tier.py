"""The tiers by name, and their counts: for one prompt, and since the start.

Owns: `Tier`, `Admission`, `TierStatistics` and `TierCounter`. Invariant: a tier is asked only for blocks that no tier above it has,
so a block hits in at most one tier.
"""

from __future__ import annotations

import enum
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass


class Tier(enum.Enum):
    """The fastest first. SHARED and REMOTE are the same store, reached through mapped memory or through a network."""

    HBM = "hbm"
    HOST = "host"
    SHARED = "shared"
    REMOTE = "remote"


@dataclass(frozen=True, slots=True)
class Admission:
    """What the tiers had of a prompt. Tokens count whole blocks; `bytes_read` came from the store.

    `host_tokens` of the local tokens came from HOST, the others were in HBM. `shared_tokens` of the remote tokens came through
    memory shared with the store's node, or are used there.
    """

    local_tokens: int = 0
    remote_tokens: int = 0
    bytes_read: int = 0
    match_ms: float = 0.0
    read_ms: float = 0.0
    host_tokens: int = 0
    shared_tokens: int = 0

    @property
    def hit_tokens(self) -> int:
        """Tokens that need no prefill."""
        return self.local_tokens + self.remote_tokens

    def hit_tokens_by_tier(self) -> dict[Tier, int]:
        """The hit tokens of each tier."""
        return {
            Tier.HBM: self.local_tokens - self.host_tokens,
            Tier.HOST: self.host_tokens,
            Tier.SHARED: self.shared_tokens,
            Tier.REMOTE: self.remote_tokens - self.shared_tokens,
        }


@dataclass(frozen=True, slots=True)
class TierStatistics:
    """Counts since the start. `bytes_read`: pages copied up from the tier; pages that are used in place are not copied.

    A prompt that is fetched ahead or preempted is asked for again. SHARED and REMOTE are asked together: each counts all tokens
    that the store was asked for. `evicted_blocks` is 0 for a store, which counts them itself.
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
        """Counts blocks for which a tier was asked."""
        self._queried[tier] += blocks

    def copied(self, tier: Tier, blocks: int) -> None:
        """Counts blocks that hit and were copied up."""
        self._hits[tier] += blocks
        self._copied[tier] += blocks

    def used_in_place(self, tier: Tier, blocks: int) -> None:
        """Counts blocks that hit and are used in place."""
        self._hits[tier] += blocks

    def statistics(self, evicted_blocks: Mapping[Tier, int]) -> dict[Tier, TierStatistics]:
        """Returns a snapshot of every tier."""
        return {
            tier: TierStatistics(
                self._queried[tier] * self._block_tokens,
                self._hits[tier] * self._block_tokens,
                self._copied[tier] * self._page_bytes,
                evicted_blocks.get(tier, 0),
            )
            for tier in Tier
        }
