"""Which pages a node has to hand to whom after its cluster has changed, purely.

Invariants: of the nodes that held a segment before a change and are still there, one hands it over; nobody is sent a segment that
it owned before, unless it was restarted with an empty arena since.
"""

from __future__ import annotations

from attnstore.directory.base import NodeState
from attnstore.directory.view import ClusterView


class Moves:
    """What node `node_id` does about the way from one view to another."""

    def __init__(self, node_id: str, before: ClusterView, now: ClusterView) -> None:
        self._node_id = node_id
        self._before = before
        self._now = now
        self._restarted = {
            name for name, member in now.members.items() if name in before.members and before.members[name].epoch != member.epoch
        }

    @property
    def leaves(self) -> bool:
        """The node itself owns nothing any more: everything that it has goes to the owners."""
        own = self._now.members.get(self._node_id)
        return own is not None and own.state is not NodeState.ACTIVE

    @property
    def is_nothing(self) -> bool:
        """No segment has another owner than before."""
        same_owners = self._before.placement == self._now.placement and self._before.replicas == self._now.replicas
        return not self.leaves and same_owners and not self._restarted

    def targets(self, key: bytes) -> list[str]:
        """The nodes that are to be sent the segment by this one."""
        owners = self._now.owners(key)
        if self.leaves:
            return [node_id for node_id in owners if node_id != self._node_id]
        before = self._before.owners(key)
        left = [node_id for node_id in before if node_id in self._now.members and node_id not in self._restarted]
        if left[:1] != [self._node_id]:
            return []
        return [node_id for node_id in owners if node_id not in left]
