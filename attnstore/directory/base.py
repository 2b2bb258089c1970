"""The contract of a directory, which stores the members of a cluster and the state that they share.

Owns: `Directory`. Invariant: a directory is a hint. A wrong or missing answer costs at most a miss, and no page waits for a call.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

from attnstore.directory.deletions import Deletion
from attnstore.directory.members import EventBatch, Intent, LayoutRecord, Member, Membership, RecordKind, Revision
from attnstore.directory.trust import MemberCheck


class Directory(Protocol):
    """All calls raise `Unavailable` if the directory does not answer within its own short time limit.

    Records that no member of this cluster can have written are skipped, as if they did not exist.
    """

    @property
    def name(self) -> str:
        """The address of the directory, without secrets; for messages."""
        ...

    @property
    def skipped(self) -> Mapping[RecordKind, int]:
        """The number of records of each kind that were skipped in the last answer that contained the kind."""
        ...

    def check_of(self, member: Member) -> MemberCheck | None:
        """Returns the check that identifies a member before anything is sent to its URL, or None if nothing is checked."""
        ...

    async def announce(self, member: Member, ttl_ms: int, known: Revision | None) -> Membership | None:
        """Sends a heartbeat: `member` is present for `ttl_ms` more. Returns the membership, or None if `known` is still current."""
        ...

    async def membership(self, known: Revision | None) -> Membership | None:
        """Returns the membership, or None if `known` is still current."""
        ...

    async def withdraw(self, node_id: str) -> None:
        """Removes a node that leaves, with its intent. No-op for an unknown node."""
        ...

    async def set_intent(self, node_id: str, intent: Intent | None) -> bool:
        """Sets what operators want of a node, until it leaves or for `INTENT_MS_MAX` after its last heartbeat.

        Returns False if there is no such member and no intent for it.
        """
        ...

    async def put_layouts(self, layouts: Sequence[LayoutRecord]) -> None:
        """Publishes layouts for a day."""
        ...

    async def layouts(self) -> list[LayoutRecord]:
        """Returns the layouts published during the last day."""
        ...

    async def set_quota(self, tenant: str, quota_bytes: int | None) -> None:
        """Sets how many bytes a tenant's pages may take on all nodes together; None removes the quota."""
        ...

    async def publish(self, batch: EventBatch) -> None:
        """Appends to the stream of events, which keeps a bounded number of batches."""
        ...

    async def events(self, after: str | None, wait_ms: int) -> tuple[list[EventBatch], str]:
        """Returns the batches after a position, waiting for the first one, and the next position. `after=None` means
        from now on.
        """
        ...

    async def publish_deletions(self, node_id: str, deletions: Sequence[Deletion]) -> None:
        """Stores deletions for nodes that are away, in bounded number."""
        ...

    async def deletions(self, after: str | None) -> tuple[list[Deletion], str | None]:
        """Returns deletions after a position with their current age, possibly only some of them, and the next position. None means
        all.
        """
        ...

    async def close(self) -> None:
        """Closes the connections."""
        ...
