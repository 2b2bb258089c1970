"""Merges the layers of a read that arrive from several nodes at once into those of one read.

Owns: the progress of each node. Invariant: `on_layer` is called for each layer once, in order, and only when every node has sent
it.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence

from attnstore.client.base import OnLayer


class LayerMerge:
    """`groups`: for each node the ascending indices of its pages in a read of `pages` pages. Safe from any thread."""

    def __init__(self, on_layer: OnLayer, layers: tuple[int, int], groups: Sequence[Sequence[int]], pages: int) -> None:
        self._on_layer = on_layer
        self._next, self._end = layers
        self._groups = {indices[0]: indices for indices in groups}
        self._through = {first: self._next for first in self._groups}
        asked = {index for indices in groups for index in indices}
        # A page that no node is asked for will not arrive.
        self._pages = next((index for index in range(pages) if index not in asked), pages)
        self._leading = dict.fromkeys(self._groups, self._pages)
        self._lock = threading.Lock()

    def of_group(self, first: int) -> OnLayer:
        """Returns the `on_layer` for the node whose pages begin with index `first`."""

        def on_layer(layer: int, pages: int) -> None:
            with self._lock:
                self._through[first] = layer + 1
                indices = self._groups[first]
                self._leading[first] = indices[pages] if pages < len(indices) else self._pages
                self._advance(min(self._through.values()), min(self._leading.values()))

        return on_layer

    def finish(self, leading: int) -> None:
        """Ends the read with that many leading pages: reports the layers that were not reported."""
        with self._lock:
            self._advance(self._end, leading)

    def _advance(self, through: int, leading: int) -> None:
        while self._next < through:
            layer, self._next = self._next, self._next + 1
            self._on_layer(layer, leading)
