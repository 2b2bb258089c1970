"""A sequence whose blocks are computed from the front while others arrive from lower tiers: the engine's side of a swap-in.

Owns: `Loading`: which blocks arrived and wait until the computed front reaches them, and what was found of the prompt in the end.
Invariant: a block that arrived is verified and findable in the pool from then on; the front passes over it without computing.
Only the engine's thread comes here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from attnstore_worker.cache.moving.layer_gate import LayerGate
from attnstore_worker.cache.moving.swap_in import SwapIn
from attnstore_worker.cache.planning.load_plan import Prompt
from attnstore_worker.cache.planning.observation import LoadEnd
from attnstore_worker.cache.pool.block_table import BlockTable
from attnstore_worker.cache.pool.tier import Tier


@dataclass(frozen=True, slots=True)
class Admission:
    """What was found of a prompt. Tokens count whole blocks; `bytes_read` came from the store.

    `host_tokens` of the local ones came up from HOST, the others were in HBM; `shared_tokens` of the remote ones came through
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


@dataclass(slots=True)
class Loading:
    """An admitted sequence's blocks, and the swap-in for them, if there is one. `end` is None as long as it runs. `prompt` is what
    was to be decided, None where all is resident and for a prefetch.

    `host_blocks` of the resident ones came up from HOST. `ready` arrived and are still ahead of the computed front; `used_blocks`
    were passed over, `shared_blocks` of them from SHARED.
    """

    table: BlockTable
    resident_blocks: int
    prompt: Prompt | None
    swap_in: SwapIn | None
    ready: set[int] = field(default_factory=set)
    arrived_blocks: int = 0
    used_blocks: int = 0
    shared_blocks: int = 0
    host_blocks: int = 0
    end: LoadEnd | None = None
    ended_ms: float = 0.0

    @property
    def running(self) -> SwapIn | None:
        """The swap-in, while something may still arrive."""
        return self.swap_in if self.end is None else None

    @property
    def due_ms(self) -> float:
        """When its stage is due; never, where nothing runs."""
        return self.swap_in.due_ms if self.swap_in is not None and self.end is None else math.inf

    @property
    def over(self) -> bool:
        """All that is not computed yet has to be computed."""
        return self.running is None and not self.ready

    def claim(self, end_tokens: int) -> int:
        """Claims blocks for computing up to `end_tokens`; returns the token up to which it may be computed now."""
        end = -(-end_tokens // self.table.block_tokens)
        end = min((block for block in self.ready if block < end), default=end)
        if self.running is not None:
            end = self.running.claim(end)
        return min(end_tokens, end * self.table.block_tokens)

    def gate(self, computed_tokens: int) -> LayerGate | None:
        """The gate of the pages that arrive layer by layer where the front stands before them; None where there is none to use."""
        gate = self.running.gate if self.running is not None else None
        if gate is None or not gate.open or computed_tokens != gate.blocks.start * self.table.block_tokens:
            return None
        return gate

    def pass_ready(self, block: int) -> int:
        """Moves the front, which is at `block`, over the blocks that are ready there; returns the first one that is not."""
        while block in self.ready:
            self.ready.remove(block)
            self.used_blocks += 1
            self.shared_blocks += self.swap_in is not None and block in self.swap_in.shared
            block += 1
            self.table.sealed = block
        return block

    def admission(self) -> Admission:
        """What has come of it so far."""
        block_tokens = self.table.block_tokens
        local_tokens, host_tokens = self.resident_blocks * block_tokens, self.host_blocks * block_tokens
        if self.swap_in is None:
            return Admission(local_tokens, host_tokens=host_tokens)
        searched = self.swap_in.found.search_ms if self.swap_in.found is not None else self.ended_ms - self.swap_in.started_ms
        return Admission(
            local_tokens=local_tokens,
            remote_tokens=self.used_blocks * block_tokens,
            bytes_read=self.swap_in.bytes_read,
            match_ms=searched,
            read_ms=self.ended_ms - self.swap_in.planned_ms if self.swap_in.plan is not None else 0.0,
            host_tokens=host_tokens,
            shared_tokens=self.shared_blocks * block_tokens,
        )
