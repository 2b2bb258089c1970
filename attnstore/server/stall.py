"""How long a peer may move nothing.

Owns: `Stall`. Why not `asyncio.timeout`, moved on after every message: that sets a timer of the event loop anew each time, which
costs more than the rest of what a message needs here; this notes the time, and a timer looks at it now and then.
"""

from __future__ import annotations

import asyncio
from types import TracebackType
from typing import Self


class Stall:
    """`async with Stall(seconds) as stall:` raises `TimeoutError` out of the block once nothing has `moved` for `seconds`."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._timeout = asyncio.timeout(None)
        self._loop = asyncio.get_running_loop()
        self._moved_s = 0.0
        self._timer: asyncio.TimerHandle | None = None

    async def __aenter__(self) -> Self:
        await self._timeout.__aenter__()
        self.moved()
        self._look()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._timer is not None:
            self._timer.cancel()
        await self._timeout.__aexit__(kind, error, traceback)

    def moved(self) -> None:
        """The peer moved something: it has its whole time for the next."""
        self._moved_s = self._loop.time()

    def _look(self) -> None:
        due = self._moved_s + self._seconds
        if self._loop.time() < due:
            self._timer = self._loop.call_at(due, self._look)
        else:
            self._timer = None
            self._timeout.reschedule(due)
