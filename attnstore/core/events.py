"""The events of pages, in order, for subscribers of `Watch`.

Owns: the events that nobody has taken yet.
Invariant: the sequence number rises by one with every event of the node. At most `WATCH_EVENTS_MAX` events are queued; a space that
lost events gets a LAGGED event before the events that follow.
"""

from __future__ import annotations

from collections import deque

from attnstore.limits import WATCH_EVENTS_MAX
from attnstore.types import PageEvent, PageEventKind, Space


class EventLog:
    """A bounded queue of `(space, PageEvent)`."""

    def __init__(self) -> None:
        self._waiting: deque[tuple[Space, PageEvent]] = deque()
        self._dropped: dict[Space, int] = {}
        self._sequence = 0

    def append(self, space: Space, kind: PageEventKind, page_hash: bytes) -> None:
        """Appends an event. If the queue is full, the oldest event is dropped and counted as lost."""
        self._sequence += 1
        if len(self._waiting) == WATCH_EVENTS_MAX:
            loser, _ = self._waiting.popleft()
            self._dropped[loser] = self._dropped.get(loser, 0) + 1
        self._waiting.append((space, PageEvent(kind, page_hash, self._sequence)))

    def take(self) -> list[tuple[Space, PageEvent]]:
        """Returns the events since the last call, preceded by one LAGGED event for each space that lost some.

        A LAGGED event has the number of the last lost event.
        """
        if not self._waiting:
            return []
        events = list(self._waiting)
        if self._dropped:
            last_lost = events[0][1].sequence - 1
            events[:0] = [
                (space, PageEvent(PageEventKind.LAGGED, b"", last_lost, dropped)) for space, dropped in self._dropped.items()
            ]
            self._dropped.clear()
        self._waiting.clear()
        return events
