"""Watchers receive the events of their own tenant and namespace in order; the queue is bounded and the count of lost events is
right.
"""

from __future__ import annotations

import asyncio

import pytest

from attnstore.core.fair_share import FairShares
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
    queue = Subscription("t", FairShares(100, "events", "wait"))
    for number in range(5):
        queue.offer(sealed(number))
    queue.offer(PageEvent(LAGGED, b"", 5, 10))
    assert await queue.take() == [sealed(0), sealed(1), PageEvent(LAGGED, b"", 1, 13)]
    queue.offer(sealed(6))
    assert await queue.take() == [sealed(6)]


async def test_slow_watchers_of_one_tenant_leave_room_for_the_events_of_another(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(events, "WATCHED_EVENTS_MAX", 20)
    hub = EventHub(asyncio.get_running_loop(), tenants=2)
    with hub.subscribed(A) as slow, hub.subscribed(A) as slower, hub.subscribed(B) as other:
        hub.publish([(A, sealed(number)) for number in range(30)])
        hub.publish([(B, sealed(number)) for number in range(5)])
        await asyncio.sleep(0)
        assert await other.take() == [sealed(number) for number in range(5)]
        first, second = await slow.take(), await slower.take()
        assert len(first) + len(second) == 13 + 2, "each ends with what it lost"
        assert {first[-1].kind, second[-1].kind} == {LAGGED}
    assert hub._shares.used == 0


async def test_a_gap_is_told_where_it_is_although_there_is_room_behind_it() -> None:
    shares = FairShares(1, "events", "wait")
    first, second = Subscription("t", shares), Subscription("t", shares)
    first.offer(sealed(0))
    second.offer(sealed(0))
    await first.take()
    second.offer(sealed(1))
    assert await second.take() == [PageEvent(LAGGED, b"", 0, 2)]


async def test_closing_sends_waiting_and_later_takers_away() -> None:
    hub = EventHub(asyncio.get_running_loop())
    with hub.subscribed(A) as queue:
        waiting = asyncio.create_task(queue.take())
        await asyncio.sleep(0)
        hub.close()
        for taker in (waiting, queue.take()):
            with pytest.raises(Unavailable, match="draining"):
                await taker
