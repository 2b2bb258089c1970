"""KV memory of the worker: the block pool, the tiers below it and the transfers between them."""

from __future__ import annotations

from attnstore_worker.cache.assembly import create_cache
from attnstore_worker.cache.loads import admission_of
from attnstore_worker.cache.manager import CacheManager, CacheStatistics
from attnstore_worker.cache.moving.load import Load, LoadEnd, Planner
from attnstore_worker.cache.planning.cost_planner import CostPlanner
from attnstore_worker.cache.planning.fixed_planners import FetchAll, RecomputeAll
from attnstore_worker.cache.planning.observation import Observer, Step, Unobserved
from attnstore_worker.cache.pool.tier import Admission, Tier, TierStatistics
from attnstore_worker.cache.store.base import STORE_TRANSPORTS, OnLayer, PageStore, checked_target, open_store
from attnstore_worker.cache.store.remote import RemoteTier
from attnstore_worker.device.pages import PagePool

__all__ = [
    "STORE_TRANSPORTS",
    "Admission",
    "CacheManager",
    "CacheStatistics",
    "CostPlanner",
    "FetchAll",
    "Load",
    "LoadEnd",
    "Observer",
    "OnLayer",
    "PagePool",
    "PageStore",
    "Planner",
    "RecomputeAll",
    "RemoteTier",
    "Step",
    "Tier",
    "TierStatistics",
    "Unobserved",
    "admission_of",
    "checked_target",
    "create_cache",
    "open_store",
]
