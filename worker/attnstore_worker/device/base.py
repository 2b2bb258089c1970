"""The contract of a device: memory for blocks, streams with events, copies of pages, and the names of all waits.

Owns: `Device` with its parts, and `Wait`. Invariant: an access to a block or to a slot of host memory comes after the last access
that conflicts with it, because one stream does both, because the host waited for the first, or because of a wait named in `Wait`.

A block is a page on the device, a slot is a page in host memory. Three streams are used: `compute` runs the model, `up` copies
slots to blocks, `down` copies blocks to slots. A copy returns at once. It reads its source and writes its destination at any time
until its event is done. Shape: streams and events of CUDA; the offloading worker of vLLM.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from typing import Protocol

import torch
from torch import Tensor

from attnstore.core.layout import PageLayout
from attnstore_worker.device.engine_blocks import EngineBlocks
from attnstore_worker.device.pages import PagePool


class Wait(enum.Enum):
    """Every place where a stream or the host waits for work of another. Each is necessary: `experiments.device_faults` removes one
    after the other, and a test notices.

    The name says who waits for what; the value says what happens without it.
    """

    UP_AFTER_COMPUTE = "a load overwrites a block that a step still reads"
    UP_AFTER_DOWN = "a load overwrites an evicted block before its page was copied down"
    COMPUTE_AFTER_DOWN = "a step overwrites an evicted block before its page was copied down"
    COMPUTE_AFTER_UP = "a step reads a layer before it was copied up"
    DOWN_AFTER_COMPUTE = "a page is copied down before the step that computes it is done"
    ARRIVED_AFTER_UP = "a block is findable before its page was copied up"
    RELEASED_AFTER_UP = "a block of a cancelled load is reused while a copy still writes it"
    STAGING_AFTER_UP = "a staging slot is filled again before its page was copied up"
    WRITTEN_AFTER_DOWN = "a page is sent to the store before it was copied down"
    HOST_UP_AFTER_DOWN = "a page of the HOST tier is copied up before it was copied down"
    HOST_REUSE_AFTER_UP = "a slot of the HOST tier is used again before its page was copied up"
    HOST_READ_AFTER_DOWN = "the host reads a slot of the HOST tier before its page was copied down"
    STAMPS_AFTER_UP = "the stamps of pages in shared memory are checked before the pages were copied up"
    SHARED_RELEASED_AFTER_UP = "the lease of pages in shared memory ends while a copy still reads them"
    TABLES_AFTER_STEP = "the host changes the tables of a step before the step has read them"
    TOKENS_AFTER_COMPUTE = "the host reads tokens before the step has written them"
    QUERY_AFTER_COMPUTE = "a query is sent to a store node before the layer has written it"
    PARTIAL_AFTER_MERGE = "a partial is received into memory that the last merge still reads"
    GATHER_AFTER_DOWN = "a page is gathered into a place of the ring before the last page there was copied down"
    DOWN_AFTER_GATHER = "a page is copied down from the ring before it was gathered there"
    STEP_AFTER_ENDED_UP = "a step uses a block of a request that has ended before a copy of its load was done"


class Event(Protocol):
    """A point in the work of a stream. From any thread."""

    def done(self) -> bool:
        """Returns whether all work of the stream before the event has ended. Does not wait, and orders nothing."""
        ...

    def wait(self, wait: Wait) -> None:
        """Blocks the calling thread until the event is done. Raises `DeviceLost`."""
        ...


class Copy(Event, Protocol):
    """The end of a copy up, with its duration."""

    def elapsed_ms(self) -> float | None:
        """Returns how long the device copied, by its own clock and without what the copy waited for, in milliseconds; None until
        the copy has ended. Does not wait, and orders nothing. Raises `DeviceLost`.
        """
        ...


class Stream(Protocol):
    """Work that a device does in the order of submission. From any thread."""

    def record(self) -> Event:
        """Returns an event after all work submitted to the stream so far."""
        ...

    def wait(self, event: Event, wait: Wait) -> None:
        """Lets all work that is submitted from now on begin after the event. Does not block the host."""
        ...


After = tuple[Wait, Event]
"""An event that a copy waits for, and why."""


class Copies(Protocol):
    """Copies between slots of host memory and blocks. From any thread; the copies of one direction end in the order of the calls.

    `host` is memory of `Device.host_pages`, or registered, `[slots, *layout.shape]`. A call that raises `DeviceLost` submitted
    nothing.
    """

    def up(
        self,
        host: Tensor,
        slots: Sequence[int],
        block_ids: Sequence[int],
        *,
        after: Iterable[After] = (),
        layers: range | None = None,
    ) -> Copy:
        """Copies pages, or these layers of them, from `host[slots[i]]` to block `block_ids[i]`."""
        ...

    def down(self, block_ids: Sequence[int], host: Tensor, slots: Sequence[int], *, after: Iterable[After] = ()) -> Event:
        """Copies pages from block `block_ids[i]` to `host[slots[i]]`."""
        ...


class EngineCopies(Protocol):
    """Copies between slots of host memory and the blocks of an engine that runs the model itself on `compute`, such as vLLM.

    `host` is memory of `Device.host_pages`, `[slots, *layout.shape]`. Raises `DeviceLost` and `OutOfDeviceMemory`.
    """

    def load(self, host: Tensor, slots: Sequence[int], block_ids: Sequence[int], *, after: Iterable[After] = ()) -> Event:
        """Copies pages from `host[slots[i]]` to block `block_ids[i]`. From any thread; the copies end in the order of the calls.
        A call that raises submitted nothing.
        """
        ...

    def save(self, block_ids: Sequence[int], host: Tensor, slots: Sequence[int]) -> Event:
        """Copies pages from block `block_ids[i]`, as the work so far on `compute` leaves it, to `host[slots[i]]`. Work that is
        submitted to `compute` from now on may change the blocks. On the thread that submits to `compute`. After a call that raises
        no copy writes the slots.
        """
        ...


class Timer(Protocol):
    """The duration of work on the compute stream, by the device's own clock."""

    def stop(self) -> None:
        """Ends the measured work: what is submitted later is not part of it."""
        ...

    def elapsed_ms(self) -> float | None:
        """Returns the duration in milliseconds; None while the work runs. Does not wait."""
        ...


