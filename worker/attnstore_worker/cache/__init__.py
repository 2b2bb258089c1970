"""KV memory of the worker: the block pool, the tiers below it and the transfers between them."""

from __future__ import annotations

from attnstore_worker.cache.assembly import SharedUse, TierOptions, create_cache
from attnstore_worker.cache.cost_planner import CostPlanner
from attnstore_worker.cache.layer_gate import LayerGate
from attnstore_worker.cache.load_plan import FetchAll, Planner, RecomputeAll
from attnstore_worker.cache.loading import Admission, Loading
from attnstore_worker.cache.manager import CacheManager, CacheStatistics
from attnstore_worker.cache.observation import LoadEnd, Observer, Step, Unobserved
from attnstore_worker.cache.page_store import STORE_TRANSPORTS, OnLayer, PageStore, checked_target, open_store
from attnstore_worker.cache.pages import PagePool
from attnstore_worker.cache.remote import RemoteTier
from attnstore_worker.cache.tier import Tier, TierStatistics
from attnstore_worker.cache.writers import WRITE_POLICIES

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
