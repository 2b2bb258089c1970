"""A background task ends when it is told to, and whoever tells it can be ended, too."""

from __future__ import annotations

import asyncio
from contextlib import suppress

import pytest

from attnstore import tasks


async def stubborn(swallowed: list[int], times: int) -> None:
    """Swallows so many cancellations, as a library may."""
    while True:
        try:
            await asyncio.sleep(3600)
        except asyncio.CancelledError:
            if len(swallowed) == times:
                raise
            swallowed.append(1)


async def test_a_task_that_swallows_a_cancellation_ends_nevertheless() -> None:
    swallowed: list[int] = []
    task = asyncio.create_task(stubborn(swallowed, 1))
    await asyncio.sleep(0)
    await tasks.end(task)
    assert task.cancelled()
    assert swallowed == [1]


async def test_who_waits_for_the_end_can_be_cancelled() -> None:
    task = asyncio.create_task(stubborn([], 2))
    await asyncio.sleep(0)
    ending = asyncio.create_task(tasks.end(task))
    await asyncio.sleep(0)
    ending.cancel()
    with pytest.raises(asyncio.CancelledError):
        await ending
    with suppress(asyncio.CancelledError):
        await tasks.end(task)
    assert task.done()


async def test_what_a_task_met_is_told() -> None:
    async def fails() -> None:
        raise ValueError("no")

    task = asyncio.create_task(fails())
    await asyncio.sleep(0)
    with pytest.raises(ValueError, match="no"):
        await tasks.end(task)
