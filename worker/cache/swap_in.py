"""One transfer from a store into blocks of the pool, on a thread of its own.

Owns: `SwapIn`. Invariant: until `done` the destinations may be written at any moment, so whoever gives up waiting must keep
them in quarantine; after `done` nobody writes them.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError

from attnstore.types import ReadResult


class SwapIn:
    """A running read into `block_ids`. `read` must not raise."""

    def __init__(self, block_ids: list[int], read: Callable[[], ReadResult]) -> None:
        self.block_ids = block_ids
        self._future: Future[ReadResult] = Future()
        # A daemon, so that a read that never ends cannot keep the process alive.
        threading.Thread(target=lambda: self._future.set_result(read()), name="attnstore-swap-in", daemon=True).start()

    @property
    def done(self) -> bool:
        """The transfer is over."""
        return self._future.done()

    def wait(self, timeout_ms: float) -> ReadResult | None:
        """The result, or None where the transfer is still running after `timeout_ms`."""
        try:
            return self._future.result(timeout_ms / 1e3)
        except FutureTimeoutError:
            return None
