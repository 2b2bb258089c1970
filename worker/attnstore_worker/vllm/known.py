"""The pages that the store probably has. vLLM often still has a block itself, and its page need not be copied and sent each time.

Owns: the latest names of pages that were saved or found. A name may be wrong, because the store evicts, refuses and restarts. The
next look-up corrects it, and the page is saved when it is computed again.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from typing import Final

_NAMES_MAX: Final = 1 << 18
"""About 30 MB of names; 33 million tokens in vLLM's blocks of 128."""


class KnownPages:
    """The `names_max` names added last. Not thread-safe."""

    def __init__(self, names_max: int = _NAMES_MAX) -> None:
        self._names: OrderedDict[bytes, None] = OrderedDict()
        self._names_max = names_max

    def __contains__(self, name: bytes) -> bool:
        return name in self._names

    def add(self, names: Iterable[bytes]) -> None:
        """The store has these pages, or will have them soon."""
        for name in names:
            self._names[name] = None
            self._names.move_to_end(name)
        while len(self._names) > self._names_max:
            self._names.popitem(last=False)

    def discard(self, names: Iterable[bytes]) -> None:
        """The store does not have these pages."""
        for name in names:
            self._names.pop(name, None)
