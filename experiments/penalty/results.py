"""The rows of a run, stored as JSON lines while it runs.

Owns: the file. Invariant: a row is completely on disk before the next cell begins, so an interrupted run loses one cell.
"""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Final

_NAMES: Final = ("rtt_ms", "gbit_per_s", "context_tokens", "hit_rate", "fault", "residence")


class Results:
    """Rows in `path`; with `resume` existing rows are kept, otherwise the file is truncated."""

    def __init__(self, path: Path, common: dict[str, Any], *, resume: bool) -> None:
        self._path = path
        self._common = common
        if not resume:
            path.write_text("")
        self.rows: list[dict[str, Any]] = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def has(self, **names: Any) -> bool:
        """Returns whether there is a row with these names; `names` are some of the fields that name a row."""
        return any(all(row.get(name) == names.get(name) for name in _NAMES) for row in self.rows)

    def add(self, **row: Any) -> None:
        """Writes a row."""
        row = {**row, **self._common}
        self.rows.append(row)
        with self._path.open("a") as file:
            file.write(json.dumps(row) + "\n")
            file.flush()
            os.fsync(file.fileno())


def machine() -> str:
    """Describes this machine in a few words."""
    names = _values("model name", Path("/proc/cpuinfo"))
    return f"{os.cpu_count()} x {next(iter(names), platform.machine())}, {platform.system()} {platform.release()}"


def _values(key: str, path: Path) -> Iterable[str]:
    text = path.read_text() if path.exists() else ""
    return [line.partition(":")[2].strip() for line in text.splitlines() if line.startswith(key)]
