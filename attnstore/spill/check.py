"""Offline verification of a spill directory: `attnstore spill check DIR`.

Owns: the report. Invariants: nothing is written, every page of every record is read and verified, and a directory that a node uses
is refused.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from attnstore.sizes import size_text
from attnstore.spill import format as disk_format
from attnstore.spill.device import DirectoryDevice
from attnstore.spill.errors import DiskRefused
from attnstore.spill.recovery import find, our_names, read_superblock, superseded
from attnstore.spill.segment import scan


@dataclass(frozen=True, slots=True)
class SpillReport:
    """What a directory contains. `pages` are intact and live; `deleted_pages` deleted or superseded; `damaged_pages` are listed by
    a footer, and cannot be read or are not intact. `unsealed_segments` were open when their node ended, which is no damage.
    `headless_segments` have no valid header, `unreadable_segments` cannot be read, `abandoned_segments` failed while a node ran.
    """

    path: str
    version: int
    life: int
    segments: int
    free_segments: int
    unsealed_segments: int
    headless_segments: int
    unreadable_segments: int
    abandoned_segments: int
    pages: int
    page_bytes: int
    deleted_pages: int
    damaged_pages: int
    pages_by_tenant: dict[str, int]

    @property
    def is_whole(self) -> bool:
        """Whether everything that the directory lists can be read."""
        return not (self.damaged_pages or self.unreadable_segments or self.abandoned_segments)

    def to_json(self) -> dict[str, Any]:
        """Returns the value for `json.dumps`."""
        return asdict(self) | {"is_whole": self.is_whole}

    def to_text(self) -> str:
        """Returns a few lines."""
        lines = [
            f"{self.path}: version {self.version}, life {self.life}",
            f"segments: {self.segments} with pages ({self.unsealed_segments} unsealed), {self.free_segments} free, "
            f"{self.headless_segments} without header, {self.unreadable_segments} unreadable, {self.abandoned_segments} abandoned",
            f"pages: {self.pages} intact ({size_text(self.page_bytes)}), {self.deleted_pages} deleted, "
            f"{self.damaged_pages} damaged",
        ]
        lines += [f"tenant {tenant!r}: {pages} pages" for tenant, pages in sorted(self.pages_by_tenant.items())]
        return "\n".join(lines)


def check(path: Path) -> SpillReport:
    """Verifies a directory. Raises `DiskRefused` if it is no store of this version, or a node uses it."""
    device = DirectoryDevice(path, read_only=True)
    try:
        device.lock()
        names = our_names(device.names())
        block = read_superblock(device, names)
        if block is None:
            raise DiskRefused(f"spill directory {path} contains no store")
        found = find(device, names, block.store)
        older = superseded(found.full)
        counts: Counter[str] = Counter()
        by_tenant: Counter[str] = Counter()
        for each in found.full:
            segment = each.segment
            try:
                intact = dict(scan(device, segment.name, segment.header))
            except OSError:
                intact = {}
            gone = set(older.get(segment.number, ()))
            for index, entry in enumerate(each.entries):
                if not entry.length:
                    continue
                if index in segment.deletions or index in gone:
                    counts["deleted"] += 1
                elif intact.get(index) != entry:
                    counts["damaged"] += 1
                else:
                    counts["pages"] += 1
                    counts["bytes"] += entry.length
                    by_tenant[segment.header.tenant] += 1
    except OSError as error:
        raise DiskRefused(f"spill directory {path}: {error.strerror or error}") from None
    finally:
        device.close()
    return SpillReport(
        path=str(path),
        version=disk_format.VERSION,
        life=block.life,
        segments=len(found.full),
        free_segments=len(found.free),
        unsealed_segments=sum(not each.is_sealed for each in found.full),
        headless_segments=len(found.headless),
        unreadable_segments=len(found.unreadable),
        abandoned_segments=len(found.bad_bytes),
        pages=counts["pages"],
        page_bytes=counts["bytes"],
        deleted_pages=counts["deleted"],
        damaged_pages=counts["damaged"],
        pages_by_tenant=dict(by_tenant),
    )
