"""The view of a cluster that a node or worker computes from the directory's answers: current and previous owners of segments.

Owns: the view over time, purely: memberships and the time are passed in, views are returned. Invariants: without a new membership
the view stays as it is, forever; after a directory has lost its data, no node is removed until every node had time for a heartbeat;
a segment's previous owners are known for `PREVIOUS_OWNERS_MS_MAX` after a change, while they are members.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from attnstore.core.placement import Placement
from attnstore.directory.members import Member, Membership, NodeState, Revision
from attnstore.limits import HOT_REPLICAS, MEMBER_MS_MAX, PREVIOUS_OWNERS_MAX, PREVIOUS_OWNERS_MS_MAX


@dataclass(frozen=True, slots=True)
class ClusterView:
    """A cluster at one moment: members by node id, the current placement of segments, and previous ones, newest first.

    `hot` are the keys of the segments that some member reports as hot; they have at least `HOT_REPLICAS` copies.
    """

    members: Mapping[str, Member]
    placement: Placement
    previous: tuple[Placement, ...] = ()
    quota_bytes: Mapping[str, int] = field(default_factory=dict)
    hot: frozenset[bytes] = frozenset()

    @property
    def replicas(self) -> int:
        """Copies of each segment: the maximum that any member is configured to keep."""
        return max((member.replicas for member in self.members.values()), default=1)

    def quota_bytes_of(self, node_id: str) -> dict[str, int]:
        """Returns tenant -> bytes that its pages may take on one node: the node's part of the quota, by weight like
        the segments.
        """
        total = sum(self.placement.weights.values())
        part = self.placement.weights.get(node_id, 0.0) / total if total else 0.0
        return {tenant: int(quota_bytes * part) for tenant, quota_bytes in self.quota_bytes.items()}

    def owners(self, key: bytes, usable: Iterable[str] | None = None) -> list[str]:
        """Returns the nodes to which a segment is written, the first owner first: `replicas` of them, or as many as there are.

        With `usable`, other nodes are skipped as if they had left.
        """
        ranked = self.placement.ranked(key)
        if usable is not None:
            wanted = set(usable)
            ranked = [node_id for node_id in ranked if node_id in wanted]
        return ranked[: self.copies(key)]

    def copies(self, key: bytes) -> int:
        """Returns the number of nodes that own a segment."""
        return max(self.replicas, HOT_REPLICAS) if key in self.hot else self.replicas

    def holders(self, key: bytes, usable: Iterable[str] | None = None, *, turn: int = 0) -> list[str]:
        """Returns the nodes that may hold a segment, the likeliest first: its owners, then its owners before the last changes.

        Callers that increment `turn` spread over the owners of a hot segment.
        """
        holders = self.owners(key, usable)
        if turn and holders and key in self.hot:
            first = turn % len(holders)
            holders = holders[first:] + holders[:first]
        allowed = self.members.keys() if usable is None else set(usable)
        for placement in self.previous:
            for node_id in placement.ranked(key)[: self.replicas]:
                if node_id in allowed and node_id in self.members and node_id not in holders:
                    holders.append(node_id)
        return holders


class ViewTracker:
    """Turns memberships into views. Not thread-safe: one owner calls it."""

    def __init__(self) -> None:
        self.view = ClusterView({}, Placement({}))
        self._revision: Revision | None = None
        self._trusted_from_ms = float("-inf")
        self._present: dict[str, Member] = {}
        self._history: list[tuple[float, Placement]] = []

    @property
    def known(self) -> Revision | None:
        """The revision to name in the next request to the directory; None requests everything."""
        return self._revision

    def observe(self, membership: Membership | None, now_ms: float) -> ClusterView:
        """Returns the view after an answer of the directory; None means that nothing has changed."""
        if membership is not None:
            if self._revision is not None and membership.revision.incarnation != self._revision.incarnation:
                self._trusted_from_ms = now_ms + MEMBER_MS_MAX
            self._revision = membership.revision
            self._present = membership.present()
        members = dict(self._present)
        if now_ms < self._trusted_from_ms:
            evicted = set(membership.intents) - members.keys() if membership is not None else set()
            members = {**{name: member for name, member in self.view.members.items() if name not in evicted}, **members}
        quota_bytes = membership.quota_bytes if membership is not None else self.view.quota_bytes
        self._move_to(members, quota_bytes, now_ms)
        return self.view

    def _move_to(self, members: dict[str, Member], quota_bytes: Mapping[str, int], now_ms: float) -> None:
        placement = Placement({name: member.weight for name, member in members.items() if member.state is NodeState.ACTIVE})
        if placement != self.view.placement:
            self._history.insert(0, (now_ms + PREVIOUS_OWNERS_MS_MAX, self.view.placement))
        self._history = [entry for entry in self._history if entry[0] > now_ms][:PREVIOUS_OWNERS_MAX]
        previous = [earlier for _, earlier in self._history if earlier.weights]
        everyone = Placement({name: member.weight for name, member in members.items()})
        if everyone != placement:
            # A reader that sees this cluster for the first time knows no previous placement; draining nodes imply one.
            previous.insert(0, everyone)
        hot = frozenset(key for member in members.values() for key in member.hot)
        view = ClusterView(members, placement, tuple(previous), quota_bytes, hot)
        if view != self.view:
            self.view = view
