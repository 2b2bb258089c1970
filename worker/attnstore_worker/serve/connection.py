"""An HTTP connection that bounds how long its peer may take; uvicorn bounds only idle connections.

Owns: two timers per connection. Invariants: a connection without a running request is closed within `limits.HTTP_HEAD_MS_MAX`,
however slowly its peer sends; a connection whose peer does not read the answer is closed within `limits.HTTP_STALL_MS_MAX`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

from attnstore.limits import HTTP_HEAD_MS_MAX, HTTP_STALL_MS_MAX


class BoundedProtocol(H11Protocol):
    """See the module. For uvicorn's setting `http`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._head = _Timer(self.loop, HTTP_HEAD_MS_MAX, self._give_up)
        self._stall = _Timer(self.loop, HTTP_STALL_MS_MAX, self._give_up)

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._watch_head()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch_head()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._watch_head()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._stall.start()

    def resume_writing(self) -> None:
        super().resume_writing()
        self._stall.stop()

    def connection_lost(self, exc: Exception | None) -> None:
        self._head.stop()
        self._stall.stop()
        super().connection_lost(exc)

    def _watch_head(self) -> None:
        if self.cycle is not None and not self.cycle.response_complete:
            self._head.stop()
        elif not self.transport.is_closing():
            self._head.start()

    def _give_up(self) -> None:
        self.transport.abort()


class _Timer:
    """Acts once, the given time after the first `start` since the last `stop`."""

    def __init__(self, loop: asyncio.AbstractEventLoop, after_ms: float, act: Callable[[], None]) -> None:
        self._loop = loop
        self._after_ms = after_ms
        self._act = act
        self._handle: asyncio.TimerHandle | None = None

    def start(self) -> None:
        if self._handle is None:
            self._handle = self._loop.call_later(self._after_ms / 1000, self._act)

    def stop(self) -> None:
        if self._handle is not None:
            self._handle.cancel()
            self._handle = None