class Graph(Protocol):
    """Work that was captured once and is submitted as a whole (a CUDA graph)."""

    def replay(self) -> None:
        """Submits the work to `compute` again, on the tensors that it was captured with. Inside `Device.submitting`."""
        ...


class Accesses(Protocol):
    """Is told of the accesses that are not copies. Only a device that looks for races has one."""

    def step(self, reads: Iterable[int], writes: Iterable[int], *, layers: range | None = None) -> None:
        """Work that is submitted to `compute` now reads and writes these blocks, or these layers of them."""
        ...

    def host(self, host: Tensor, slots: Iterable[int], *, writes: bool) -> None:
        """The calling thread, or a transport for it, reads or writes these slots now."""
        ...


class Device(Protocol):
    """A device. `addressable`: its blocks are host memory, so transports read and write them without staging, and no copy is
    necessary between staging and blocks. `uses_triton`: the model and attention run as Triton kernels on tensors of `torch_device`.
    `name` is that of the option `--device`, `description` that of the hardware.
    """

    name: str
    description: str
    torch_device: torch.device
    addressable: bool
    uses_triton: bool
    compute: Stream
    accesses: Accesses | None

    def blocks(self, layout: PageLayout, capacity: int) -> Tensor:
        """Returns zeroed memory of the device, `[capacity, *layout.shape]`. Raises `OutOfDeviceMemory`."""
        ...

    def host_pages(self, layout: PageLayout, pool_bytes: int) -> PagePool:
        """Returns host memory that copies reach at full speed (pinned, on CUDA). Raises `PoolTooSmall`."""
        ...

    def register(self, host: Tensor) -> bool:
        """Lets copies reach host memory that another part owns, such as the mapped memory of a store node, at full speed. Returns
        False if the device refuses it: its pages go through staging then.
        """
        ...

    def unregister(self, host: Tensor) -> None:
        """Ends a registration, before the memory is unmapped. No copy may use the memory."""
        ...

    def pinned(self, *shape: int, dtype: torch.dtype) -> Tensor:
        """Returns zeroed host memory for small tensors, such as the tables and the tokens of a step, which `transfer` reaches at
        full speed. `Accesses.host` is told of the host's accesses, with slot 0.
        """
        ...

    def transfer(self, source: Tensor, target: Tensor) -> Event:
        """Copies a small tensor on `compute`, one way or the other: one of the two is `pinned` memory. Inside `submitting`."""
        ...

    def copies(self, blocks: Tensor) -> Copies:
        """Returns copies to and from `blocks`, which `blocks` returned."""
        ...

    def engine_copies(self, blocks: EngineBlocks, layout: PageLayout, step_pages: int) -> EngineCopies:
        """Returns copies to and from the blocks of an engine, whose pages have the size of `layout`. `step_pages`: the largest
        number of pages that one step completes; more are right too. Raises `OutOfDeviceMemory`.
        """
        ...

    def free_bytes(self) -> int | None:
        """Returns the free memory of the device, as the device counts it; None if the device does not bound it."""
        ...

    def timer(self) -> Timer:
        """Starts a timer after all work submitted to `compute` so far."""
        ...

    def submitting(self) -> AbstractContextManager[None]:
        """Around all work that the calling thread submits to `compute`, such as a step: the device and the stream are current for
        this thread meanwhile. Raises `OutOfDeviceMemory` and `DeviceLost` in place of the errors of torch and Triton.
        """
        ...

    def capture(self, work: Callable[[], None]) -> Graph:
        """Returns what `work` submits, for repetition. `work` reads nothing back and has run before, so that all kernels are
        compiled. Graphs of one device share their temporary memory: the results of one are valid until the next is replayed.
        Raises `OutOfDeviceMemory` and `DeviceLost`.
        """
        ...

    def close(self) -> None:
        """Waits for all copies, and gives back registered host memory. Never raises."""
        ...
