"""Rules of the write order, each left out in turn: the crash simulator must notice.

Owns: the mutations. Each is a disk that forgets a flush, or a function of the disk tier replaced while `applied` lasts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final
from unittest import mock

from attnstore.spill import disk as spill_disk
from attnstore.spill import format as disk_format
from attnstore.spill.segments import Segments
from attnstore.testing.simulated_disk import SimulatedDisk


class _ForgetfulDisk(SimulatedDisk):
    """A disk whose flush does nothing if the last block written to the file begins with `magic`."""

    magic = b""

    def flush(self, name: str) -> None:
        pending = self.files[name].pending
        if not (pending and pending[-1][1].startswith(self.magic)):
            super().flush(name)


class _OneBitmapDisk(SimulatedDisk):
    """A disk on which both bitmaps have one place."""

    def write(self, name: str, offset_bytes: int, buffers: Any) -> None:
        is_bitmap = bytes(buffers[0][:8]) == disk_format.BITMAP_MAGIC
        super().write(name, disk_format.BLOCK_BYTES if is_bitmap else offset_bytes, buffers)


class _LyingDisk(SimulatedDisk):
    def __init__(self, files: dict[str, bytes] | None = None) -> None:
        super().__init__(files)
        self.is_lying = True


LYING: Final = _LyingDisk


@dataclass(frozen=True, slots=True)
class Mutation:
    """A rule left out: `replaced` names an attribute of an object and what it becomes."""

    name: str
    disks: Callable[[dict[str, bytes]], SimulatedDisk] = SimulatedDisk
    replaced: tuple[Any, str, Any] | None = None

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Leaves the rule out while the context lasts."""
        if self.replaced is None:
            yield
            return
        with mock.patch.object(*self.replaced):
            yield


def _forgetting(magic: bytes) -> type[SimulatedDisk]:
    return type("Forgetful", (_ForgetfulDisk,), {"magic": magic})


def _discard_in_memory(segments: Segments, segment: Any) -> None:
    """Reclaims a segment without ending its generation on the disk."""
    segments._forget(segment)
    segments.all[segment.number] = segments.free[segment.number] = segment


MUTATIONS: Final = (
    Mutation("no flush after a segment's header", _forgetting(disk_format.SEGMENT_MAGIC)),
    Mutation("no flush between records and footer, nor when due", _forgetting(disk_format.RECORD_MAGIC)),
    Mutation("no flush after a bitmap", _forgetting(disk_format.BITMAP_MAGIC)),
    Mutation("one bitmap instead of two", _OneBitmapDisk),
    Mutation("no generation check", SimulatedDisk, (disk_format, "is_generation", lambda *_: True)),
    Mutation("no payload check", SimulatedDisk, (disk_format, "is_page_intact", lambda *_: True)),
    Mutation("the older record is not deleted at recovery", SimulatedDisk, (spill_disk, "superseded", lambda _: {})),
    Mutation("reinserted records are not flushed before a reclaim", SimulatedDisk, (Segments, "flush_all", lambda _: None)),
    Mutation("a reclaim does not end the generation", SimulatedDisk, (Segments, "discard", _discard_in_memory)),
)
