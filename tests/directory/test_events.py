"""Page events published through the directory: packed, bounded, and losses are reported."""

from __future__ import annotations

from attnstore import PageEvent, PageEventKind
from attnstore.directory.events import EventFeed, events_in
from attnstore.limits import EVENTS_IN_BATCH_MAX
from attnstore.types import Space

MINE, OTHER, STRANGERS = Space("a", bytes(32)), Space("a", b"o" * 32), Space("b", bytes(32))


def sealed(number: int) -> PageEvent:
    return PageEvent(PageEventKind.SEALED, number.to_bytes(32, "little"), number)


def test_events_of_a_space_arrive_as_they_were_offered() -> None:
    feed = EventFeed("ada")
    evicted = PageEvent(PageEventKind.EVICTED, bytes(32), 3)
    feed.offer([(MINE, sealed(1)), (OTHER, sealed(2)), (MINE, evicted), (STRANGERS, sealed(4))])
    batch = feed.take()
    assert batch is not None
    assert list(events_in(batch, MINE)) == [sealed(1), evicted]
    assert list(events_in(batch, OTHER)) == [sealed(2)]
    assert list(events_in(batch, STRANGERS)) == [sealed(4)], "an equal namespace of another tenant"
    assert feed.take() is None


def test_events_that_do_not_fit_and_batches_that_were_lost_are_counted() -> None:
    feed = EventFeed("ada")
    feed.offer((MINE, sealed(number)) for number in range(EVENTS_IN_BATCH_MAX + 5))
    first = feed.take()
    assert first is not None
    assert first.dropped == 5
    feed.lost(first)
    feed.offer([(MINE, sealed(9))])
    second = feed.take()
    assert second is not None
    assert list(events_in(second, MINE)) == [sealed(9), PageEvent(PageEventKind.LAGGED, b"", 9, EVENTS_IN_BATCH_MAX + 5)]


def test_a_tenant_with_many_events_leaves_room_for_anothers() -> None:
    feed = EventFeed("ada", tenants=2)
    feed.offer((MINE, sealed(number)) for number in range(2 * EVENTS_IN_BATCH_MAX))
    feed.offer([(STRANGERS, sealed(9))])
    batch = feed.take()
    assert batch is not None
    assert sealed(9) in list(events_in(batch, STRANGERS))
    feed.offer((MINE, sealed(number)) for number in range(EVENTS_IN_BATCH_MAX // 4))
    batch = feed.take()
    assert batch is not None
    assert batch.dropped == 0
