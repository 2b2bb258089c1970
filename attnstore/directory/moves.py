"""Which pages a node hands over, and to which nodes, after its cluster has changed. Pure.

Owns: the choice of sender and targets. Invariants: of the nodes that held a segment before a change and are still present, exactly
one hands it over; a segment is not sent to a node that owned it before, unless that node was restarted with an empty arena since.
"""

from __future__ import annotations

from collections.abc import Sequence

from attnstore.directory.members import NodeState
from attnstore.directory.view import ClusterView


def is_same_cluster(left: ClusterView, right: ClusterView) -> bool:
    """Returns whether every segment has the same owners in both views, in the same incarnations."""
    return (
        left.placement == right.placement
        and left.replicas == right.replicas
        and {name: member.epoch for name, member in left.members.items()}
        == {name: member.epoch for name, member in right.members.items()}
    )


class Moves:
    """The moves of node `node_id` in view `now`, if pages may have been written in any of the views `before`."""

    def __init__(self, node_id: str, before: Sequence[ClusterView], now: ClusterView) -> None:
        self._node_id = node_id
        self._before = before
        self._now = now

    @property
    def leaves(self) -> bool:
        """True if the node owns nothing any more, so that all its pages go to the owners."""
        own = self._now.members.get(self._node_id)
        return own is not None and own.state is not NodeState.ACTIVE

    def targets(self, key: bytes) -> list[str]:
        """Returns the nodes to which this node must send the segment."""
        owners = self._now.owners(key)
        if self.leaves:
            return [node_id for node_id in owners if node_id != self._node_id]
        lacking: set[str] = set()
        for view in self._before:
            left = [node_id for node_id in view.owners(key) if self._is_still_there(node_id, view)]
            if left[:1] == [self._node_id]:
                lacking.update(set(owners) - set(left))
        return [node_id for node_id in owners if node_id in lacking]

    def _is_still_there(self, node_id: str, view: ClusterView) -> bool:
        member = self._now.members.get(node_id)
        return member is not None and member.epoch == view.members[node_id].epoch
