"""The processor as a device: blocks are host memory, and all work is done when its call returns.

Owns: `HostDevice`. Invariant: no call waits, and no copy is made that a worker without devices would not make.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Final

import torch
from torch import Tensor

from attnstore.core.layout import PageLayout
from attnstore_worker.device.base import Accesses, After, Copies, Copy, EngineCopies, Event, Graph, Stream, Timer, Wait
from attnstore_worker.device.engine_blocks import EngineBlocks
from attnstore_worker.device.pages import PagePool


class _Done:
    """An event of work that is done."""

    def done(self) -> bool:
        return True

    def wait(self, wait: Wait) -> None:
        del wait


DONE: Final = _Done()


class _Copied(_Done):
    """A copy that is done."""

    def __init__(self, took_ms: float) -> None:
        self._took_ms = took_ms

    def elapsed_ms(self) -> float | None:
        return self._took_ms


class _InOrder:
    """The order of the calling threads."""

    def record(self) -> Event:
        return DONE

    def wait(self, event: Event, wait: Wait) -> None:
        del event, wait


class _HostCopies:
    def __init__(self, blocks: Tensor) -> None:
        self._blocks = blocks

    def up(
        self,
        host: Tensor,
        slots: Sequence[int],
        block_ids: Sequence[int],
        *,
        after: Iterable[After] = (),
        layers: range | None = None,
    ) -> Copy:
        del after
        part = slice(None) if layers is None else slice(layers.start, layers.stop)
        begin_s = time.perf_counter()
        for slot, block_id in zip(slots, block_ids, strict=True):
            self._blocks[block_id, part].copy_(host[slot, part])
        return _Copied((time.perf_counter() - begin_s) * 1e3)

    def down(self, block_ids: Sequence[int], host: Tensor, slots: Sequence[int], *, after: Iterable[After] = ()) -> Event:
        del after
        for block_id, slot in zip(block_ids, slots, strict=True):
            host[slot].copy_(self._blocks[block_id])
        return DONE


class _HostEngineCopies:
    def __init__(self, blocks: EngineBlocks) -> None:
        self._blocks = blocks

    def load(self, host: Tensor, slots: Sequence[int], block_ids: Sequence[int], *, after: Iterable[After] = ()) -> Event:
        del after
        for slot, block_id in zip(slots, block_ids, strict=True):
            copy_parts(self._blocks.split(host[slot]), self._blocks.views(block_id))
        return DONE

    def save(self, block_ids: Sequence[int], host: Tensor, slots: Sequence[int]) -> Event:
        for block_id, slot in zip(block_ids, slots, strict=True):
            copy_parts(self._blocks.views(block_id), self._blocks.split(host[slot]))
        return DONE


def copy_parts(sources: Sequence[Tensor], targets: Sequence[Tensor]) -> None:
    """Copies each source to its target."""
    for source, target in zip(sources, targets, strict=True):
        target.copy_(source)


class HostTimer:
    """A `Timer` by the host's clock."""

    def __init__(self) -> None:
        self._begin_s = time.perf_counter()
        self._end_s: float | None = None

    def stop(self) -> None:
        """See `Timer.stop`."""
        self._end_s = time.perf_counter()

    def elapsed_ms(self) -> float | None:
        """See `Timer.elapsed_ms`."""
        return None if self._end_s is None else (self._end_s - self._begin_s) * 1e3


class HostGraph:
    """A `Graph` that calls the work again."""

    def __init__(self, work: Callable[[], None]) -> None:
        self.replay = work


class HostDevice:
    """See `Device`. The memory of `blocks` is that of a `PagePool`, as is all host memory."""

    name = "cpu"
    torch_device = torch.device("cpu")
    addressable = True
    uses_triton = False
    compute: Stream = _InOrder()
    accesses: Accesses | None = None

    def __init__(self) -> None:
        self.description = platform.processor() or platform.machine()

    def blocks(self, layout: PageLayout, capacity: int) -> Tensor:
        """See `Device.blocks`."""
        return self.host_pages(layout, capacity * layout.page_bytes).tensor

    def host_pages(self, layout: PageLayout, pool_bytes: int) -> PagePool:
        """See `Device.host_pages`."""
        return PagePool(layout, pool_bytes)

    def register(self, host: Tensor) -> bool:
        """All host memory is reached at full speed."""
        del host
        return True

    def unregister(self, host: Tensor) -> None:
        """No-op."""

    def pinned(self, *shape: int, dtype: torch.dtype) -> Tensor:
        """See `Device.pinned`."""
        return torch.zeros(shape, dtype=dtype)

    def transfer(self, source: Tensor, target: Tensor) -> Event:
        """See `Device.transfer`."""
        target.copy_(source)
        return DONE

    def copies(self, blocks: Tensor) -> Copies:
        """See `Device.copies`."""
        return _HostCopies(blocks)

    def engine_copies(self, blocks: EngineBlocks, layout: PageLayout, step_pages: int) -> EngineCopies:
        """See `Device.engine_copies`."""
        del layout, step_pages
        return _HostEngineCopies(blocks)

    def free_bytes(self) -> int | None:
        """None: the limit of the process's memory is another one (`attnstore.memory_limit`)."""
        return None

    def timer(self) -> Timer:
        """See `Device.timer`."""
        return HostTimer()

    def submitting(self) -> AbstractContextManager[None]:
        """No-op."""
        return nullcontext()

    def capture(self, work: Callable[[], None]) -> Graph:
        """Returns the work itself."""
        return HostGraph(work)

    def close(self) -> None:
        """No-op."""
