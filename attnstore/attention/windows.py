"""Rows that see the keys of a part from a first key on, as the contract of paged attention says it.

Owns: `seeing_from`. A node that answers a windowed query knows each row's first key, but neither its position nor the model's
window.
"""

from __future__ import annotations

from typing import Final

from torch import Tensor

KEYS_MAX: Final = 1 << 30
"""Keys of a part. Larger than any window or context, and twice it fits int32."""


def seeing_from(firsts: Tensor) -> tuple[Tensor, int]:
    """Returns `query_positions` and `sliding_window` with which each row sees every key of its table from `firsts` on.

    firsts: int32 `[total_q]`, 0 to `KEYS_MAX`; 0 sees all keys, a number that is not below the table's keys none.
    """
    return firsts + (KEYS_MAX - 1), KEYS_MAX
