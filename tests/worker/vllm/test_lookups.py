"""Look-ups beside the engine's loop, of a store that answers when the test says so."""

from __future__ import annotations

import threading

import pytest

from attnstore.limits import CHANNEL_READ_HASHES_MAX, HASHES_MAX
from attnstore.testing import ManualClock
from attnstore_worker.cache.store.remote import RemoteTier
from attnstore_worker.vllm.lookups import LOOKUP_THREADS, Lookups, StoredGroup, StoredSource
from attnstore_worker.vllm.scheduling import SchedulerSide
from tests.samples import eventually
from tests.worker.vllm.answers import FOREIGN, GROUP, ROOT, TOKENS, Answers, settled

ARRIVALS = 64


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The waits of this thread: for a lock that is not free, and for a condition, on which events, futures and queues wait."""
    begun: list[str] = []
    wait = threading.Condition.wait

    def counted(condition: threading.Condition, timeout: float | None = None) -> bool:
        if threading.current_thread() is threading.main_thread():
            begun.append("condition")
        return wait(condition, timeout)

    monkeypatch.setattr(threading.Condition, "wait", counted)
    return begun


@pytest.mark.parametrize("told", [False, True])
def test_many_requests_at_once_never_make_the_engines_loop_wait(
    side: SchedulerSide, store: Answers, waits: list[str], told: bool
) -> None:
    store.open.clear()
    for request in map(str, range(ARRIVALS)) if told else ():
        side.arrived(request, FOREIGN, 160)
    for _ in range(3):
        assert [side.hit_tokens(str(request), FOREIGN, 160, 0) for request in range(ARRIVALS)] == [None] * ARRIVALS
    assert waits == []
    store.open.set()
    assert [settled(side, str(request)) for request in range(ARRIVALS)] == [6 * TOKENS] * ARRIVALS
    assert len(store.asked) == ARRIVALS, "each was looked up once"
    assert store.calls < ARRIVALS / 2, "those that waited together are one call"


def test_a_request_that_waits_for_its_turn_has_its_answer_when_it_comes(side: SchedulerSide, store: Answers) -> None:
    side.arrived("a", FOREIGN, 160)
    assert eventually(lambda: len(store.asked) == 1)
    assert settled(side, "a") == 6 * TOKENS
    assert len(store.asked) == 1


def test_a_request_that_ends_before_its_look_up_begins_is_not_looked_up(side: SchedulerSide, store: Answers) -> None:
    store.open.clear()
    for request in map(str, range(10)):
        side.arrived(request, FOREIGN, 160)
        side.finished(request)
    store.open.set()
    assert settled(side, "last") == 6 * TOKENS
    assert len(store.asked) < 10


@pytest.mark.parametrize("blocks", [(50, 50), (CHANNEL_READ_HASHES_MAX - 1, HASHES_MAX)])
def test_look_ups_that_are_one_call_fit_it(tier: RemoteTier, store: Answers, blocks: tuple[int, ...]) -> None:
    store.open.clear()
    lookups = Lookups([StoredSource([StoredGroup(GROUP, ROOT, tier)])])
    started = []
    for busy in range(1, LOOKUP_THREADS + 1):
        started.append(lookups.start(FOREIGN[:1], TOKENS))
        assert eventually(lambda busy=busy: store.begun == busy)
    started += [lookups.start((FOREIGN[0],) * count, count * TOKENS) for count in blocks]
    store.open.set()
    assert eventually(lambda: all(lookup.done for lookup in started), within_s=30)
    assert store.calls < len(started), "some were joined"
    assert max(store.sizes) <= HASHES_MAX
    lookups.close()


def test_a_look_up_that_nobody_waits_for_is_not_begun(side: SchedulerSide, store: Answers, clock: ManualClock) -> None:
    store.open.clear()
    assert [side.hit_tokens(str(request), FOREIGN, 160, 0) for request in range(10)] == [None] * 10
    clock.advance_ms(100)
    assert [side.hit_tokens(str(request), FOREIGN, 160, 0) for request in range(10)] == [0] * 10
    store.open.set()
    assert settled(side, "last") == 6 * TOKENS
    assert len(store.asked) < 10, "those that waited behind others were taken back"
