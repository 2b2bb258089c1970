"""A device without hardware, on which a wait that is missing shows as a race or as wrong bytes.

Owns: `SimulatedDevice`. Its blocks are tensors of the processor apart from host memory. A copy fills its target with 0xFF (NaN in
every floating type) when it is submitted. With the schedule "late" it lands when its event is waited for, and reads its source only
then; with "early" as soon as what it waits for has landed. Work on `compute` runs when it is submitted.
Invariant: with all waits in place both schedules give the bytes of a device that does everything at once, and no race is found.
`without` names a wait that does nothing: `experiments.device_faults` checks that each is noticed.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Final, Literal

import torch
from torch import Tensor

from attnstore.core.layout import PageLayout
from attnstore.limits import MIB
from attnstore_worker.device.base import After, Copies, Copy, EngineCopies, Event, Wait
from attnstore_worker.device.copies_ring import RingCopies, ring_places
from attnstore_worker.device.engine_blocks import EngineBlocks
from attnstore_worker.device.host import HostDevice, copy_parts
from attnstore_worker.device.races import HOST, Clock, Place, Races

Schedule = Literal["early", "late"]
_POISON: Final = 0xFF
_POLLS_MAX: Final = 3
"""Work that nobody waits for has ended after this many looks at its event: a device goes on by itself."""
_RING_BYTES_MAX: Final = 1 * MIB


@dataclass(eq=False, slots=True)
class _Work:
    """Work in the order of its stream. `land` is None once it has landed."""

    needs: list[_Event]
    land: Callable[[], None] | None


class _Event:
    """See `Copy`. It is done if the first `works` of its stream have landed; the last of them took `took_ms`."""

    def __init__(self, stream: _Stream, works: int, clock: Clock) -> None:
        self._stream = stream
        self._works = works
        self._clock = clock
        self._polls = 0
        self.took_ms = 0.0

    def done(self) -> bool:
        with self._stream.device.lock:
            self._polls += 1
            if self._polls > _POLLS_MAX:
                self.land()
            return self._stream.landed >= self._works

    def elapsed_ms(self) -> float | None:
        """Does not count as a look at the event, so that measuring lands nothing."""
        with self._stream.device.lock:
            return self.took_ms if self._stream.landed >= self._works else None

    def wait(self, wait: Wait) -> None:
        device = self._stream.device
        with device.lock:
            if wait is not device.without:
                device.races.joins(HOST, self._clock)
                self.land()

    def land(self) -> None:
        """Lands the work before the event."""
        self._stream.land(self._works)

    def orders(self, stream: str) -> None:
        """Orders the next work of a stream after the event."""
        self._stream.device.races.joins(stream, self._clock)


class _Stream:
    """See `Stream`."""

    def __init__(self, device: SimulatedDevice, name: str) -> None:
        self.device = device
        self.name = name
        self.landed = 0
        self._works: list[_Work] = []
        self._needs: list[_Event] = []

    def record(self) -> Event:
        with self.device.lock:
            return self.event()

    def event(self) -> _Event:
        """Returns an event after all work so far."""
        return _Event(self, len(self._works), self.device.races.clock(self.name))

    def wait(self, event: Event, wait: Wait) -> None:
        assert isinstance(event, _Event)
        with self.device.lock:
            if wait is not self.device.without:
                event.orders(self.name)
                if self.name == "compute":  # its work runs when it is submitted, so what it needs lands now
                    event.land()
                else:
                    self._needs.append(event)

    def submit(self, after: Iterable[After], land: Callable[[], None], access: Callable[[], None]) -> _Event:
        """Adds work that may land from now on, once `after` has. `access` tells the detector of what it reads and writes."""
        races = self.device.races
        races.joins(self.name, races.clock(HOST))
        needs, self._needs = self._needs, []
        for wait, event in after:
            assert isinstance(event, _Event)
            if wait is not self.device.without:
                event.orders(self.name)
                needs.append(event)
        self._works.append(_Work(needs, land))
        try:
            access()
        finally:
            event = self.event()
            if self.device.schedule == "early":
                event.land()
        return event

    def land(self, works: int) -> None:
        """Lands the first `works`, in order, each after what it needs."""
        while self.landed < works:
            work = self._works[self.landed]
            self.landed += 1  # first: what it needs may need earlier work of this stream
            for event in work.needs:
                event.land()
            land, work.land = work.land, None
            assert land is not None
            land()


class _SimulatedCopies:
    """See `Copies`."""

    def __init__(self, device: SimulatedDevice, blocks: Tensor) -> None:
        self._device = device
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
        part = slice(None) if layers is None else slice(layers.start, layers.stop)
        sources = [host[slot, part] for slot in slots]
        targets = [self._blocks[block_id, part] for block_id in block_ids]
        source, target = self._device.places(host, slots, layers), self._device.places(self._blocks, block_ids, layers)
        copy = self._device.copy(self._device.up, "copy up", sources, targets, after, source, target)
        copy.took_ms = sum(each.nbytes for each in targets) / self._device.copy_bytes_per_ms
        return copy

    def down(self, block_ids: Sequence[int], host: Tensor, slots: Sequence[int], *, after: Iterable[After] = ()) -> Event:
        sources = [self._blocks[block_id] for block_id in block_ids]
        targets = [host[slot] for slot in slots]
        source, target = self._device.places(self._blocks, block_ids), self._device.places(host, slots)
        return self._device.copy(self._device.down, "copy down", sources, targets, after, source, target)


class _SimulatedEngineCopies:
    """The parts of `RingCopies` that are the device's."""

    def __init__(self, device: SimulatedDevice, blocks: EngineBlocks, ring: Tensor) -> None:
        self._device = device
        self._blocks = blocks
        self._ring = ring

    def gather(self, block_ids: Sequence[int], places: range) -> None:
        """See `copies_ring.Gather`. As all work on `compute` it is done when it is submitted."""
        sources = [view for block_id in block_ids for view in self._blocks.views(block_id)]
        targets = [piece for place in places for piece in self._blocks.split(self._ring[place])]
        self._device.gather(sources, targets, self._places(block_ids), self._device.places(self._ring, places))

    def load(self, host: Tensor, slots: Sequence[int], block_ids: Sequence[int], *, after: Iterable[After]) -> Event:
        """See `EngineCopies.load`."""
        sources = [piece for slot in slots for piece in self._blocks.split(host[slot])]
        targets = [view for block_id in block_ids for view in self._blocks.views(block_id)]
        read, written = self._device.places(host, slots), self._places(block_ids)
        return self._device.copy(self._device.up, "a load", sources, targets, after, read, written)

    def _places(self, block_ids: Sequence[int]) -> list[Place]:
        return self._device.places(self._blocks.parts[0], block_ids)


