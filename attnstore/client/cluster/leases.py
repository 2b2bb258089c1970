"""Leases over several nodes: one lease for the caller, one on each node with found pages.

Owns: the parts of each lease of this client. Invariant: an entry is removed when it is released or expires, so no lease is kept
here longer than on the nodes.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass

from attnstore.client.cluster.node_link import NodeLink
from attnstore.client.transports.mapped import PageViews
from attnstore.clock import Clock
from attnstore.errors import LeaseExpired
from attnstore.limits import LEASE_ID_BYTES
from attnstore.types import Lease


@dataclass(frozen=True, slots=True)
class LeasePart:
    """The lease on one node."""

    link: NodeLink
    lease: Lease
    hashes: frozenset[bytes]

    async def renew(self, lease_ms: int, deadline_ms: float) -> Lease:
        """`AsyncClient.renew` of this part."""
        return await self.link.call(lambda client: client.renew(self.lease, lease_ms, deadline_ms=deadline_ms))

    async def release(self, deadline_ms: float) -> bool:
        """`AsyncClient.release` of this part."""
        return await self.link.call(lambda client: client.release(self.lease, deadline_ms=deadline_ms))

    async def view(
        self, namespace: bytes, hashes: Sequence[bytes], layers: tuple[int, int] | None, deadline_ms: float
    ) -> PageViews:
        """`AsyncClient.view` of pages of this part."""
        return await self.link.call(
            lambda client: client.view(namespace, hashes, lease=self.lease, layers=layers, deadline_ms=deadline_ms)
        )


@dataclass(slots=True)
class _Entry:
    parts: tuple[LeasePart, ...]
    holders: int
    until_ms: float


class ClusterLeases:
    """Leases by their ids. Belongs to one event loop."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._entries: dict[bytes, _Entry] = {}

    def grant(self, parts: Sequence[LeasePart], holders: int) -> Lease:
        """Returns one lease for all the parts, as long as the shortest; it ends when each of `holders` callers has released it."""
        now_ms = self._clock.now_ms()
        for lease_id in [lease_id for lease_id, entry in self._entries.items() if entry.until_ms <= now_ms]:
            del self._entries[lease_id]
        lease = Lease(secrets.token_bytes(LEASE_ID_BYTES), min(part.lease.lease_ms for part in parts))
        self._entries[lease.lease_id] = _Entry(tuple(parts), holders, now_ms + lease.lease_ms)
        return lease

    def parts(self, lease: Lease) -> tuple[LeasePart, ...]:
        """Returns the parts of a lease. Raises `LeaseExpired`."""
        entry = self._entries.get(lease.lease_id)
        if entry is None or entry.until_ms <= self._clock.now_ms():
            raise LeaseExpired("the lease is unknown or ran out: match again")
        return entry.parts

    def renewed(self, lease: Lease, lease_ms: int) -> Lease:
        """Returns the lease after all its parts were renewed. Raises `LeaseExpired` if it expired here, or was
        released, meanwhile.
        """
        self.parts(lease)
        self._entries[lease.lease_id].until_ms = self._clock.now_ms() + lease_ms
        return Lease(lease.lease_id, lease_ms)

    def release(self, lease: Lease) -> tuple[LeasePart, ...]:
        """Returns the parts to be released on their nodes now: none while the lease has other holders."""
        entry = self._entries.get(lease.lease_id)
        if entry is None:
            return ()
        entry.holders -= 1
        if entry.holders > 0:
            return ()
        del self._entries[lease.lease_id]
        return entry.parts if entry.until_ms > self._clock.now_ms() else ()
