"""A directory in this process: for embedded clusters, static lists of nodes, and tests.

Invariant: it answers as the Redis directory does, with time from the injected clock.
"""

from __future__ import annotations

import asyncio
import itertools
import secrets
from collections import deque
from collections.abc import Sequence

from attnstore.clock import Clock, MonotonicClock
from attnstore.directory.deletions import Deletion
from attnstore.directory.members import EventBatch, Intent, LayoutRecord, Member, Membership, RecordKind, Revision
from attnstore.limits import (
    DELETIONS_IN_BEAT_MAX,
    DELETIONS_MAX,
    DIRECTORY_GAP_MS,
    EVENT_BATCHES_MAX,
    INTENT_MS_MAX,
    LAYOUT_MS_MAX,
    TOMBSTONE_MS_MAX,
)


class MemoryDirectory:
    """See `Directory`. Belongs to one event loop."""

    def __init__(self, clock: Clock | None = None, members: Sequence[Member] = ()) -> None:
        """`members` are present forever, without heartbeats."""
        self._clock = clock or MonotonicClock()
        self._incarnation = secrets.token_hex(8)
        self._number = 0
        self._members: dict[str, Member] = {member.node_id: member for member in members}
        self._until_ms: dict[str, float] = {member.node_id: float("inf") for member in members}
        self._beat_ms = self._clock.now_ms()
        self._intents: dict[str, Intent] = {}
        self._intended_ms: dict[str, float] = {}
        self._quota_bytes: dict[str, int] = {}
        self._layouts: dict[LayoutRecord, float] = {}
        self._batches: deque[tuple[int, EventBatch]] = deque(maxlen=EVENT_BATCHES_MAX)
        self._deletions: deque[tuple[int, float, Deletion]] = deque(maxlen=DELETIONS_MAX)
        self._positions = itertools.count(1)
        self._published = asyncio.Event()

    @property
    def name(self) -> str:
        return "memory"

    @property
    def skipped(self) -> dict[RecordKind, int]:
        return {}

    def check_of(self, member: Member) -> None:
        del member

    async def announce(self, member: Member, ttl_ms: int, known: Revision | None) -> Membership | None:
        now_ms = self._clock.now_ms()
        away_ms = now_ms - self._beat_ms
        if away_ms > DIRECTORY_GAP_MS:
            still_ms = self._until_ms.items()
            self._until_ms = {name: until + away_ms if until > self._beat_ms else until for name, until in still_ms}
        self._beat_ms = now_ms
        await self.membership(known)
        if self._members.get(member.node_id) != member:
            self._members[member.node_id] = member
            self._number += 1
        self._until_ms[member.node_id] = now_ms + ttl_ms
        if member.node_id in self._intents:
            self._intended_ms[member.node_id] = now_ms + INTENT_MS_MAX
        return await self.membership(known)

    async def membership(self, known: Revision | None) -> Membership | None:
        now_ms = self._clock.now_ms()
        judged_ms = self._beat_ms if now_ms - self._beat_ms > DIRECTORY_GAP_MS else now_ms
        for node_id in [node_id for node_id, until_ms in self._until_ms.items() if until_ms <= judged_ms]:
            self._remove(node_id)
        for node_id in [node_id for node_id, until_ms in self._intended_ms.items() if until_ms <= judged_ms]:
            self._forget_intent(node_id)
        revision = Revision(self._incarnation, self._number)
        if revision == known:
            return None
        return Membership(revision, tuple(self._members.values()), dict(self._intents), dict(self._quota_bytes))

    async def withdraw(self, node_id: str) -> None:
        self._remove(node_id)
        self._forget_intent(node_id)

    def _remove(self, node_id: str) -> None:
        if self._members.pop(node_id, None) is not None:
            del self._until_ms[node_id]
            self._number += 1

    def _forget_intent(self, node_id: str) -> None:
        if self._intents.pop(node_id, None) is not None:
            del self._intended_ms[node_id]
            self._number += 1

    async def set_intent(self, node_id: str, intent: Intent | None) -> bool:
        if node_id not in self._members and node_id not in self._intents:
            return False
        self._forget_intent(node_id)
        if intent is not None:
            self._intents[node_id] = intent
            self._intended_ms[node_id] = self._clock.now_ms() + INTENT_MS_MAX
            self._number += 1
        return True

    async def put_layouts(self, layouts: Sequence[LayoutRecord]) -> None:
        until_ms = self._clock.now_ms() + LAYOUT_MS_MAX
        self._layouts.update(dict.fromkeys(layouts, until_ms))

    async def layouts(self) -> list[LayoutRecord]:
        now_ms = self._clock.now_ms()
        self._layouts = {record: until_ms for record, until_ms in self._layouts.items() if until_ms > now_ms}
        return list(self._layouts)

    async def set_quota(self, tenant: str, quota_bytes: int | None) -> None:
        if quota_bytes is None:
            self._quota_bytes.pop(tenant, None)
        else:
            self._quota_bytes[tenant] = quota_bytes
        self._number += 1

    async def publish(self, batch: EventBatch) -> None:
        self._batches.append((next(self._positions), batch))
        self._published.set()
        self._published = asyncio.Event()

    async def events(self, after: str | None, wait_ms: int) -> tuple[list[EventBatch], str]:
        last = self._batches[-1][0] if self._batches else 0
        position = last if after is None else int(after)
        if position == last:
            try:
                async with asyncio.timeout(wait_ms / 1000):
                    await self._published.wait()
            except TimeoutError:
                return [], str(position)
        fresh = [(at, batch) for at, batch in self._batches if at > position]
        return [batch for _, batch in fresh], str(fresh[-1][0] if fresh else position)

    async def publish_deletions(self, node_id: str, deletions: Sequence[Deletion]) -> None:
        del node_id
        self._deletions.extend((next(self._positions), self._clock.now_ms(), deletion) for deletion in deletions)

    async def deletions(self, after: str | None) -> tuple[list[Deletion], str | None]:
        now_ms = self._clock.now_ms()
        fresh = [entry for entry in self._deletions if entry[0] > int(after or 0) and now_ms - entry[1] < TOMBSTONE_MS_MAX]
        fresh = fresh[: 4 * DELETIONS_IN_BEAT_MAX]
        told = [deletion.aged(now_ms - at_ms) for _, at_ms, deletion in fresh]
        return told, str(fresh[-1][0]) if fresh else after

    async def close(self) -> None:
        """No-op."""
