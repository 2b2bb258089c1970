"""The allocation of places in lent memory."""

from __future__ import annotations

import itertools

import pytest

from attnstore.client.transports.lent import LentMemory
from attnstore.limits import SHM_LENT_BYTES_MAX, SHM_TAKE_PAGES_MAX


@pytest.mark.parametrize("page_bytes", [1, 4096, 100_000, 3 << 20, 40 << 20])
def test_lent_memory_never_gives_a_place_away_twice(page_bytes: int) -> None:
    lent = LentMemory(page_bytes)
    lent.close_file()
    page = memoryview(bytes(page_bytes))
    assert lent.size_bytes <= SHM_LENT_BYTES_MAX
    assert lent.free >= 2
    offered: list[list[int]] = []
    for count in lent.groups(100 if page_bytes < 1 << 20 else 7):
        assert 1 <= count <= SHM_TAKE_PAGES_MAX
        while lent.free < count:
            lent.give_back(len(offered.pop(0)))
        offered.append([lent.put(page)[1] for _ in range(count)])
        begins = sorted(begin for group in offered for begin in group)
        assert all(second - first >= page_bytes for first, second in itertools.pairwise(begins))
        assert begins[-1] + page_bytes <= lent.size_bytes
