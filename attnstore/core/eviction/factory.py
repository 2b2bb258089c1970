"""Eviction policies by name.

Owns: the names. Invariant: every call returns a new, empty policy. Exists so that an option or an experiment can choose a policy
without importing the classes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

from attnstore.core.eviction.base import EvictionPolicy, Item
from attnstore.core.eviction.fifo import FirstInFirstOut
from attnstore.core.eviction.look_ahead import LookAhead
from attnstore.core.eviction.lru import LeastRecentlyUsed
from attnstore.core.eviction.s3_fifo import S3Fifo
from attnstore.errors import InvalidArgument

_POLICIES: Final[dict[str, Callable[[], EvictionPolicy[Any]]]] = {
    "lru": LeastRecentlyUsed,
    "fifo": FirstInFirstOut,
    "s3-fifo": S3Fifo,
    "look-ahead": LookAhead,
}
EVICTION_POLICIES: Final = tuple(_POLICIES)
"""The names that `create_eviction_policy` knows."""


def create_eviction_policy(name: str) -> EvictionPolicy[Item]:
    """Returns a new policy, one of `EVICTION_POLICIES`. Raises `InvalidArgument` for any other name."""
    if name not in _POLICIES:
        raise InvalidArgument(f"eviction policy {name!r} is unknown; choose one of {', '.join(EVICTION_POLICIES)}")
    return _POLICIES[name]()
