"""Watchers get their own tenant's and namespace's events in order, and a bounded queue with an honest count of what was lost."""

from __future__ import annotations

import asyncio

import pytest

from attnstore.errors import Unavailable
from attnstore.server import events
from attnstore.server.events import EventHub, Subscription
from attnstore.types import PageEvent, PageEventKind, Space

SEALED, LAGGED = PageEventKind.SEALED, PageEventKind.LAGGED
A, B, C = Space("a", b"n" * 32), Space("b", b"n" * 32), Space("a", b"c" * 32)


def sealed(number: int) -> PageEvent:
    return PageEvent(SEALED, bytes([number]), number)


async def test_events_of_any_thread_reach_every_watcher_of_the_space_in_order() -> None:
    hub = EventHub(asyncio.get_running_loop())
    with hub.subscribed(A) as first, hub.subscribed(A) as second, hub.subscribed(B) as other:
        for number in range(3):
            await asyncio.to_thread(hub.publish, [(A, sealed(number)), (C, sealed(9))])
        await asyncio.to_thread(hub.publish, [(B, sealed(7))])
        assert await first.take() == await second.take() == [sealed(0), sealed(1), sealed(2)]
        assert await other.take() == [sealed(7)]
    hub.publish([(A, sealed(4))])
    assert not hub._subscriptions, "nobody is left"


async def test_a_full_queue_counts_what_it_loses_and_says_so_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(events, "WATCH_EVENTS_MAX", 2)
    queue = Subscription()
    for number in range(5):
        queue.offer(sealed(number))
    queue.offer(PageEvent(LAGGED, b"", 5, 10))
    assert await queue.take() == [sealed(0), sealed(1), PageEvent(LAGGED, b"", 1, 13)]
    queue.offer(sealed(6))
    assert await queue.take() == [sealed(6)]


async def test_closing_sends_waiting_and_later_takers_away() -> None:
    hub = EventHub(asyncio.get_running_loop())
    with hub.subscribed(A) as queue:
        waiting = asyncio.create_task(queue.take())
        await asyncio.sleep(0)
        hub.close()
        for taker in (waiting, queue.take()):
            with pytest.raises(Unavailable, match="draining"):
                await taker
