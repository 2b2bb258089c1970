"""The parts of one large transfer, executed in parallel.

Owns: the threads of one transport.
Invariant: when a call ends, however it ends, every part has ended, because until then bytes may land.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from attnstore.client.base import BulkUnavailable
from attnstore.client.calls import Outcome, ThreadCall, Transfer, outlast
from attnstore.errors import ClientClosed
from attnstore.types import PageStatus

R = TypeVar("R")
Part = Callable[[int, int], Callable[[], R]]
"""`part(begin, end)` transfers pages `[begin, end)` of a plan over one connection."""


def nothing(_parts: list[None]) -> None:
    """Joins the parts of a read: no-op, because the pages have landed."""


def joined(parts: list[tuple[PageStatus, ...]]) -> tuple[PageStatus, ...]:
    """Joins the verdicts of the parts of a write."""
    return tuple(verdict for part in parts for verdict in part)


class PartWorkers:
    """Divides a transfer into at most `channels` parts of almost equal size, with a thread for each if there are several."""

    def __init__(self, channels: int, name: str) -> None:
        self._channels = channels
        self._workers = ThreadPoolExecutor(channels, name) if channels > 1 else None

    def close(self) -> None:
        """Accepts no new transfer, without waiting: running ones end by themselves."""
        if self._workers is not None:
            self._workers.shutdown(wait=False)

    def call(self, pages: int, transfer: Transfer, part: Part[R], join: Callable[[list[R]], R]) -> ThreadCall[R]:
        """Returns a call that executes every part of `pages` pages; `join` merges the results of the parts, in order.

        A transfer of one part runs on the calling thread. Raises the error of the first failed part.
        """
        count = max(1, min(self._channels, pages))
        if count == 1:
            return ThreadCall(part(0, pages), transfer)
        parts = [part(pages * number // count, pages * (number + 1) // count) for number in range(count)]
        return ThreadCall(lambda: join(self._run(parts, transfer)), transfer)

    def _run(self, parts: list[Callable[[], R]], transfer: Transfer) -> list[R]:
        outcomes = self._run_all(parts, transfer)
        if all(outcome.error is not None for outcome in outcomes):
            return [outcome.result() for outcome in outcomes]
        # Parts without a connection of their own use one that another part has finished with, one after the other.
        return [
            run() if isinstance(outcome.error, BulkUnavailable) else outcome.result()
            for run, outcome in zip(parts, outcomes, strict=True)
        ]

    def _run_all(self, parts: list[Callable[[], R]], transfer: Transfer) -> list[Outcome[R]]:
        outcomes: list[Outcome[R]] = [Outcome() for _ in parts]

        def start() -> None:
            for outcome, run in zip(outcomes, parts, strict=True):
                self._submit(outcome, run)

        def stop() -> None:
            transfer.abort()
            for outcome in outcomes:
                outcome.revoke()

        outlast(outcomes, start, stop)
        return outcomes

    def _submit(self, outcome: Outcome[R], run: Callable[[], R]) -> None:
        assert self._workers is not None
        try:
            self._workers.submit(outcome.run, run)
        except RuntimeError:
            raise ClientClosed("the client is closed") from None
