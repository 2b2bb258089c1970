"""The contract of a directory, which knows the members of a cluster and what they share.

Owns: `Directory`. Invariant: a directory is a hint. A wrong or missing answer costs at most a miss, and no page waits for a call.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

from attnstore.directory.deletions import Deletion
from attnstore.directory.members import EventBatch, Intent, LayoutRecord, Member, Membership, RecordKind, Revision
from attnstore.directory.trust import MemberCheck


class Directory(Protocol):
    """All calls raise `Unavailable` where the directory does not answer within its own short time limit.

    Records that nobody of this cluster can have written are skipped, as if they were not there.
    """

    @property
    def name(self) -> str:
        """Where the directory is, without secrets; for messages."""
        ...

    @property
    def skipped(self) -> Mapping[RecordKind, int]:
        """How many records of each kind were skipped in the last answer that had some of the kind."""
        ...

    def check_of(self, member: Member) -> MemberCheck | None:
        """How a member is told from whoever else answers at its URL before anything is sent there; None for not at all."""
        ...

    async def announce(self, member: Member, ttl_ms: int, known: Revision | None) -> Membership | None:
        """A heartbeat: `member` is here for `ttl_ms` more. The membership, or None where it is still the known one."""
        ...

    async def membership(self, known: Revision | None) -> Membership | None:
        """The membership, or None where it is still the known one."""
        ...

    async def withdraw(self, node_id: str) -> None:
        """The node has left, and what operators wanted of it with it. Of an unknown node: nothing."""
        ...

    async def set_intent(self, node_id: str, intent: Intent | None) -> bool:
        """What operators want of a node from now on, until it leaves or for `INTENT_MS_MAX` after it was last heard of.

        False where there is no such member, nor one that was lately and of which something is wanted.
        """
        ...

    async def put_layouts(self, layouts: Sequence[LayoutRecord]) -> None:
        """Makes layouts known for a day."""
        ...

    async def layouts(self) -> list[LayoutRecord]:
        """The layouts that nodes made known during the last day."""
        ...

    async def set_quota(self, tenant: str, quota_bytes: int | None) -> None:
        """How many bytes a tenant's pages may take on all nodes together; None lifts the quota."""
        ...

    async def publish(self, batch: EventBatch) -> None:
        """Appends to the stream of events, which keeps a bounded number of batches."""
        ...

    async def events(self, after: str | None, wait_ms: int) -> tuple[list[EventBatch], str]:
        """The batches after a position, waiting for the first one, and the next position. `after=None`: from now on."""
        ...

    async def publish_deletions(self, node_id: str, deletions: Sequence[Deletion]) -> None:
        """Keeps deletions for nodes that are away, a bounded number of them."""
        ...

    async def deletions(self, after: str | None) -> tuple[list[Deletion], str | None]:
        """Deletions after a position, with their age now, a part of them if there are many, and the next position. None: all."""
        ...

    async def close(self) -> None:
        """Lets connections go."""
        ...
