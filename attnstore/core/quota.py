"""Quotas: the bytes that each tenant's pages take on a node, and their maximum.

Owns: the count of bytes by tenant. Invariant: the count is the sum of the sizes of the tenant's taken slots; a tenant without a
quota is bounded by the node's capacity alone.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping


class Quotas:
    """Not thread-safe: one owner calls it."""

    def __init__(self) -> None:
        self._limit_bytes: dict[str, int] = {}
        self._used_bytes: Counter[str] = Counter()

    def limit(self, limit_bytes: Mapping[str, int]) -> None:
        """Replaces all quotas. A tenant that exceeds its quota is in `over` until enough of its pages are evicted."""
        self._limit_bytes = dict(limit_bytes)

    def leaves_room(self, tenant: str, size_bytes: int) -> bool:
        """Returns whether the tenant may take `size_bytes` more."""
        limit = self._limit_bytes.get(tenant)
        return limit is None or self._used_bytes[tenant] + size_bytes <= limit

    def over(self) -> list[str]:
        """Returns the tenants that exceed their quotas."""
        return [tenant for tenant, limit in self._limit_bytes.items() if self._used_bytes[tenant] > limit]

    def took(self, tenant: str, size_bytes: int) -> None:
        """Counts a slot taken for the tenant."""
        self._used_bytes[tenant] += size_bytes

    def gave_back(self, tenant: str, size_bytes: int) -> None:
        """Counts a slot of the tenant given back."""
        self._used_bytes[tenant] -= size_bytes
        assert self._used_bytes[tenant] >= 0, "more was given back than was taken"

    def check(self, used_bytes: Mapping[str, int]) -> None:
        """Asserts that the counts equal those given."""
        assert {tenant: used for tenant, used in self._used_bytes.items() if used} == dict(used_bytes)
