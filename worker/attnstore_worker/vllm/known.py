"""Which pages the store is believed to have, so that none is copied and sent again each time that vLLM itself still has its block.

Owns: names of pages that were saved or found, the latest of them. A belief may be wrong (the store evicts, refuses, restarts); the
next look-up says so, and the page is saved again when it is computed again.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from typing import Final

_NAMES_MAX: Final = 1 << 18
"""Some 30 MB; 33 million tokens in vLLM's blocks of 128."""


class KnownPages:
    """The `names_max` names added last. Not thread-safe."""

    def __init__(self, names_max: int = _NAMES_MAX) -> None:
        self._names: OrderedDict[bytes, None] = OrderedDict()
        self._names_max = names_max

    def __contains__(self, name: bytes) -> bool:
        return name in self._names

    def add(self, names: Iterable[bytes]) -> None:
        """The store has these, or will soon."""
        for name in names:
            self._names[name] = None
            self._names.move_to_end(name)
        while len(self._names) > self._names_max:
            self._names.popitem(last=False)

    def discard(self, names: Iterable[bytes]) -> None:
        """The store has these no more."""
        for name in names:
            self._names.pop(name, None)
