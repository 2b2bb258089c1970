"""Pages that arrive layer by layer, seen from a step that computes behind them.

Owns: how many layers of one read are there, and the waiting for the next one.
Invariant: `wait(layer)` returns only if that layer of every page of the read came and was verified. That all of them did is known
when the read has ended: what was computed before is void unless `wait_complete` returns.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

from attnstore_worker.errors import PagesLost

_LOOK_AROUND_S = 0.02
"""How often a wait asks whether to go on."""


class LayerGate:
    """The gate of a read of blocks `[begin, end)`. `tell` and `close` come from the transfer, `wait` from the step."""

    def __init__(self, blocks: range) -> None:
        self.blocks = blocks
        self._layers = 0
        self._complete = False
        self._lost = False
        self._moved = threading.Condition()

    @property
    def open(self) -> bool:
        """The first layer is there, and nothing has gone wrong so far."""
        return not self._lost and (self._layers > 0 or self._complete)

    def tell(self, layer: int, pages: int) -> None:
        """The read's `on_layer`: of the first `pages` pages this layer is there."""
        with self._moved:
            if pages < len(self.blocks):
                self._lost = True
            self._layers = layer + 1
            self._moved.notify_all()

    def close(self, *, complete: bool) -> None:
        """The read has ended; whether all of its pages came whole and verified."""
        with self._moved:
            self._complete |= complete
            self._lost |= not complete
            self._moved.notify_all()

    def wait(self, layer: int, give_up: Callable[[], bool]) -> None:
        """Waits for a layer. Raises `PagesLost` where it does not come, or `give_up` says so."""
        self._wait(lambda: self._layers > layer or self._complete, give_up)

    def wait_complete(self, give_up: Callable[[], bool]) -> None:
        """Waits for the end of the read. Raises `PagesLost` as `wait` does."""
        self._wait(lambda: self._complete, give_up)

    def _wait(self, condition: Callable[[], bool], give_up: Callable[[], bool]) -> None:
        while not self._moved_on(condition):
            if give_up():  # without the lock: it may look at the swap-in, which tells this gate
                raise PagesLost("the pages of a step did not come in time")

    def _moved_on(self, condition: Callable[[], bool]) -> bool:
        with self._moved:
            moved_on = self._moved.wait_for(lambda: self._lost or condition(), _LOOK_AROUND_S)
            if self._lost:
                raise PagesLost("the pages of a step did not all come")
            return moved_on
