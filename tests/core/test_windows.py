"""The edge of a sliding window in a set of pages, against the definition."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from attnstore.core.windows import first_keys


@given(st.sets(st.integers(0, 12), max_size=9), st.integers(1, 7), st.integers(1, 120), st.lists(st.integers(0, 60), max_size=5))
def test_a_row_sees_from_its_first_key_on_exactly_what_lies_in_its_window(
    pages: set[int], block_tokens: int, window: int, ahead: list[int]
) -> None:
    ordered = sorted(pages)
    end = block_tokens * (ordered[-1] + 1 if ordered else 0)
    keys = [page * block_tokens + token for page in ordered for token in range(block_tokens)]
    positions = [end + distance for distance in ahead]
    for position, first in zip(positions, first_keys(ordered, block_tokens, positions, window), strict=True):
        assert keys[first:] == [key for key in keys if key > position - window]
        assert 0 <= first <= len(keys)
