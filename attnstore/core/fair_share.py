"""One limit of a node, shared fairly among its tenants.

Owns: how much of a limit each tenant holds, and whether it may take more. Invariants: the tenants together never hold more than the
limit; each tenant can always hold `guaranteed` units, whatever the others do; beyond those, a tenant may hold at most
`HELD_OF_FREE` times the units that are then free, except that a tenant without a unit may take one.

Half of the limit is guaranteed, in equal parts. The other half follows the rule of shared-memory switches (Choudhury and Hahne
1998, "Dynamic Queue Length Thresholds for Shared-Memory Packet Switches"). The rule adapts to the number of active tenants; a fixed
part for each of a hundred tenants would be too small for the three that are busy. With one tenant, nothing is reserved for others.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from attnstore.errors import Overloaded

HELD_OF_FREE: Final = 4


class FairShares:
    """`limit` units of `what`, for a node that serves `tenants` tenants. A refusal's message ends with `remedy`.

    Not thread-safe: one owner calls it.
    """

    def __init__(self, limit: int, what: str, remedy: str, *, tenants: int = 1) -> None:
        self._limit = limit
        self._what = what
        self._remedy = remedy
        self._tenants = tenants
        self.guaranteed = limit // (2 * tenants)
        self._held: dict[str, int] = {}  # only tenants that hold more than 0
        self._used = 0
        self._used_guaranteed = 0

    @property
    def used(self) -> int:
        """The units held by all tenants together."""
        return self._used

    @property
    def held(self) -> Mapping[str, int]:
        """The units held by each tenant that holds any."""
        return self._held

    def fits(self, tenant: str, units: int = 1) -> bool:
        """Returns whether the tenant may take `units` more."""
        if self._used + units > self._limit:
            return False
        if self._tenants == 1:
            return True
        held = self._held.get(tenant, 0)
        if held + units <= self.guaranteed:
            return True
        kept_for_others = self.guaranteed * (self._tenants - 1) - (self._used_guaranteed - min(held, self.guaranteed))
        free_after = self._limit - self._used - units - max(0, kept_for_others)
        beyond_guarantee = held + units - self.guaranteed
        return free_after >= 0 and beyond_guarantee <= max(not held, HELD_OF_FREE * free_after)

    def require(self, tenant: str, units: int = 1) -> None:
        """Raises `Overloaded` unless `fits`."""
        if not self.fits(tenant, units):
            held = self._held.get(tenant, 0)
            raise Overloaded(
                f"of this node's {self._limit} {self._what} the tenant holds {held} and others {self._used - held}; "
                f"{units} more would pass the tenant's share: {self._remedy}"
            )

    def take(self, tenant: str, units: int = 1) -> None:
        """Takes units for the tenant. Raises `Overloaded` unless `fits`."""
        if not self.fits(tenant, units):
            self.require(tenant, units)
        self._count(tenant, units)

    def give_back(self, tenant: str, units: int = 1) -> None:
        """Undoes `take`."""
        assert units <= self._held.get(tenant, 0), "more is given back than was taken"
        self._count(tenant, -units)

    def _count(self, tenant: str, units: int) -> None:
        before = self._held.get(tenant, 0)
        after = before + units
        if after:
            self._held[tenant] = after
        else:
            self._held.pop(tenant, None)
        self._used += units
        if self._tenants > 1:
            guaranteed = self.guaranteed
            self._used_guaranteed += (after if after < guaranteed else guaranteed) - (before if before < guaranteed else guaranteed)
