"""Which sequences attend to blocks that stay in the store."""

from __future__ import annotations

import enum


class AttendPolicy(enum.Enum):
    """Which sequences attend to blocks in the store: none, those that cannot fit into the pool, all that find blocks there."""

    NEVER = "never"
    BEYOND_POOL = "beyond_pool"
    ALWAYS = "always"
