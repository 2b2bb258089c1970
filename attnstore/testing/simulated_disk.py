"""A disk in memory that loses power, and fails, as real ones do: the `Device` of the disk tier for simulations.

Owns: what is durable and what is not. Invariant: after a loss of power a file has its flushed bytes and, of each write since, any
sectors of 512 B: in any order, all of them or none. `rename`, `unlink` and `create` are durable when they return, as the contract
says.

Faults are plain attributes: `fail_at` makes one operation raise an error, `is_lying` makes flushes do nothing, `on_operation` is
called after every one.
"""

from __future__ import annotations

import errno
import os
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Final

SECTOR_BYTES: Final = 512
READ, WRITE, FLUSH, CREATE, RENAME, UNLINK = "read", "write", "flush", "create", "rename", "unlink"


@dataclass(slots=True)
class SimulatedFile:
    """`durable` survives; `pending` are the writes since the last flush, in order; `current` is what a read sees."""

    durable: bytes
    current: bytearray
    pending: list[tuple[int, bytes]] = field(default_factory=list)

    @classmethod
    def of(cls, data: bytes) -> SimulatedFile:
        """Returns a file of durable bytes."""
        return cls(data, bytearray(data))


class SimulatedDisk:
    """See the module. `fail_at` counts down operations of `fail_kinds`; the one at which it is 0 raises `fail_errno`, and so do all
    later ones if `fail_always`. `room_bytes` bounds the files.
    """

    def __init__(self, files: dict[str, bytes] | None = None, room_bytes: int | None = None) -> None:
        self.name = "simulated"
        self.files = {name: SimulatedFile.of(data) for name, data in (files or {}).items()}
        self.room_bytes = room_bytes
        self.is_lying = False
        self.fail_at: int | None = None
        self.fail_kinds: frozenset[str] = frozenset((READ, WRITE, FLUSH, CREATE, RENAME, UNLINK))
        self.fail_errno = errno.EIO
        self.fail_always = False
        self.operations = 0
        self.on_operation: Callable[[], None] | None = None

    def lock(self) -> None:
        """See `Device`."""

    def close(self) -> None:
        """See `Device`."""

    def names(self) -> list[str]:
        """See `Device`."""
        return sorted(self.files)

    def size_bytes(self, name: str) -> int:
        """See `Device`."""
        return len(self.files[name].current)

    def create(self, name: str, size_bytes: int) -> None:
        """See `Device`."""
        self._begin(CREATE)
        assert name not in self.files
        used_bytes = sum(len(file.current) for file in self.files.values())
        if self.room_bytes is not None and used_bytes + size_bytes > self.room_bytes:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self.files[name] = SimulatedFile.of(bytes(size_bytes))
        self._end()

    def rename(self, name: str, new_name: str) -> None:
        """See `Device`."""
        self._begin(RENAME)
        self.files[new_name] = self.files.pop(name)
        self._end()

    def unlink(self, name: str) -> None:
        """See `Device`."""
        self._begin(UNLINK)
        del self.files[name]
        self._end()

    def read(self, name: str, offset_bytes: int, buffers: Sequence[memoryview]) -> None:
        """See `Device`."""
        self._begin(READ)
        at = offset_bytes
        current = self.files[name].current
        if at + sum(map(len, buffers)) > len(current):
            raise OSError(errno.EIO, "a short read")
        for buffer in buffers:
            buffer[:] = current[at : at + len(buffer)]
            at += len(buffer)

    def write(self, name: str, offset_bytes: int, buffers: Sequence[memoryview]) -> None:
        """See `Device`."""
        assert all(len(buffer) % SECTOR_BYTES == 0 for buffer in buffers)
        self._begin(WRITE)
        file = self.files[name]
        data = b"".join(buffers)
        assert offset_bytes + len(data) <= len(file.current)
        file.current[offset_bytes : offset_bytes + len(data)] = data
        file.pending.append((offset_bytes, data))
        self._end()

    def flush(self, name: str) -> None:
        """See `Device`."""
        self._begin(FLUSH)
        if not self.is_lying:
            file = self.files[name]
            file.durable = bytes(file.current)
            file.pending.clear()
        self._end()

    def after_power_loss(self, draw: random.Random) -> dict[str, bytes]:
        """Returns the files of one disk that this one may be after losing its power now."""
        return {name: _survivor(file, draw) for name, file in self.files.items()}

    def _begin(self, kind: str) -> None:
        self.operations += 1
        if self.fail_at is None or kind not in self.fail_kinds:
            return
        self.fail_at -= 1
        if self.fail_at == -1 or (self.fail_always and self.fail_at < 0):
            raise OSError(self.fail_errno, os.strerror(self.fail_errno))

    def _end(self) -> None:
        if self.on_operation is not None:
            self.on_operation()


def _survivor(file: SimulatedFile, draw: random.Random) -> bytes:
    if not file.pending:
        return file.durable
    mode = draw.randrange(4)
    if mode == 0:
        return file.durable
    if mode == 1:
        return bytes(file.current)
    data = bytearray(file.durable)
    torn = draw.randrange(len(file.pending))
    for number, (at, written) in enumerate(file.pending):
        is_prefix = mode == 2
        if number == torn:
            for begin in range(0, len(written), SECTOR_BYTES):
                if draw.random() < 0.5:
                    data[at + begin : at + begin + SECTOR_BYTES] = written[begin : begin + SECTOR_BYTES]
        elif number < torn if is_prefix else draw.random() < 0.5:
            data[at : at + len(written)] = written
    return bytes(data)
