"""The upper bound: the most hits that any policy could have, computed with the whole future known.

Owns: an offline bound, not a cache; nothing here could run in a worker. Invariant: no replay exceeds it.

It is Belady's rule (1966): evict the block that is used farthest in the future, including the new block itself. Counted over single
blocks that rule is optimal. A cache that must also hold a running prompt as a whole, and can only use the consecutive prefix, gets
fewer hits.
"""

from __future__ import annotations

from heapq import heappop, heappush
from itertools import chain

from attnstore.core.hashing import BlockHash
from experiments.replay.trace import Trace


def bound_hits(trace: Trace, capacity_blocks: int) -> int:
    """Returns the optimal number of block hits with `capacity_blocks` blocks. O(n log n) in the blocks of the trace."""
    uses = list(chain.from_iterable(request.hashes for request in trace.requests))
    next_use = _next_uses(uses)
    kept: dict[BlockHash, int] = {}
    farthest: list[tuple[int, BlockHash]] = []
    hits = 0
    for block, following in zip(uses, next_use, strict=True):
        hits += block in kept
        kept[block] = following
        heappush(farthest, (-following, block))
        while len(kept) > capacity_blocks:
            use, candidate = heappop(farthest)
            if kept.get(candidate) == -use:
                del kept[candidate]
    return hits


def _next_uses(uses: list[BlockHash]) -> list[int]:
    """Returns for each use the index of the same block's next use; `len(uses)` if there is none."""
    following: dict[BlockHash, int] = {}
    result = [0] * len(uses)
    for index in reversed(range(len(uses))):
        result[index] = following.get(uses[index], len(uses))
        following[uses[index]] = index
    return result