class _Accesses:
    """See `Accesses`."""

    def __init__(self, device: SimulatedDevice) -> None:
        self._device = device

    def step(self, reads: Iterable[int], writes: Iterable[int], *, layers: range | None = None) -> None:
        device, blocks = self._device, self._device.known_blocks
        with device.lock:
            device.races.joins("compute", device.races.clock(HOST))
            device.races.accesses("compute", "a step reads", device.places(blocks, reads, layers), writes=False)
            device.races.accesses("compute", "a step writes", device.places(blocks, writes, layers), writes=True)

    def host(self, host: Tensor, slots: Iterable[int], *, writes: bool) -> None:
        with self._device.lock:
            site = "the host writes" if writes else "the host reads"
            self._device.races.accesses(HOST, site, self._device.places(host, slots), writes=writes)


class SimulatedDevice(HostDevice):
    """See `Device`: the processor, but for copies and what is known of accesses. `races.found` lists every race, also those whose
    exception was caught by others. `copy_bytes_per_ms` is the speed of copies up by the device's own clock; no call takes longer.
    """

    name = "simulated"
    addressable = False

    def __init__(self, schedule: Schedule = "late", *, without: Wait | None = None, uses_triton: bool = False) -> None:
        super().__init__()
        self.description = "simulated device"
        self.schedule = schedule
        self.without = without
        self.uses_triton = uses_triton
        self.copy_bytes_per_ms = math.inf
        self.lock = threading.RLock()
        self.races = Races()
        self.up = _Stream(self, "up")
        self.down = _Stream(self, "down")
        self._compute = _Stream(self, "compute")
        self.compute = self._compute
        self.accesses = _Accesses(self)
        self.known_blocks = torch.empty(0)
        self._pinned: dict[int, Tensor] = {}
        """By address of the whole. Kept, so that no memory of the device gets the address of pinned memory that was freed."""

    def blocks(self, layout: PageLayout, capacity: int) -> Tensor:
        """See `Device.blocks`. The last ones are those that steps access."""
        self.known_blocks = super().blocks(layout, capacity)
        return self.known_blocks

    def pinned(self, *shape: int, dtype: torch.dtype) -> Tensor:
        """See `Device.pinned`."""
        memory = super().pinned(*shape, dtype=dtype)
        self._pinned[_address(memory)] = memory
        return memory

    def transfer(self, source: Tensor, target: Tensor) -> Event:
        """See `Device.transfer`. Memory of the device gets its bytes at once, because the work that uses it runs at once."""
        with self.lock:
            place, target_place = self._tensor(source), self._tensor(target)
            event = self.copy(self._compute, "a transfer", [source], [target], (), place, target_place)
            if _address(target) not in self._pinned:
                self._compute.event().land()
            return event

    def copies(self, blocks: Tensor) -> Copies:
        """See `Device.copies`."""
        return _SimulatedCopies(self, blocks)

    def engine_copies(self, blocks: EngineBlocks, layout: PageLayout, step_pages: int) -> EngineCopies:
        """See `Device.engine_copies`. The blocks are those that steps access from now on."""
        places = ring_places(step_pages, layout.page_bytes, _RING_BYTES_MAX)
        ring = super().blocks(layout, places)
        own = _SimulatedEngineCopies(self, blocks, ring)
        self.known_blocks = blocks.parts[0]
        return RingCopies(blocks, self.compute, self.copies(ring), places, own.gather, own.load)

    def gather(self, sources: Sequence[Tensor], targets: Sequence[Tensor], read: list[Place], written: list[Place]) -> None:
        """Copies on `compute`, inside the device."""
        with self.lock:
            self.copy(self._compute, "a gather", sources, targets, (), read, written)
            self._compute.event().land()

    def close(self) -> None:
        """See `Device.close`."""
        with self.lock:
            for stream in (self.up, self.down, self._compute):
                stream.event().land()

    def copy(
        self,
        stream: _Stream,
        name: str,
        sources: Sequence[Tensor],
        targets: Sequence[Tensor],
        after: Iterable[After],
        read: list[Place],
        written: list[Place],
    ) -> _Event:
        """Submits a copy: poisons its targets, and records its accesses."""
        after = tuple(after)
        with self.lock:
            for wait, event in after:
                assert isinstance(event, _Event)
                if wait is not self.without:
                    event.land()  # it may read the targets, and poison is no copy that could wait for it
            for target in targets:
                target.view(torch.uint8).fill_(_POISON)
            land, access = partial(copy_parts, sources, targets), partial(self._record, stream.name, name, read, written)
            return stream.submit(after, land, access)

    def places(self, memory: Tensor, indices: Iterable[int], layers: range | None = None) -> list[Place]:
        """Returns the places of slots of host memory or of blocks; a small tensor is one place."""
        if _address(memory) in self._pinned:
            return self._tensor(memory)
        name = "block" if memory.data_ptr() == self.known_blocks.data_ptr() else f"slot of {memory.data_ptr():x}"
        return [Place(name, index, layer) for index in indices for layer in layers or range(memory.shape[1])]

    def _tensor(self, memory: Tensor) -> list[Place]:
        return [Place(f"tensor {_address(memory):x}", 0, 0)]

    def _record(self, stream: str, name: str, read: list[Place], written: list[Place]) -> None:
        self.races.accesses(stream, f"{name} reads", read, writes=False)
        self.races.accesses(stream, f"{name} writes", written, writes=True)


def _address(memory: Tensor) -> int:
    """Returns the address of the whole that a tensor is part of."""
    return memory.untyped_storage().data_ptr()
