"""Blocks in the store that one chunk fetches to attend to them here, because its queries would take longer on the link.

Owns: `FetchedLayers`: the fetches of one step, one after the other on a thread, and the memory that they arrive in. A window is one
layer of some pages. While one is attended to, the next one arrives, so a context of any length needs the memory of two windows.
Invariant: a partial is computed only from pages that came whole and verified; otherwise the step ends with `PagesLost`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Executor, Future
from dataclasses import dataclass
from typing import Any, Final, NoReturn

import numpy as np
import torch
from torch import Tensor

from attnstore.attention import AttentionBackend
from attnstore.attention.windows import KEYS_MAX
from attnstore.core.hashing import BlockHash
from attnstore.core.layout import PageLayout
from attnstore.limits import MIB
from attnstore_worker.dtypes import TORCH_DTYPES
from attnstore_worker.errors import PagesLost

WINDOW_BYTES_MAX: Final = 8 * MIB
"""The memory of a window. A read of so many bytes costs little more than its bytes."""

ReadLayer = Callable[[Sequence[BlockHash], Sequence[memoryview], int], bool]
"""`read(hashes, buffers, layer)` fills a buffer of `layout.layer_bytes` for each page. Returns whether all came. May raise."""


@dataclass(frozen=True, slots=True, eq=False)
class FetchedPart:
    """Rows `[first_row, first_row + rows)` of a step see all keys of these pages."""

    hashes: Sequence[BlockHash]
    first_row: int
    rows: int


def window_pages(layout: PageLayout) -> int:
    """Returns the most pages of a window."""
    return max(1, WINDOW_BYTES_MAX // layout.layer_bytes)


class FetchedLayers:
    """Call `merge` for each layer in order. `thread` runs one call at a time. `lose` is called with the part whose pages do not
    come.
    """

    def __init__(
        self,
        parts: Sequence[FetchedPart],
        layout: PageLayout,
        scale: float,
        backend: AttentionBackend,
        read: ReadLayer,
        thread: Executor,
        lose: Callable[[FetchedPart], None],
    ) -> None:
        most = window_pages(layout)
        self._windows = [
            (part, slice(first, min(first + most, len(part.hashes))))
            for part in parts
            for first in range(0, len(part.hashes), most)
        ]
        self._layout, self._scale, self._backend = layout, scale, backend
        self._read, self._thread, self._lose = read, thread, lose
        pages = max(pages.stop - pages.start for _, pages in self._windows)
        self._memories = [self._memory(pages) for _ in range(2)]
        self._arriving: list[Future[bool]] = []
        for number in range(2):
            self._fetch(number)

    @property
    def bytes_per_layer(self) -> int:
        """The bytes that are fetched for each layer."""
        return self._layout.layer_bytes * sum(pages.stop - pages.start for _, pages in self._windows)

    @property
    def windows(self) -> int:
        """The fetches for each layer."""
        return len(self._windows)

    def merge(self, layer: int, query: Tensor, outs: Any, lses: Any) -> None:
        """Turns contiguous fp32 `outs` `[total_q, q_heads, head_dim]` and `lses` into those over the fetched keys too, in place.

        query: `[total_q, q_heads, head_dim]`. Raises `PagesLost`.
        """
        from attnstore.attention import online_softmax  # not at the top: a machine with a GPU may lack numba

        for index, (part, pages) in enumerate(self._windows):
            number = layer * len(self._windows) + index
            self._wait(part)
            rows = slice(part.first_row, part.first_row + part.rows)
            out, lse = self._attend(query[rows], self._memories[number % 2][: pages.stop - pages.start])
            numbers = np.arange(rows.start, rows.stop)
            if not online_softmax.merge_rows(outs, lses, numbers, out.contiguous().numpy(), lse.contiguous().numpy()):
                self._give_up(part, "attention to fetched pages is not finite")
            self._fetch(number + 2)

    def close(self) -> None:
        """Cancels the fetches that have not begun: the step is void, and the next one needs the thread."""
        for fetch in self._arriving:
            fetch.cancel()

    def _wait(self, part: FetchedPart) -> None:
        try:
            whole = self._arriving.pop(0).result()
        except Exception as error:
            self._give_up(part, f"the pages to attend to did not come: {error}")
        if not whole:
            self._give_up(part, "not all pages to attend to are in the store any more")

    def _give_up(self, part: FetchedPart, why: str) -> NoReturn:
        self.close()
        self._lose(part)
        raise PagesLost(why) from None

    def _fetch(self, number: int) -> None:
        layer, index = divmod(number, len(self._windows))
        if layer < self._layout.layers:
            part, pages = self._windows[index]
            count = pages.stop - pages.start
            raw: Any = self._memories[number % 2][:count].view(torch.uint8).view(count, -1).numpy()
            self._arriving.append(self._thread.submit(self._read, part.hashes[pages], [memoryview(page) for page in raw], layer))

    def _attend(self, query: Tensor, pool: Tensor) -> tuple[Tensor, Tensor]:
        rows, pages = len(query), len(pool)
        return self._backend.paged_attention(
            query,
            pool,
            torch.arange(pages, dtype=torch.int32).unsqueeze(0),
            torch.tensor([pages * self._layout.block_tokens], dtype=torch.int32),
            torch.tensor([0, rows], dtype=torch.int32),
            layer=0,
            scale=self._scale,
            query_positions=torch.full((rows,), KEYS_MAX, dtype=torch.int32),
            out_dtype=torch.float32,
        )

    def _memory(self, pages: int) -> Tensor:
        _, *shape = self._layout.shape
        return torch.empty(pages, 1, *shape, dtype=TORCH_DTYPES[self._layout.dtype])
