"""The parts of one large transfer, carried out at once.

Owns: the threads of one transport.
Invariant: when `run` ends, however it ends, every part has ended: until then bytes may land.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import TypeVar

from attnstore.client.base import BulkUnavailable, Transfer, wait_out
from attnstore.errors import ClientClosed

R = TypeVar("R")
Part = tuple[int, int]
"""Pages `[begin, end)` of a plan, which one connection transfers."""


class PartWorkers:
    """Cuts a transfer into at most `channels` parts of almost equal size, with a thread for each where it is more than one."""

    def __init__(self, channels: int, name: str) -> None:
        self._channels = channels
        self._workers = ThreadPoolExecutor(channels, name) if channels > 1 else None

    def close(self) -> None:
        """Takes no new transfer, without waiting: those that run end by themselves."""
        if self._workers is not None:
            self._workers.shutdown(wait=False)

    def run(self, pages: int, transfer: Transfer, run: Callable[[int, int], R]) -> list[R]:
        """`run(begin, end)` of each part of `pages` pages, in order. Raises what the first part that failed raised."""
        count = max(1, min(self._channels, pages))
        parts = [(pages * part // count, pages * (part + 1) // count) for part in range(count)]
        if count == 1:
            return [run(0, pages)]
        futures = self._run_all(parts, transfer, run)
        if all(future.exception() for future in futures):
            return [future.result() for future in futures]
        # Parts that got no connection of their own go over one that another part has done with, one after the other.
        return [
            run(*part) if isinstance(future.exception(), BulkUnavailable) else future.result()
            for part, future in zip(parts, futures, strict=True)
        ]

    def _run_all(self, parts: list[Part], transfer: Transfer, run: Callable[[int, int], R]) -> list[Future[R]]:
        futures: list[Future[R]] = []
        try:
            for begin, end in parts:
                futures.append(self._submit(run, begin, end))
            wait(futures)
        except BaseException:
            transfer.abort()
            raise
        finally:
            wait_out(futures)
        return futures

    def _submit(self, run: Callable[[int, int], R], begin: int, end: int) -> Future[R]:
        assert self._workers is not None
        try:
            return self._workers.submit(run, begin, end)
        except RuntimeError:
            raise ClientClosed("the client is closed") from None
