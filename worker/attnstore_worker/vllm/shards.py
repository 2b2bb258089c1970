"""Pages that engines of other tensor-parallel sizes have written: which of them hold a rank's heads.

Owns: `Source` and `HeadRange`. The heads of a layer lie one after the other in a page, so a rank of a larger engine takes a range
of heads out of each page of a smaller one, and a rank of a smaller engine fills the ranges of its block from the pages of several
shards. Invariant: the ranges of a source cover every head of the rank's block once.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from attnstore.core.hashing import Namespace
from attnstore_worker.vllm.identity import Shard
from attnstore_worker.vllm.page_groups import PageGroup, of_shard


@dataclass(frozen=True, slots=True)
class HeadRange:
    """The pages of `shard`, and where the heads are that a rank takes of them. `page_part`: which of `page_parts` equal parts of a
    page's heads; `block_part`: which of `block_parts` equal parts of the heads of its block they fill.
    """

    shard: Shard
    groups: tuple[PageGroup, ...]
    page_part: int = 0
    page_parts: int = 1
    block_part: int = 0
    block_parts: int = 1


@dataclass(frozen=True, slots=True)
class Source:
    """What a rank reads where it would read its own page: pages of each of these shards."""

    ranges: tuple[HeadRange, ...]


ToldSources = tuple[tuple[tuple[tuple[PageGroup, Namespace], ...], ...], ...]
"""For each source and each of its shards, the groups and the namespaces of their pages."""


def sources(groups: Sequence[PageGroup], shard: Shard, sizes: Iterable[int]) -> tuple[Source, ...]:
    """Returns the rank's own pages, and those of engines of these tensor-parallel sizes as far as heads divide: one size is a
    multiple of the other, and every group has heads. An engine with more ranks than heads has as many shards as heads.
    """
    found = [Source((HeadRange(shard, tuple(groups)),))]
    heads = {None if group.heads is None else group.heads * shard.count for group in groups}
    for size in dict.fromkeys(sizes):
        counts = {None if total is None else min(size, total) for total in heads}
        count = counts.pop()
        if count is None or counts or count == shard.count or any(total is None or total % count for total in heads):
            continue
        if count % shard.count == 0:
            found.append(_of_more(groups, shard, count))
        elif shard.count % count == 0:
            found.append(_of_fewer(groups, shard, count))
    return tuple(found)


def _of_more(groups: Sequence[PageGroup], own: Shard, count: int) -> Source:
    each = count // own.count
    others = [Shard(own.index * each + part, count, writes=False) for part in range(each)]
    return Source(
        tuple(
            HeadRange(other, _of_shard(groups, own, other), block_part=part, block_parts=each) for part, other in enumerate(others)
        )
    )


def _of_fewer(groups: Sequence[PageGroup], own: Shard, count: int) -> Source:
    each = own.count // count
    other = Shard(own.index // each, count, writes=False)
    return Source((HeadRange(other, _of_shard(groups, own, other), page_part=own.index % each, page_parts=each),))


def _of_shard(groups: Sequence[PageGroup], own: Shard, other: Shard) -> tuple[PageGroup, ...]:
    return tuple(of_shard(group, own, other) for group in groups)
