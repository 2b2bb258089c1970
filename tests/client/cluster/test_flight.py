"""Single flight: equal concurrent requests are sent once."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any

import pytest

from attnstore.client.cluster.flight import Flight, SingleFlight


class Source:
    """Answers on command, and counts its requests."""

    def __init__(self) -> None:
        self.asked = 0
        self.callers: list[int] = []
        self.go = asyncio.Event()

    async def answer(self, flight: Flight[int]) -> int:
        self.asked += 1
        await self.go.wait()
        self.callers.append(flight.callers)
        return self.asked


async def test_all_who_ask_at_once_get_one_answer_and_those_who_come_later_a_new_one() -> None:
    flights, source = SingleFlight[int](), Source()
    waiting = [asyncio.create_task(flights.run("key", source.answer)) for _ in range(5)]
    await asyncio.sleep(0)
    source.go.set()
    assert await asyncio.gather(*waiting) == [1] * 5
    assert source.callers == [5]
    assert await flights.run("key", source.answer) == 2


async def test_different_questions_do_not_wait_for_each_other() -> None:
    flights, slow, quick = SingleFlight[int](), Source(), Source()
    waiting = asyncio.create_task(flights.run("slow", slow.answer))
    quick.go.set()
    assert await flights.run("quick", quick.answer) == 1
    assert not waiting.done()
    slow.go.set()
    assert await waiting == 1


async def test_one_who_gives_up_stops_nobody_else() -> None:
    flights, source = SingleFlight[int](), Source()
    first, second = (asyncio.create_task(flights.run("key", source.answer)) for _ in range(2))
    await asyncio.sleep(0)
    first.cancel()
    await asyncio.wait([first])
    source.go.set()
    assert await second == 1
    assert source.callers == [1]


async def test_a_call_that_nobody_waits_for_is_cancelled() -> None:
    flights, source = SingleFlight[int](), Source()
    only = asyncio.create_task(flights.run("key", source.answer))
    await asyncio.sleep(0)
    only.cancel()
    with pytest.raises(asyncio.CancelledError):
        await only
    assert source.callers == []
    source.go.set()
    assert await flights.run("key", source.answer) == 2


async def test_a_call_that_is_cancelled_before_it_began_leaves_nothing_behind() -> None:
    flights, source = SingleFlight[int](), Source()

    def begin(flight: Flight[int]) -> Coroutine[Any, Any, int]:
        # Like a caller that cancels all tasks of a loop.
        asyncio.get_running_loop().call_soon(lambda: flight.task is not None and flight.task.cancel())
        return source.answer(flight)

    with pytest.raises(asyncio.CancelledError):
        await flights.run("key", begin)
    assert source.asked == 0
    source.go.set()
    assert await asyncio.wait_for(flights.run("key", source.answer), 5) == 1
    assert not flights._flights


async def test_a_call_that_cannot_begin_leaves_nothing_behind() -> None:
    flights, source = SingleFlight[int](), Source()

    def refuse(_flight: Flight[int]) -> Coroutine[Any, Any, int]:
        raise RuntimeError("not now")

    with pytest.raises(RuntimeError):
        await flights.run("key", refuse)
    source.go.set()
    assert await asyncio.wait_for(flights.run("key", source.answer), 5) == 1


async def test_what_a_call_raises_reaches_all_who_wait() -> None:
    flights = SingleFlight[int]()

    async def fail(_flight: Flight[int]) -> int:
        raise KeyError("why")

    outcomes = await asyncio.gather(*(flights.run("key", fail) for _ in range(3)), return_exceptions=True)
    assert [type(outcome) for outcome in outcomes] == [KeyError] * 3
