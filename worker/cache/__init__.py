"""KV memory of the worker: the block pool, the tiers below it and the transfers between them."""

from __future__ import annotations

from worker.cache.assembly import SharedUse, TierOptions, create_cache
from worker.cache.cost_planner import CostPlanner
from worker.cache.layer_gate import LayerGate
from worker.cache.load_plan import FetchAll, Planner, RecomputeAll
from worker.cache.loading import Admission, Loading
from worker.cache.manager import CacheManager, CacheStatistics
from worker.cache.observation import LoadEnd, Observer, Step, Unobserved
from worker.cache.page_store import STORE_TRANSPORTS, OnLayer, PageStore, checked_target, open_store
from worker.cache.pages import PagePool
from worker.cache.remote import RemoteTier
from worker.cache.tier import Tier, TierStatistics
from worker.cache.writers import WRITE_POLICIES

__all__ = [
    "STORE_TRANSPORTS",
    "WRITE_POLICIES",
    "Admission",
    "CacheManager",
    "CacheStatistics",
    "CostPlanner",
    "FetchAll",
    "LayerGate",
    "LoadEnd",
    "Loading",
    "Observer",
    "OnLayer",
    "PagePool",
    "PageStore",
    "Planner",
    "RecomputeAll",
    "RemoteTier",
    "SharedUse",
    "Step",
    "Tier",
    "TierOptions",
    "TierStatistics",
    "Unobserved",
    "checked_target",
    "create_cache",
    "open_store",
]
