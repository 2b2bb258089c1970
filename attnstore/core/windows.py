"""Sliding windows over pages: which keys of a set of pages a query row sees.

Owns: `first_keys`. Pure index arithmetic, so that a client and its tests agree on the edge of a window.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Sequence


def first_keys(pages: Sequence[int], block_tokens: int, positions: Iterable[int], window: int) -> list[int]:
    """Returns for each row the first key that it sees among those of `pages`, counted from the first key of the first of them.

    pages: the numbers of a sequence's pages, ascending, of `block_tokens` tokens each; there may be gaps. positions: of the rows,
    all behind the pages, counted as the pages are. A row at position `p` sees the keys in `(p - window, p]`. A row that sees none
    of the pages gets the number of their keys; it is not sent to the node with these pages. As later rows see no earlier key, the
    rows to send are the first ones.

    >>> first_keys([0, 1, 4], block_tokens=16, positions=[80, 81, 100], window=60)
    [21, 22, 32]
    """
    firsts = []
    for position in positions:
        page, offset = divmod(max(0, position + 1 - window), block_tokens)
        before = bisect_left(pages, page)
        is_there = before < len(pages) and pages[before] == page
        firsts.append(before * block_tokens + (offset if is_there else 0))
    return firsts
