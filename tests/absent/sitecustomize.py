"""With this folder on PYTHONPATH, a starting Python does not find the packages that ABSENT_PACKAGES lists, as if they were not
installed.
"""

from __future__ import annotations

import importlib.machinery
import importlib.metadata
import os
import sys
from collections.abc import Iterable, Sequence
from importlib.machinery import ModuleSpec
from typing import Any

_ABSENT = frozenset(os.environ.get("ABSENT_PACKAGES", "").split())


class _WithoutAbsent(importlib.machinery.PathFinder):
    @classmethod
    def find_spec(cls, fullname: str, path: Sequence[str] | None = None, target: Any = None) -> ModuleSpec | None:
        return None if fullname.partition(".")[0] in _ABSENT else super().find_spec(fullname, path, target)

    @classmethod
    def find_distributions(cls, *context: Any) -> Iterable[importlib.metadata.Distribution]:
        found = importlib.machinery.PathFinder.find_distributions(*context)
        return [each for each in found if each.name.lower().replace("-", "_") not in _ABSENT]


if _ABSENT:
    sys.meta_path[sys.meta_path.index(importlib.machinery.PathFinder)] = _WithoutAbsent
