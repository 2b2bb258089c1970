"""The answer to `Stats`: a node's counters, or the sums over a cluster's nodes.

Invariant: a snapshot never changes. It has a module of its own because it names `PageLayout` of `attnstore.core`, and the core
imports `attnstore.types`.
"""

from __future__ import annotations

from dataclasses import dataclass

from attnstore.core.layout import PageLayout


@dataclass(frozen=True, slots=True)
class NamespaceStatistics:
    """Pages of one namespace on one node."""

    namespace: bytes
    layout: PageLayout
    pages_sealed: int


@dataclass(frozen=True, slots=True)
class NodeStatistics:
    """One consistent snapshot of a node's counters. Counters count pages since the node's start unless the name says otherwise.

    Each `Match` counts each requested page once, in `hit_pages` or in `missed_pages`; every page after a prefix's first miss is
    missed. A read counts only in `read_pages`. `verified_pages` counts the pages that were hashed again in place, and
    `corrupt_pages` those of them that had changed since they were sealed and were removed. A cluster's statistics are the sums over
    its nodes: a page that several nodes are asked for counts once for each.
    """

    node_id: str
    epoch: bytes
    capacity_bytes: int
    used_bytes: int
    pages_sealed: int
    pages_arriving: int
    pages_pinned: int
    leases: int
    hit_pages: int
    missed_pages: int
    stored_pages: int
    evicted_pages: int
    read_pages: int
    verified_pages: int
    corrupt_pages: int
    read_bytes: int
    written_bytes: int
    uptime_ms: int
    namespaces: tuple[NamespaceStatistics, ...]

    @property
    def hit_rate(self) -> float | None:
        """Hit pages / requested pages. None before the first `Match`."""
        asked = self.hit_pages + self.missed_pages
        return self.hit_pages / asked if asked else None
