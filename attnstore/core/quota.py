"""How many bytes each tenant's pages take on a node, and the most that they may.

Owns: the count of bytes by tenant. Invariant: the count is the sum of the tenant's slots, arriving and sealed; a tenant without a
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
        """Sets all quotas. Whoever is over its own is `over` until enough of its pages were evicted."""
        self._limit_bytes = dict(limit_bytes)

    def leaves_room(self, tenant: str, size_bytes: int) -> bool:
        """Whether the tenant may take so many bytes more."""
        limit = self._limit_bytes.get(tenant)
        return limit is None or self._used_bytes[tenant] + size_bytes <= limit

    def over(self) -> list[str]:
        """Tenants that take more bytes than they may."""
        return [tenant for tenant, limit in self._limit_bytes.items() if self._used_bytes[tenant] > limit]

    def took(self, tenant: str, size_bytes: int) -> None:
        """A slot was taken for the tenant."""
        self._used_bytes[tenant] += size_bytes

    def gave_back(self, tenant: str, size_bytes: int) -> None:
        """A slot of the tenant's was given back."""
        self._used_bytes[tenant] -= size_bytes
        assert self._used_bytes[tenant] >= 0, "more was given back than was taken"

    def check(self, used_bytes: Mapping[str, int]) -> None:
        """Asserts that the count is this one."""
        assert {tenant: used for tenant, used in self._used_bytes.items() if used} == dict(used_bytes)
