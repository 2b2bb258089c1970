"""Statistics of a page table.

Owns: the types of its snapshots. Invariant: a snapshot is taken at one moment and never changes.
"""

from __future__ import annotations

from dataclasses import dataclass

from attnstore.core.layout import PageLayout
from attnstore.types import Space


@dataclass(frozen=True, slots=True)
class SpaceStatistics:
    """One space at one moment."""

    space: Space
    layout: PageLayout
    pages_sealed: int
    pages_arriving: int


@dataclass(frozen=True, slots=True)
class PageTableStatistics:
    """The table at one moment; hits, misses, stored and evicted pages count since the start.

    A page counts as a hit or a miss once per `match` that asks for it, so `hit_pages / (hit_pages + missed_pages)` is the hit rate;
    reads that follow a match count nothing. Every hash after the first miss of a prefix is a miss.
    """

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
    verified_pages: int
    corrupt_pages: int
    stored_bytes: int
