"""Host memory between a device, which computes queries and merges partials, and the sockets to the nodes.

Owns: `DeviceExchange`. Invariants: a query is sent after the layer has written it; memory of a partial is received into again only
after it was copied to the device. The memory is that of the largest step so far.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from attnstore.attention import merge
from attnstore_worker.device.base import Device, Event, Wait


@dataclass(slots=True)
class _Memory:
    tensor: Tensor
    copied: Event | None = None


class DeviceExchange:
    """Copies on `device` for the steps of one engine. Called inside `Device.submitting`."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self._memories: dict[str, _Memory] = {}

    def fetch(self, query: Tensor) -> Tensor:
        """Returns a query in fp32, in host memory that is valid until the next one is fetched. Waits for it."""
        memory = self._memory("query", math.prod(query.shape), torch.float32)
        rows = memory.tensor[: query.numel()].view(query.shape)
        self._device.transfer(query.float().contiguous(), rows).wait(Wait.QUERY_AFTER_COMPUTE)
        if self._device.accesses is not None:
            self._device.accesses.host(rows, (0,), writes=False)
        return rows

    def room(self, name: str, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Returns host memory under a name, for the host to write. Waits until the device has copied what it held."""
        memory = self._memory(name, math.prod(shape), dtype)
        room = memory.tensor[: math.prod(shape)].view(shape)
        if memory.copied is not None:
            memory.copied.wait(Wait.PARTIAL_AFTER_MERGE)
        if self._device.accesses is not None:
            self._device.accesses.host(room, (0,), writes=True)
        return room

    def merge(self, out: Tensor, lse: Tensor, partial: tuple[Tensor, Tensor], row_ids: Tensor) -> None:
        """Merges what the host received into the rooms `out` and `lse` into rows of `out` fp32 and `lse`, in place."""
        rows = self.room("rows", len(row_ids), dtype=torch.int32)
        rows.copy_(row_ids)
        on_device = self._bring("rows", rows)
        part_out, part_lse = self._bring("out", partial[0]), self._bring("lse", partial[1])
        if self._device.uses_triton:
            from attnstore.attention.triton import merge_partials

            merge_partials(out, lse, part_out[None], part_lse[None], on_device)
            return
        indices = on_device.long()
        out[indices], lse[indices] = merge([out[indices], part_out], [lse[indices], part_lse])

    def _bring(self, name: str, room: Tensor) -> Tensor:
        """Returns on the device what the host wrote into `room`."""
        target = torch.empty_like(room, device=self._device.torch_device)
        self._memories[name].copied = self._device.transfer(room, target)
        return target

    def _memory(self, name: str, elements: int, dtype: torch.dtype) -> _Memory:
        memory = self._memories.get(name)
        if memory is None or len(memory.tensor) < elements:
            if memory is not None and memory.copied is not None:
                memory.copied.wait(Wait.PARTIAL_AFTER_MERGE)  # before it is freed
            memory = self._memories[name] = _Memory(self._device.pinned(elements, dtype=dtype))
        return memory
