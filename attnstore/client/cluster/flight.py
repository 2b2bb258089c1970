"""Single flight: concurrent callers with equal requests share one call.

Owns: the running calls, by their keys. Invariants: a call continues while any caller waits for it and is cancelled when none does;
its answer or error reaches every waiting caller.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Hashable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

T = TypeVar("T")


@dataclass(slots=True)
class Flight(Generic[T]):
    """A running call; `callers` is the number of callers that wait for it."""

    callers: int = 0
    task: asyncio.Task[T] | None = None


class SingleFlight(Generic[T]):
    """Belongs to one event loop."""

    def __init__(self) -> None:
        self._flights: dict[Hashable, Flight[T]] = {}

    async def run(self, key: Hashable, start: Callable[[Flight[T]], Coroutine[Any, Any, T]]) -> T:
        """Returns the answer of the running call for `key`, or of a call that is started now with its flight."""
        flight = self._flights.get(key)
        task = flight.task if flight is not None else None
        if flight is None or task is None or task.done():  # after a flight has ended, the next caller needs a new answer
            flight = Flight()
            task = flight.task = asyncio.create_task(start(flight))
            self._flights[key] = flight
            # Not in the task itself: a task that is cancelled before its first step runs none of its code.
            task.add_done_callback(lambda _: self._land(key, flight))
        flight.callers += 1
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            flight.callers -= 1
            if flight.callers == 0:
                task.cancel()
                await asyncio.wait([task])
                if not task.cancelled():
                    task.exception()
            raise

    def _land(self, key: Hashable, flight: Flight[T]) -> None:
        if self._flights.get(key) is flight:
            del self._flights[key]
