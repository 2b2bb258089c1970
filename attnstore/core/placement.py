"""Placement: which nodes of a cluster hold a segment.

Owns: the order of nodes for a key. Invariants: the order depends only on the key and on the nodes' names and weights; each node is
first for a share of the keys proportional to its weight; when a node joins or leaves, only the keys that it gains or loses move,
1/N of all. Every client and node computes the same order without stored state or requests, so there is no table of pages that could
be outdated.

Rendezvous hashing (Thaler and Ravishankar, 1998): every node draws a number for the key, and nodes are ranked by it. The draw is
exponentially distributed with the weight as its rate, so that each node has the smallest draw with a probability proportional to
its weight (Schindelhauer and Schomaker, 2005).
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import xxhash


class Placement:
    """Ranks nodes for keys. `weights`: node id -> positive weight."""

    def __init__(self, weights: Mapping[str, float]) -> None:
        assert all(weight > 0 and math.isfinite(weight) for weight in weights.values()), "a weight is a positive number"
        self.weights = dict(weights)
        self._nodes = [
            (node_id, xxhash.xxh3_64_intdigest(node_id.encode()), weight) for node_id, weight in sorted(self.weights.items())
        ]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Placement) and self.weights == other.weights

    __hash__ = None  # type: ignore[assignment]

    def ranked(self, key: bytes) -> list[str]:
        """Returns all nodes, the first owner of `key` first: with R copies, the first R nodes hold them."""
        draws = [(_draw(key, seed) / weight, node_id) for node_id, seed, weight in self._nodes]
        draws.sort()
        return [node_id for _, node_id in draws]


def _draw(key: bytes, seed: int) -> float:
    """Returns an exponentially distributed number that depends only on its arguments."""
    # 52 bits plus one half: exact in a double, never 0 and never 1.
    uniform = ((xxhash.xxh3_64_intdigest(key, seed) >> 12) + 0.5) / (1 << 52)
    return -math.log(uniform)
