"""Work that would hold others up, cut into slices.

Owns: `Sliced` and the two ways to do it, on a thread and on the event loop. Invariant: between two slices whoever waits for the
lock or for the event loop gets a turn. Why generators: the same work is asked for by threads and by coroutines.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Generator, Iterator, Sequence
from typing import Final, TypeVar

R = TypeVar("R")
T = TypeVar("T")

Sliced = Generator[None, None, R]
"""Work that pauses between two slices, with no lock held, and returns its result. `close` ends it in order."""

TURN_S: Final = 100e-6
"""Who lets a lock go and takes it at once again leaves others no time to wake up."""


def in_slices(items: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    """The items in order, so many at a time."""
    for begin in range(0, len(items), size):
        yield items[begin : begin + size]


def finish(work: Sliced[R]) -> R:
    """Does all of the work, for a thread of its own."""
    try:
        while True:
            next(work)
            time.sleep(TURN_S)
    except StopIteration as done:
        return done.value  # type: ignore[no-any-return]


async def finish_among_calls(work: Sliced[R]) -> R:
    """Does all of the work, on the event loop. Where the call is cancelled the work is closed."""
    try:
        while True:
            next(work)
            await asyncio.sleep(0)
    except StopIteration as done:
        return done.value  # type: ignore[no-any-return]
    finally:
        work.close()
