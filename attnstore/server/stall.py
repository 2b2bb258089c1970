"""A bound on how long a peer may move nothing, or too little.

Owns: `Stall`. `asyncio.timeout` with a new deadline after every message would set a timer of the event loop each time, which costs
more than the rest of the work on a message here. This class records the time instead, and a timer looks at it periodically.
"""

from __future__ import annotations

import asyncio
from types import TracebackType
from typing import Self

from attnstore.limits import MESSAGE_OVERHEAD_BYTES, PEER_BYTES_PER_S_MIN


class Stall:
    """`async with Stall(seconds) as stall:` raises `TimeoutError` out of the block if the peer `moved` nothing for `seconds`, or
    less than `PEER_BYTES_PER_S_MIN` on average over that time.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._timeout = asyncio.timeout(None)
        self._loop = asyncio.get_running_loop()
        self._moved_s = 0.0
        self._window_began_s = 0.0
        self._window_bytes = 0
        self._timer: asyncio.TimerHandle | None = None

    async def __aenter__(self) -> Self:
        await self._timeout.__aenter__()
        self._moved_s = self._window_began_s = self._loop.time()
        self._look()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._timer is not None:
            self._timer.cancel()
        await self._timeout.__aexit__(kind, error, traceback)

    def moved(self, size_bytes: int) -> None:
        """Records that the peer took or sent a message of `size_bytes`."""
        self._moved_s = self._loop.time()
        self._window_bytes += size_bytes + MESSAGE_OVERHEAD_BYTES

    def _look(self) -> None:
        now_s = self._loop.time()
        window_s = now_s - self._window_began_s
        is_slow = False
        if window_s >= self._seconds:
            is_slow = self._window_bytes < PEER_BYTES_PER_S_MIN * window_s
            self._window_began_s, self._window_bytes = now_s, 0
        if is_slow or now_s >= self._moved_s + self._seconds:
            self._timer = None
            self._timeout.reschedule(now_s)
        else:
            self._timer = self._loop.call_at(min(self._moved_s, self._window_began_s) + self._seconds, self._look)
