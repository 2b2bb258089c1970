"""Deletions published through the directory, for nodes that could not be reached: hung, cut off, or not yet started.

Owns: the format of a deletion's record, and a node's queue of deletions to publish. Invariants: ages are durations, so that the
clocks of two machines are never compared; the queue is bounded, and if it is full the tenant with the most entries loses its
oldest, which is logged; tenants take turns, so that one that deletes much does not delay the others.
"""

from __future__ import annotations

import json
import threading
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self

from attnstore.clock import Clock
from attnstore.directory.members import reading_record, record_fields
from attnstore.errors import ProtocolError
from attnstore.limits import (
    DELETION_HASHES_MAX,
    DELETIONS_IN_BEAT_MAX,
    DELETIONS_MAX,
    HASH_BYTES,
    PAGE_AGE_MS_MAX,
    TOMBSTONE_MS_MAX,
)
from attnstore.logs import get_logger
from attnstore.types import Space

_log = get_logger(__name__)

_Dated = tuple[float, "Deletion"]
"""With the clock's time at which the age was right."""


@dataclass(frozen=True, slots=True)
class Deletion:
    """Pages of one space that were deleted `age_ms` ago."""

    space: Space
    hashes: tuple[bytes, ...]
    age_ms: int

    def to_json(self) -> str:
        """Returns one line."""
        return json.dumps([self.space.tenant, self.space.namespace.hex(), b"".join(self.hashes).hex(), self.age_ms])

    @classmethod
    def from_json(cls, text: str | bytes) -> Self:
        """The inverse of `to_json`. Raises `ProtocolError` for any other text."""
        with reading_record("deletion"):
            tenant, namespace, joined, age_ms = record_fields(text)
            hashes = bytes.fromhex(joined)
            parts = tuple(hashes[at : at + HASH_BYTES] for at in range(0, len(hashes), HASH_BYTES))
            deletion = cls(Space(str(tenant), bytes.fromhex(namespace)), parts, int(age_ms))
        good_size = len(deletion.space.namespace) == HASH_BYTES and len(hashes) % HASH_BYTES == 0
        if not (good_size and len(parts) <= DELETION_HASHES_MAX and 0 <= deletion.age_ms <= PAGE_AGE_MS_MAX):
            raise ProtocolError("the directory's record of a deletion is out of bounds")
        return deletion

    def aged(self, more_ms: float) -> Self:
        """Returns the same deletion, `ms` later."""
        return replace(self, age_ms=self.age_ms + max(0, int(more_ms)))


class DeletionFeed:
    """The deletions that one node has to publish. Safe from any thread."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._queues: dict[str, deque[_Dated]] = {}  # by tenant, the next one to take from first; none is empty
        self._count = 0
        self._lock = threading.Lock()

    def offer(self, space: Space, hashes: Sequence[bytes]) -> None:
        """Queues pages that are deleted now."""
        now_ms = self._clock.now_ms()
        parts = (hashes[begin : begin + DELETION_HASHES_MAX] for begin in range(0, len(hashes), DELETION_HASHES_MAX))
        with self._lock:
            for part in parts:
                self._queues.setdefault(space.tenant, deque()).append((now_ms, Deletion(space, tuple(part), 0)))
                self._count += 1
            lost = self._count - DELETIONS_MAX
            for _ in range(lost):
                self._next(max(self._queues, key=lambda tenant: len(self._queues[tenant])))
        if lost > 0:
            _log.warning("deletions are not told to nodes that are away: there are too many", deletions=lost)

    def take(self) -> list[Deletion]:
        """Returns what this heartbeat publishes, with current ages: from each tenant in turn its oldest deletion."""
        now_ms = self._clock.now_ms()
        taken: list[_Dated] = []
        with self._lock:
            while self._queues and len(taken) < DELETIONS_IN_BEAT_MAX:
                tenant = next(iter(self._queues))
                taken.append(self._next(tenant))
                if tenant in self._queues:
                    self._queues[tenant] = self._queues.pop(tenant)
        return [deletion.aged(now_ms - at_ms) for at_ms, deletion in taken if now_ms - at_ms < TOMBSTONE_MS_MAX]

    def lost(self, deletions: Sequence[Deletion]) -> None:
        """Queues deletions again that could not be published."""
        now_ms = self._clock.now_ms()
        with self._lock:
            for deletion in reversed(deletions):
                self._queues.setdefault(deletion.space.tenant, deque()).appendleft((now_ms, deletion))
            self._count += len(deletions)

    def _next(self, tenant: str) -> _Dated:
        queue = self._queues[tenant]
        self._count -= 1
        if len(queue) == 1:
            del self._queues[tenant]
        return queue.popleft()
