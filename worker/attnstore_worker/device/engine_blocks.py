"""The blocks of an engine that runs the model itself, such as vLLM, as pages of bytes.

Owns: `EngineBlocks`, the order of a page's bytes, and where they lie. Invariant: the order of a page is that of the layers and of
their tensors' dimensions. It does not depend on the memory order, so blocks that lie differently have equal pages.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Final, NamedTuple

import numpy
import torch
from torch import Tensor

_WORDS: Final = (torch.int64, torch.int32, torch.int16, torch.uint8)
"""Elements of a copy, the largest first."""


class BlockRuns(NamedTuple):
    """The contiguous pieces of a block. `cache`: a tensor of words on the engine's device, whose first one is the origin. `table`:
    int64 `[runs, 2]`, for each run of a page in order its place in block 0 and its distance between neighbouring
    blocks, in words. Each run has `words` words.
    """

    cache: Tensor
    table: Tensor
    words: int


class EngineBlocks:
    """`layers`: the caches of the layers in the order of a page, uint8 `[blocks, ...]`, contiguous in the last dimension."""

    def __init__(self, layers: Sequence[Tensor]) -> None:
        self.parts = _joined(layers)
        """A page holds the bytes of a block of each part, one after the other."""
        self.blocks = len(layers[0])
        self.place = layers[0].device
        self._sizes = [part[0].numel() for part in self.parts]
        self.page_bytes = sum(self._sizes)

    def views(self, block_id: int) -> list[Tensor]:
        """Returns the parts of a block, which `split` gives for a page."""
        return [part[block_id] for part in self.parts]

    def split(self, page: Tensor) -> list[Tensor]:
        """Returns the parts of a page, uint8 and contiguous, in the shapes of `views`."""
        pieces = torch.split(page.view(-1), self._sizes)
        return [piece.view(part.shape[1:]) for piece, part in zip(pieces, self.parts, strict=True)]

    @property
    def whole(self) -> Tensor | None:
        """Returns the blocks as `[blocks, page_bytes]` if their memory is contiguous and in the order of pages; else None."""
        if len(self.parts) > 1 or not self.parts[0].is_contiguous():
            return None
        return self.parts[0].view(self.blocks, self.page_bytes)

    def runs(self) -> BlockRuns:
        """Returns the longest runs of equal length that a block consists of, in the largest words that they allow."""
        origin = self.parts[0].data_ptr()
        pieces = [_runs_of(part, part.data_ptr() - origin) for part in self.parts]
        run_bytes = math.gcd(*(size for _, size in pieces))
        begins = numpy.concatenate([_cut(offsets, size, run_bytes) for offsets, size in pieces])
        counts = [part_bytes // run_bytes for part_bytes in self._sizes]
        strides = numpy.repeat([part.stride(0) for part in self.parts], counts)
        first = self.parts[0]
        common = math.gcd(run_bytes, origin, first.storage_offset(), *begins.tolist(), *strides.tolist())
        word = next(each for each in _WORDS if common % each.itemsize == 0)
        cache = first.as_strided((run_bytes,), (1,)).view(word)
        table = torch.from_numpy(numpy.stack([begins, strides], axis=1) // word.itemsize)
        return BlockRuns(cache, table, run_bytes // word.itemsize)


def _joined(layers: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Returns one tensor `[blocks, layers, ...]` over all layers if their memory is equally spaced, else the layers."""
    first, addresses = layers[0], [layer.data_ptr() for layer in layers]
    spacings = {after - before for before, after in pairwise(addresses)}
    alike = {(layer.shape, layer.stride(), layer.untyped_storage().data_ptr()) for layer in layers}
    if len(alike) > 1 or len(spacings) > 1 or min(spacings, default=1) <= 0:
        return tuple(layers)
    spacing = next(iter(spacings), 0)
    shape, strides = (len(first), len(layers), *first.shape[1:]), (first.stride(0), spacing, *first.stride()[1:])
    return (first.as_strided(shape, strides),)


def _runs_of(part: Tensor, begin: int) -> tuple[numpy.ndarray, int]:
    """Returns where the runs of block 0 begin, in their order, and the length of each, in bytes."""
    dimensions = list(zip(part.shape[1:], part.stride()[1:], strict=True))
    size = 1
    while dimensions and (dimensions[-1][1] == size or dimensions[-1][0] == 1):
        size *= dimensions.pop()[0]
    begins = numpy.array([begin], dtype=numpy.int64)
    for count, stride in dimensions:
        begins = (begins[:, None] + numpy.arange(count, dtype=numpy.int64) * stride).reshape(-1)
    return begins, size


def _cut(begins: numpy.ndarray, size: int, run_bytes: int) -> numpy.ndarray:
    return (begins[:, None] + numpy.arange(0, size, run_bytes, dtype=numpy.int64)).reshape(-1)
