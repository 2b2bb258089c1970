"""Long operations divided into slices.

Owns: `Sliced` and the two ways to run it, on a thread and on the event loop. Invariant: between two slices, others that wait for
the lock or for the event loop get a turn. Slices are generators, because threads and coroutines run the same operations.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Generator, Iterator, Sequence
from typing import Final, TypeVar

R = TypeVar("R")
T = TypeVar("T")

Sliced = Generator[None, None, R]
"""An operation that pauses between two slices, with no lock held, and returns its result. `close` ends it early and cleanly."""

TURN_S: Final = 100e-6
"""A thread that releases a lock and takes it again at once leaves others no time to wake up."""


def in_slices(items: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    """Yields the items in order, in parts of at most `size`."""
    for begin in range(0, len(items), size):
        yield items[begin : begin + size]


def finish(work: Sliced[R]) -> R:
    """Runs the whole operation, for a caller on a thread."""
    try:
        while True:
            next(work)
            time.sleep(TURN_S)
    except StopIteration as done:
        return done.value  # type: ignore[no-any-return]


async def finish_among_calls(work: Sliced[R]) -> R:
    """Runs the whole operation on the event loop. If the call is cancelled, the operation is closed."""
    try:
        while True:
            next(work)
            await asyncio.sleep(0)
    except StopIteration as done:
        return done.value  # type: ignore[no-any-return]
    finally:
        work.close()
