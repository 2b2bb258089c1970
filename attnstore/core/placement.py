"""Placement: which nodes of a cluster hold a segment, computed alike by everyone who knows the nodes and their weights.

Owns: the order of nodes for a key. Invariants: it depends on the key and on the nodes' names and weights alone; each node is first
for a share of the keys in proportion to its weight; and when a node joins or leaves, only keys move that it gains or loses, 1/N of
all. Nothing is stored and nobody is asked, so there is no table of pages that could be wrong.

Rendezvous hashing (Thaler and Ravishankar, 1998): every node draws a number for the key, and nodes rank by it. The draw is
exponentially distributed with the weight as its rate, so that the least draw falls to a node in proportion to its weight
(Schindelhauer and Schomaker, 2005).
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
        """All nodes, the first owner of `key` first: replicas go to as many of the leading ones as there are copies."""
        draws = [(_draw(key, seed) / weight, node_id) for node_id, seed, weight in self._nodes]
        draws.sort()
        return [node_id for _, node_id in draws]


def _draw(key: bytes, seed: int) -> float:
    """An exponentially distributed number that depends on nothing but its arguments."""
    # 52 bits and a half: exact in a double, never 0 and never 1.
    uniform = ((xxhash.xxh3_64_intdigest(key, seed) >> 12) + 0.5) / (1 << 52)
    return -math.log(uniform)
