"""KV memory of the worker: the block pool, the tiers below it and the transfers between them."""

from __future__ import annotations

from worker.cache.manager import Admission, CacheManager, CacheStatistics
from worker.cache.page_store import STORE_TRANSPORTS, PageStore, open_store
from worker.cache.pages import PagePool
from worker.cache.remote import RemoteTier

__all__ = ["STORE_TRANSPORTS", "Admission", "CacheManager", "CacheStatistics", "PagePool", "PageStore", "RemoteTier", "open_store"]
