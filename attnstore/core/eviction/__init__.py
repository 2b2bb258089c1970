"""Eviction policies: one contract (`base`), one module per policy, and a factory by name."""

from __future__ import annotations

from attnstore.core.eviction.base import EvictionPolicy, Item
from attnstore.core.eviction.factory import EVICTION_POLICIES, create_eviction_policy
from attnstore.core.eviction.fifo import FirstInFirstOut
from attnstore.core.eviction.look_ahead import LookAhead
from attnstore.core.eviction.lru import LeastRecentlyUsed
from attnstore.core.eviction.s3_fifo import S3Fifo

__all__ = [
    "EVICTION_POLICIES",
    "EvictionPolicy",
    "FirstInFirstOut",
    "Item",
    "LeastRecentlyUsed",
    "LookAhead",
    "S3Fifo",
    "create_eviction_policy",
]
