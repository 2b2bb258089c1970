"""Copies of large pages: each is one transfer by the device's copy engine, and neighbours are one transfer together.

Owns: `DirectCopies`, and the arithmetic of transfers. Invariant: indices are checked before anything is submitted, so a call that
raises `IndexError` or `DeviceLost` copies nothing.

A transfer costs the host and the device some microseconds, which large pages hide; for small pages see `copies_staged`.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from attnstore_worker.device.base import After, Copy, Event, Stream


class CopyStream(Stream, Protocol):
    """A stream to which the calling thread submits copies of torch."""

    def submitting(self) -> AbstractContextManager[None]:
        """See `Device.submitting`, for this stream."""
        ...

    def timed(self, submit: Callable[[], None]) -> Copy:
        """Submits copies, by a call inside `submitting`, and returns their end and their duration."""
        ...


@dataclass(frozen=True, slots=True)
class Run:
    """Pages that follow each other on both sides: `count` of them, from `source` and from `target` on."""

    source: int
    target: int
    count: int


def runs_of(sources: Sequence[int], targets: Sequence[int]) -> Iterator[Run]:
    """Yields the fewest runs that copy page `sources[i]` to page `targets[i]`, in that order."""
    begin = 0
    for at in range(1, len(sources) + 1):
        if at == len(sources) or sources[at] != sources[at - 1] + 1 or targets[at] != targets[at - 1] + 1:
            yield Run(sources[begin], targets[begin], at - begin)
            begin = at


def require_indices(host: Tensor, slots: Sequence[int], blocks: Tensor, block_ids: Sequence[int]) -> None:
    """Raises `IndexError` unless there is a slot of `host` for each block of `blocks`, and all of them exist."""
    if len(slots) != len(block_ids):
        raise IndexError(f"{len(slots)} slots are given for {len(block_ids)} blocks")
    for name, pages, ids in (("slot", host, slots), ("block", blocks, block_ids)):
        if ids and not (min(ids) >= 0 and max(ids) < len(pages)):
            raise IndexError(f"{name}s {min(ids)} to {max(ids)} are given; there are {len(pages)}")


def transfer(source: Tensor, sources: Sequence[int], target: Tensor, targets: Sequence[int], layers: range | None) -> None:
    """Submits the copies of pages `sources[i]` to pages `targets[i]`, or of these layers of them. Every copy is contiguous on both
    sides: torch would copy others through temporary memory, and read the source in the meantime.
    """
    if layers is None:
        for run in runs_of(sources, targets):
            pages = source[run.source : run.source + run.count]
            target[run.target : run.target + run.count].copy_(pages, non_blocking=True)
        return
    own = slice(layers.start, layers.stop)
    for source_id, target_id in zip(sources, targets, strict=True):
        target[target_id, own].copy_(source[source_id, own], non_blocking=True)


class DirectCopies:
    """See `Copies`. `blocks` is `[capacity, *layout.shape]` in the memory of the device."""

    def __init__(self, blocks: Tensor, up: CopyStream, down: CopyStream) -> None:
        self._blocks = blocks
        self._up = up
        self._down = down
        # The copies of two threads are not interleaved, so each event comes right after its own copies.
        self._up_lock, self._down_lock = threading.Lock(), threading.Lock()

    def up(
        self,
        host: Tensor,
        slots: Sequence[int],
        block_ids: Sequence[int],
        *,
        after: Iterable[After] = (),
        layers: range | None = None,
    ) -> Copy:
        """See `Copies.up`. Raises `IndexError`."""
        require_indices(host, slots, self._blocks, block_ids)
        with self._up_lock:
            wait_for(self._up, after)
            return self._up.timed(lambda: transfer(host, slots, self._blocks, block_ids, layers))

    def down(self, block_ids: Sequence[int], host: Tensor, slots: Sequence[int], *, after: Iterable[After] = ()) -> Event:
        """See `Copies.down`. Raises `IndexError`."""
        require_indices(host, slots, self._blocks, block_ids)
        with self._down_lock:
            wait_for(self._down, after)
            with self._down.submitting():
                transfer(self._blocks, block_ids, host, slots, None)
            return self._down.record()


def wait_for(stream: Stream, after: Iterable[After]) -> None:
    """Lets the stream wait for all of these events."""
    for wait, event in after:
        stream.wait(event, wait)
