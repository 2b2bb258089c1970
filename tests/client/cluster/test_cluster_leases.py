"""Leases over several nodes, as the client keeps them."""

from __future__ import annotations

import pytest

from attnstore.client.cluster.leases import ClusterLeases, LeasePart
from attnstore.errors import LeaseExpired
from attnstore.testing.clock import ManualClock
from attnstore.types import Lease


def part(lease_ms: int) -> LeasePart:
    return LeasePart(None, Lease(bytes(16), lease_ms), frozenset())  # type: ignore[arg-type]


def test_a_lease_that_ran_out_while_its_nodes_were_asked_is_expired_and_not_a_surprise() -> None:
    """The nodes' answer came late, and another lease was granted meanwhile."""
    clock = ManualClock()
    leases = ClusterLeases(clock)
    late = leases.grant([part(1_000)], holders=1)
    clock.advance_ms(900)
    assert leases.parts(late)
    clock.advance_ms(200)
    leases.grant([part(1_000)], holders=1)
    with pytest.raises(LeaseExpired):
        leases.renewed(late, 1_000)


def test_a_renewed_lease_lives_on_from_the_renewal() -> None:
    clock = ManualClock()
    leases = ClusterLeases(clock)
    lease = leases.grant([part(1_000)], holders=1)
    for _ in range(3):
        clock.advance_ms(900)
        leases.renewed(lease, 1_000)
    assert leases.parts(lease)
    clock.advance_ms(1_000)
    with pytest.raises(LeaseExpired):
        leases.parts(lease)
