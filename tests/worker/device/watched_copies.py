"""Copies of a device that tell a test of each submission, which may raise in place of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from torch import Tensor

from attnstore_worker.device.base import After, Copies, Event

Submitting = Callable[[str, Sequence[int], range | None], None]
"""Called with the direction, "up" or "down", the blocks, and the layers if not all are copied."""


class WatchedCopies:
    """`copies`, with a call of `submitting` before each."""

    def __init__(self, copies: Copies, submitting: Submitting) -> None:
        self._copies = copies
        self._submitting = submitting

    def up(
        self,
        host: Tensor,
        slots: Sequence[int],
        block_ids: Sequence[int],
        *,
        after: Iterable[After] = (),
        layers: range | None = None,
    ) -> Event:
        self._submitting("up", block_ids, layers)
        return self._copies.up(host, slots, block_ids, after=after, layers=layers)

    def down(self, block_ids: Sequence[int], host: Tensor, slots: Sequence[int], *, after: Iterable[After] = ()) -> Event:
        self._submitting("down", block_ids, None)
        return self._copies.down(block_ids, host, slots, after=after)
