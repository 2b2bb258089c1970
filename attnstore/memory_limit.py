"""The memory that this process may use: that of the machine, or the lower limit that a container or service manager sets for its
control group.

Owns: finding the limit, for both versions of Linux's control groups. Exists because the kernel kills a process that exceeds its
limit without a message: memory allocated at start is compared with the limit first.
"""

from __future__ import annotations

import os
import resource
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Final

from attnstore.errors import InvalidArgument
from attnstore.sizes import size_text

_UNLIMITED_BYTES_MIN: Final = 1 << 60
"""Version 1 represents "no limit" as the largest number of pages that fits a signed integer."""

CGROUPS: Final = Path("/sys/fs/cgroup")
MEMBERSHIP: Final = Path("/proc/self/cgroup")
_STATM: Final = Path("/proc/self/statm")


def memory_bytes() -> int:
    """Returns the machine's memory, or the lower limit of the process' control group."""
    machine = os.sysconf("SC_PHYS_PAGES") * resource.getpagesize()
    limit = memory_limit_bytes()
    return machine if limit is None else min(machine, limit)


def memory_limit_bytes() -> int | None:
    """Returns the lowest limit of the process' control group and its parents, or None if there is none or none can be read."""
    limits = [limit for file in _limit_files() if (limit := _limit(file)) is not None]
    return min(limits, default=None)


def resident_bytes() -> int:
    """Returns the memory that this process uses now."""
    return int(_STATM.read_text().split()[1]) * resource.getpagesize()


def require_memory(what: str, needed_bytes: int, beside_bytes: int, limit_bytes: int) -> str | None:
    """Compares memory that is about to be allocated with the limit; `what` names it in messages.

    Returns a warning if less than `beside_bytes` would be left for the rest of the process. Raises `InvalidArgument` if it does not
    fit.
    """
    if needed_bytes + beside_bytes <= limit_bytes:
        return None
    told = f"{what} takes {size_text(needed_bytes)}, and the memory that this process may use is {size_text(limit_bytes)}"
    if needed_bytes > limit_bytes:
        raise InvalidArgument(f"{told}: the kernel would kill it; lower the one or raise the other")
    return f"{told}: that may not leave enough for the rest of the process, which the kernel then kills"


def _limit_files() -> Iterator[Path]:
    for controllers, group in _groups():
        if not controllers:
            places = [CGROUPS / "memory.max", CGROUPS / "unified" / "memory.max"]
        elif "memory" in controllers:
            places = [CGROUPS / "memory" / "memory.limit_in_bytes"]
        else:
            continue
        for place in places:
            # In a container the group's path may be that of the host, while the container's own group is mounted as the root.
            for path in (group, *group.parents):
                yield place.parent / path.relative_to("/") / place.name


def _groups() -> Iterator[tuple[list[str], PurePosixPath]]:
    try:
        lines = MEMBERSHIP.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = [*line.split(":", 2), "", ""][:3]
        if path.startswith("/"):
            yield [name for name in controllers.split(",") if name], PurePosixPath(path)


def _limit(file: Path) -> int | None:
    try:
        text = file.read_text().strip()
    except OSError:
        return None
    if not text.isdecimal() or int(text) >= _UNLIMITED_BYTES_MIN:
        return None
    return int(text)
