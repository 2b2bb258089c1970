"""The division of pages among the nodes that hold them.

Owns: `distribute`. Pure: no clock, no I/O. Invariant: each page goes to one node that has it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from itertools import islice
from typing import Final

_DIVISIONS_MAX: Final = 32


def distribute(present: Sequence[Iterable[int]], pages: int) -> list[list[int]]:
    """Divides the leading pages among nodes, each page to one node that has it, so that the largest share is small. Ends at the
    first page that no node has.

    `present[node]` are the indices, below `pages`, of the pages that the node has. Pages with the same holders are one group. Each
    group in turn is divided anew, its holders with the smallest shares first, until nothing changes or `_DIVISIONS_MAX` turns.
    """
    holders: list[list[int]] = [[] for _ in range(pages)]
    for node, there in enumerate(present):
        for index in there:
            holders[index].append(node)
    groups: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for index, having in enumerate(holders):
        if not having:
            break
        groups[tuple(having)].append(index)
    loads = [0] * len(present)
    counts = {nodes: [0] * len(nodes) for nodes in groups}
    for _ in range(_DIVISIONS_MAX):
        before = list(loads)
        for nodes, indices in groups.items():
            others = [loads[node] - count for node, count in zip(nodes, counts[nodes], strict=True)]
            counts[nodes] = _level(others, len(indices))
            for node, other, count in zip(nodes, others, counts[nodes], strict=True):
                loads[node] = other + count
        if loads == before:
            break
    held: list[list[int]] = [[] for _ in present]
    for nodes, indices in groups.items():
        rest = iter(indices)
        for node, count in zip(nodes, counts[nodes], strict=True):
            held[node].extend(islice(rest, count))
    return [sorted(indices) for indices in held]


def _level(loads: Sequence[int], pages: int) -> list[int]:
    """Returns how many of the pages to add to each load, so that the largest result of an addition is as small as possible."""
    order = sorted(range(len(loads)), key=loads.__getitem__)
    raised, total = 0, pages
    for node in order:
        if raised and loads[node] * raised >= total:
            break
        raised += 1
        total += loads[node]
    level, left = divmod(total, raised)
    added = [0] * len(loads)
    for rank, node in enumerate(order[:raised]):
        added[node] = level + (rank < left) - loads[node]
    return added
