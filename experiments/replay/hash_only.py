"""The replay: every request's blocks through the worker's block pool.

Owns: the order of a request's calls to the pool, and the count of its hits.
Invariant: after each request no block is held, so only the pool determines what the next request finds.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Any, Final, Literal

from attnstore.core.eviction import create_eviction_policy
from attnstore.core.hashing import BlockHash
from attnstore.errors import InvalidArgument
from attnstore_worker.cache.pool.block_pool import BlockPool
from experiments.replay.trace import BLOCK_TOKENS, Trace

UNLIMITED: Final = "inf"
Capacity = int | Literal["inf"]
"""Tokens, or `UNLIMITED`: nothing is ever evicted."""


@dataclass(frozen=True, slots=True)
class Replay:
    """The result of one policy at one capacity. A hit is a block of the consecutive prefix that was in the pool; rates are shares
    of all blocks of all prompts. `queue_depth` requests wait behind the running one and are announced to the policy.
    """

    policy: str
    capacity_tokens: Capacity
    capacity_blocks: int
    queue_depth: int
    requests: int
    blocks: int
    hit_blocks: int
    evicted_blocks: int
    bound_hit_blocks: int
    duration_s: float

    @property
    def hit_rate_blocks(self) -> float:
        """Hit blocks / blocks."""
        return self.hit_blocks / self.blocks

    @property
    def bound_hit_rate_blocks(self) -> float:
        """The maximum for any policy at this capacity (see `bound`)."""
        return self.bound_hit_blocks / self.blocks

    def as_json(self) -> dict[str, Any]:
        """All fields and both rates."""
        return asdict(self) | {
            "hit_rate_blocks": self.hit_rate_blocks,
            "bound_hit_rate_blocks": self.bound_hit_rate_blocks,
        }


def capacity_blocks(trace: Trace, capacity: Capacity) -> int:
    """Returns the blocks of a pool of that capacity. Raises `InvalidArgument` if the trace's longest prompt does not fit."""
    if capacity == UNLIMITED:
        return trace.blocks
    blocks = capacity // BLOCK_TOKENS
    if blocks < trace.longest_blocks:
        raise InvalidArgument(
            f"a capacity of {capacity} tokens is {blocks} blocks; the longest prompt of the trace needs {trace.longest_blocks}"
        )
    return blocks


def replay(trace: Trace, policy: str, capacity: Capacity, queue_depth: int, bound_hit_blocks: int) -> Replay:
    """Runs the requests one after another through a new pool; each uses the blocks that it finds and leaves its whole prompt there.

    Before a request runs, up to `queue_depth` requests behind it have been announced. Outputs are not cached, because the trace
    does not name their blocks. Raises `InvalidArgument` for an unknown policy or a capacity below the longest prompt.
    """
    blocks = capacity_blocks(trace, capacity)
    pool = BlockPool(blocks, create_eviction_policy(policy))
    arrivals = iter(trace.requests)
    began = time.perf_counter()
    for request in islice(arrivals, queue_depth):
        pool.announce(request.hashes)
    hit_blocks = 0
    for request in trace.requests:
        for arrived in islice(arrivals, 1):
            pool.announce(arrived.hashes)
        pool.settle(request.hashes)
        hit_blocks += _run(pool, request.hashes)
    duration_s = time.perf_counter() - began
    pool.check()
    return Replay(
        policy=policy,
        capacity_tokens=capacity,
        capacity_blocks=blocks,
        queue_depth=queue_depth,
        requests=len(trace.requests),
        blocks=trace.blocks,
        hit_blocks=hit_blocks,
        evicted_blocks=pool.statistics().evicted,
        bound_hit_blocks=bound_hit_blocks,
        duration_s=duration_s,
    )


def _run(pool: BlockPool, hashes: Sequence[BlockHash]) -> int:
    """Runs one request as the manager does: hold the prefix, compute and seal the rest, release the tail first."""
    block_ids = pool.hold_prefix(hashes)
    hits = len(block_ids)
    for block_hash in hashes[hits:]:
        block_id = pool.allocate()
        pool.seal(block_id, block_hash)
        block_ids.append(block_id)
    pool.release(reversed(block_ids))
    return hits
