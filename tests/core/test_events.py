"""Events keep their order and numbers, and a loss is reported."""

from __future__ import annotations

from attnstore.core.events import EventLog
from attnstore.limits import WATCH_EVENTS_MAX
from attnstore.types import PageEvent, PageEventKind, Space

A, B = Space("a", b"n" * 32), Space("b", b"n" * 32)


def test_events_come_in_order_and_are_numbered_across_spaces() -> None:
    log = EventLog()
    log.append(A, PageEventKind.SEALED, b"1")
    log.append(B, PageEventKind.SEALED, b"2")
    assert log.take() == [(A, PageEvent(PageEventKind.SEALED, b"1", 1)), (B, PageEvent(PageEventKind.SEALED, b"2", 2))]
    log.append(A, PageEventKind.DELETED, b"1")
    assert log.take() == [(A, PageEvent(PageEventKind.DELETED, b"1", 3))]
    assert log.take() == []


def test_a_log_that_nobody_reads_stays_bounded_and_tells_each_space_what_it_lost() -> None:
    log = EventLog()
    for space in (A, B, A):
        log.append(space, PageEventKind.SEALED, b"early")
    for _ in range(WATCH_EVENTS_MAX):
        log.append(B, PageEventKind.SEALED, b"late")
    events = log.take()
    assert events[:2] == [
        (A, PageEvent(PageEventKind.LAGGED, b"", 3, dropped=2)),
        (B, PageEvent(PageEventKind.LAGGED, b"", 3, dropped=1)),
    ]
    assert [event.sequence for _, event in events[2:]] == list(range(4, WATCH_EVENTS_MAX + 4))
    assert log.take() == []
