"""Single flight: callers that want the same thing at the same time ask for it once.

Owns: the calls that are running, by what they ask for. Invariants: a call goes on as long as anybody waits for it and is cancelled
when nobody does; what it answers or raises reaches everyone who waits.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Hashable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

T = TypeVar("T")


@dataclass(slots=True)
class Flight(Generic[T]):
    """A running call; `passengers` wait for it."""

    passengers: int = 0
    task: asyncio.Task[T] | None = None


class SingleFlight(Generic[T]):
    """Belongs to one event loop."""

    def __init__(self) -> None:
        self._flights: dict[Hashable, Flight[T]] = {}

    async def run(self, key: Hashable, start: Callable[[Flight[T]], Coroutine[Any, Any, T]]) -> T:
        """The answer of the call that is running for `key`, or of one that is started now with its flight."""
        flight = self._flights.get(key)
        if flight is None:
            flight = self._flights[key] = Flight()
            flight.task = asyncio.create_task(self._fly(key, start(flight)))
        assert flight.task is not None
        flight.passengers += 1
        try:
            return await asyncio.shield(flight.task)
        except asyncio.CancelledError:
            flight.passengers -= 1
            if flight.passengers == 0:
                flight.task.cancel()
                await asyncio.wait([flight.task])
                if not flight.task.cancelled():
                    flight.task.exception()
            raise

    async def _fly(self, key: Hashable, call: Coroutine[Any, Any, T]) -> T:
        try:
            return await call
        finally:
            # From here on nobody boards: the next one who asks is to see what is there then.
            del self._flights[key]
