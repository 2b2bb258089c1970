"""Page events for watchers: every watcher has a bounded queue, and a slow watcher is told how many events it missed.

Invariant: publishing never waits and never grows without bound; a watcher receives events in order, with a LAGGED event in place of
a gap.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

from attnstore.core.fair_share import FairShares
from attnstore.errors import Unavailable
from attnstore.limits import WATCH_EVENTS_MAX, WATCHED_EVENTS_MAX
from attnstore.types import PageEvent, PageEventKind, Space

Publish = Callable[[Iterable[tuple[Space, PageEvent]]], None]


class Subscription:
    """One watcher's queue. `shares` limits the events in the queues of all watchers together."""

    def __init__(self, tenant: str, shares: FairShares) -> None:
        self._tenant = tenant
        self._shares = shares
        self._events: deque[PageEvent] = deque()
        self._dropped = 0
        self._closed = False
        self._filled = asyncio.Event()

    def offer(self, event: PageEvent) -> None:
        """Queues an event. If the queue is full or the tenant's share is used up, this event and all following ones are dropped and
        counted until the next `take`.
        """
        if self._dropped or len(self._events) >= WATCH_EVENTS_MAX or not self._shares.fits(self._tenant):
            self._dropped += event.dropped or 1
        else:
            self._shares.take(self._tenant)
            self._events.append(event)
        self._filled.set()

    def close(self) -> None:
        """Ends the subscription of the watcher."""
        self._closed = True
        self._filled.set()

    async def take(self) -> list[PageEvent]:
        """Waits for events and takes all queued ones, followed by a LAGGED if some were dropped after them.

        Raises `Unavailable` when the node drains.
        """
        await self._filled.wait()
        if self._closed:
            raise Unavailable("the node is draining; watch another one or try again later")
        self._filled.clear()
        events = self._emptied()
        if self._dropped:
            events.append(PageEvent(PageEventKind.LAGGED, b"", events[-1].sequence if events else 0, self._dropped))
            self._dropped = 0
        return events

    def end(self) -> None:
        """Discards the queued events."""
        self._emptied()

    def _emptied(self) -> list[PageEvent]:
        events = list(self._events)
        self._events.clear()
        if events:
            self._shares.give_back(self._tenant, len(events))
        return events


class EventHub:
    """Delivers the page table's events to the watchers of each space, on the event loop that created it."""

    def __init__(self, loop: asyncio.AbstractEventLoop, tenants: int = 1) -> None:
        self._loop = loop
        self._shares = FairShares(WATCHED_EVENTS_MAX, "events that wait for watchers", "take them faster", tenants=tenants)
        self._subscriptions: dict[Space, set[Subscription]] = {}

    def publish(self, events: Iterable[tuple[Space, PageEvent]]) -> None:
        """Offers each `(space, event)` to the watchers of its space. Safe from any thread; keeps the order of calls."""
        if not self._subscriptions:
            return
        watched = [(space, event) for space, event in events if space in self._subscriptions]
        if watched:
            self._loop.call_soon_threadsafe(self._deliver, watched)

    def publish_also_to(self, other: Callable[[Sequence[tuple[Space, PageEvent]]], None]) -> Publish:
        """Returns a `publish` that also passes the events of all spaces, watched or not, to `other`."""

        def publish(events: Iterable[tuple[Space, PageEvent]]) -> None:
            happened = list(events)
            self.publish(happened)
            other(happened)

        return publish

    def _deliver(self, events: Iterable[tuple[Space, PageEvent]]) -> None:
        for space, event in events:
            for subscription in self._subscriptions.get(space, ()):
                subscription.offer(event)

    def close(self) -> None:
        """Ends the subscriptions of all watchers."""
        for subscriptions in self._subscriptions.values():
            for subscription in subscriptions:
                subscription.close()

    @contextmanager
    def subscribed(self, space: Space) -> Iterator[Subscription]:
        """Yields a subscription that ends with the `with` block."""
        subscription = Subscription(space.tenant, self._shares)
        self._subscriptions.setdefault(space, set()).add(subscription)
        try:
            yield subscription
        finally:
            watchers = self._subscriptions[space]
            watchers.discard(subscription)
            subscription.end()
            if not watchers:
                del self._subscriptions[space]
