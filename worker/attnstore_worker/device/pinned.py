"""Host memory that the device reads and writes at full speed: memory of ours, registered with CUDA.

Owns: `Registrations`. Invariants: no byte is registered twice; registered memory stays mapped until its registration ends.

Memory is registered and not allocated by CUDA, because it is that of other parts: a pool in huge pages, or the mapped memory of a
store node. torch's own allocator of pinned memory rounds every size up to a power of two.
"""

from __future__ import annotations

import logging
import mmap
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from attnstore.sizes import size_text

_PORTABLE: Final = 0x01
_READ_ONLY: Final = 0x08
"""Flags of `cudaHostRegister`, which torch has no names for: pinned for every device, and never written by one."""
_MAPS: Final = Path("/proc/self/maps")

_log = logging.getLogger(__name__)


@dataclass(slots=True)
class _Registration:
    end: int
    memory: Tensor
    """Keeps the memory mapped."""
    users: int = 1


class Registrations:
    """Of one device. Thread-safe."""

    def __init__(self, index: int) -> None:
        self._index = index
        # A finalizer may end a registration on any thread at any time, also on one that is inside a call here.
        self._lock = threading.RLock()
        self._by_address: dict[int, _Registration] = {}

    def register(self, host: Tensor) -> bool:
        """See `Device.register`. Memory inside a registration counts as one more use of it. `host` is contiguous."""
        begin, end = pages_of(host)
        with self._lock:
            for other, known in self._registrations():
                if other <= begin and end <= known.end:
                    known.users += 1
                    return True
                if begin < known.end and other < end:
                    return False  # CUDA registers no page twice
            flags = _PORTABLE if is_writable(begin, end) else _PORTABLE | _READ_ONLY
            error = self._call(lambda runtime: runtime.cudaHostRegister(begin, end - begin, flags))
            if error is not None:
                size = size_text(end - begin)
                _log.warning("cuda:%d does not register %s of host memory, copies of it are slow: %s", self._index, size, error)
                return False
            self._by_address[begin] = _Registration(end, host)
            return True

    def unregister(self, host: Tensor) -> None:
        """See `Device.unregister`. No-op for memory that is not registered."""
        begin, end = pages_of(host)
        with self._lock:
            for other, known in self._registrations():
                if other <= begin and end <= known.end:
                    known.users -= 1
                    if known.users == 0:
                        self._end(other)
                    return

    def close(self) -> None:
        """Ends all registrations. Never raises."""
        with self._lock:
            for begin, _ in self._registrations():
                self._end(begin)

    def _end(self, begin: int) -> None:
        error = self._call(lambda runtime: runtime.cudaHostUnregister(begin))
        if error is not None:  # of a lost device, whose driver gives the pages back at the end of the process
            _log.warning("cuda:%d does not end the registration of host memory: %s", self._index, error)
        self._by_address.pop(begin, None)

    def _call(self, call: Callable[[Any], Any]) -> str | None:
        """Returns the error of a call to CUDA's runtime, None if there is none."""
        try:
            with torch.cuda.device(self._index):
                code = int(call(torch.cuda.cudart()))
                if code == 0:
                    return None
                # The runtime keeps the error for this thread, and torch would raise it after an innocent kernel.
                with suppress(RuntimeError):
                    torch.ones(1, device=torch.device("cuda", self._index))
                return str(torch.cuda.CudaError(code))
        except RuntimeError as error:  # a lost device cannot even be selected
            return str(error)

    def _registrations(self) -> Iterator[tuple[int, _Registration]]:
        """Yields those that were there at the beginning and still are."""
        for begin in tuple(self._by_address):
            known = self._by_address.get(begin)
            if known is not None:
                yield begin, known


def pages_of(host: Tensor) -> tuple[int, int]:
    """Returns the addresses at which the pages of the system's memory that a contiguous tensor lies in begin and end."""
    assert host.is_contiguous()
    begin, end = host.data_ptr(), host.data_ptr() + host.numel() * host.element_size()
    return begin // mmap.PAGESIZE * mmap.PAGESIZE, -(-end // mmap.PAGESIZE) * mmap.PAGESIZE


def is_writable(begin: int, end: int) -> bool:
    """Returns whether this process may write all of these addresses. A tensor does not say that its memory is mapped read-only."""
    for line in _MAPS.read_text().splitlines():
        addresses, access, _ = line.split(maxsplit=2)
        first, last = (int(address, 16) for address in addresses.split("-"))
        if first < end and begin < last and "w" not in access:
            return False
    return True
