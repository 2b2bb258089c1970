"""The exceptions of the disk tier.

Owns: what a caller must tell apart. `DiskRefused` ends a start; the others are faults of a running disk, which a client sees as
`Unavailable` or as a miss.
"""

from __future__ import annotations

from attnstore.errors import InvalidArgument, Unavailable


class DiskRefused(InvalidArgument):
    """The directory cannot be used: another node's, another version's, not a directory, or no permission. Nothing was changed."""


class DiskFault(Unavailable):
    """The disk did not do what was asked."""


class DiskFull(DiskFault):
    """No segment is free. `SpillDisk.reclaim` makes one."""


class DiskReadOnly(DiskFault):
    """The disk accepts no writes any more. Reads continue."""


class SegmentLost(DiskFault):
    """A write or a flush failed, so the whole `segment` was abandoned: all of its records are gone."""

    def __init__(self, segment: int, reason: str) -> None:
        super().__init__(f"segment {segment} is abandoned: {reason}")
        self.segment = segment
