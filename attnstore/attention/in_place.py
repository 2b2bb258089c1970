"""Attention over pages anywhere in this process's memory: the arena of a store node, or memory mapped from one.

Owns: the conversion of page addresses into the `pool` and `block_tables` of an attention backend, so that no byte of a page is
copied. Invariant: only the bytes of the given pages are read, although the pool's tensor spans everything between the lowest and
the highest of them. The caller that creates a `PagesInPlace` keeps its pages pinned while it is in use.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from attnstore.attention.cpu import CpuAttention
from attnstore.attention.warm_up import warm_up
from attnstore.core.layout import DType, PageLayout
from attnstore.errors import InvalidArgument

_TORCH_DTYPES: Final = {DType.BF16: torch.bfloat16, DType.FP16: torch.float16, DType.FP32: torch.float32}
_BLOCK_IDS_MAX: Final = (1 << 31) - 1
_BEHIND_ALL_KEYS: Final = 1 << 30
"""The position of a query row: after every key, so that it sees all of them."""

Buffer = bytes | bytearray | memoryview


class PagesInPlace:
    """Whole pages of one layout, in the order of their tokens (`views[i]` is page i, exactly `layout.page_bytes` long).

    Raises `InvalidArgument` for a layout of opaque elements, or for a page that is not aligned to its elements.
    """

    def __init__(self, layout: PageLayout, views: Sequence[memoryview]) -> None:
        if layout.dtype not in _TORCH_DTYPES:
            raise InvalidArgument(f"pages of type {layout.dtype.value} cannot be attended to: only the worker knows their elements")
        assert all(view.nbytes == layout.page_bytes for view in views)
        self.layout = layout
        self.dtype = _TORCH_DTYPES[layout.dtype]
        self.addresses: npt.NDArray[np.int64] = np.fromiter(map(_address, views), dtype=np.int64, count=len(views))
        if (self.addresses % self.dtype.itemsize).any():
            raise InvalidArgument(f"a page is not aligned to its elements of {self.dtype.itemsize} bytes")

    def __len__(self) -> int:
        return len(self.addresses)

    @property
    def keys(self) -> int:
        """The tokens of all pages together."""
        return len(self) * self.layout.block_tokens


@dataclass(frozen=True, slots=True)
class Rows:
    """Query rows against one set of pages: fp32 `[n, q_heads, head_dim]`, rotated, each positioned after every key."""

    pages: PagesInPlace
    query: Tensor


@dataclass(frozen=True, slots=True)
class Partial:
    """`out` fp32 `[n, q_heads, head_dim]` and `lse` fp32 `[n, q_heads]`, both contiguous; see `AttentionBackend`."""

    out: Tensor
    lse: Tensor

    def views(self) -> tuple[memoryview, memoryview]:
        """Returns the bytes of both, in native byte order."""
        return memoryview(_array(self.out)).cast("B"), memoryview(_array(self.lse)).cast("B")


class InPlaceAttention:
    """Attends from the rows of several sequences at once; one call at a time.

    `threads` is the number of cores of a call. It also sets torch's threads in this process, which calls with many rows use.
    """

    def __init__(self, threads: int) -> None:
        torch.set_num_threads(threads)
        self._backend = CpuAttention(threads)
        self._kept: tuple[tuple[PagesInPlace, ...], _Pool] | None = None

    def warm_up(self) -> None:
        """Compiles the kernels for every type of page: seconds the first time on a machine, little afterwards."""
        for dtype in _TORCH_DTYPES.values():
            warm_up(self._backend, torch.zeros(1, 1, 2, 1, 16, 64, dtype=dtype), q_heads=1)

    def attend(self, asked: Sequence[Rows], layer: int, scale: float) -> list[Partial]:
        """Returns one partial for each of `asked`. All pages have one layout, and all rows one number of heads."""
        pool = self._pool(tuple(rows.pages for rows in asked))
        counts = [len(rows.query) for rows in asked]
        query = asked[0].query if len(asked) == 1 else torch.cat([rows.query for rows in asked])
        out, lse = self._backend.paged_attention(
            query,
            pool.tensor,
            pool.block_tables,
            pool.context_lens,
            torch.tensor([0, *counts], dtype=torch.int32).cumsum(0, dtype=torch.int32),
            layer=layer,
            scale=scale,
            query_positions=torch.full((len(query),), _BEHIND_ALL_KEYS, dtype=torch.int32),
            out_dtype=torch.float32,
        )
        return [Partial(*both) for both in zip(out.split_with_sizes(counts), lse.split_with_sizes(counts), strict=True)]

    def _pool(self, sets: tuple[PagesInPlace, ...]) -> _Pool:
        # Every layer of a step uses the same sets.
        if self._kept is None or self._kept[0] != sets:
            self._kept = sets, _Pool(sets)
        return self._kept[1]

    def forget(self) -> None:
        """Drops the references to the pages of the last call."""
        self._kept = None


class _Pool:
    """Sets of pages as a pool for a backend: block `i` begins `i` units after the lowest page, whatever lies in between."""

    def __init__(self, sets: Sequence[PagesInPlace]) -> None:
        layout, dtype = sets[0].layout, sets[0].dtype
        addresses = np.concatenate([pages.addresses for pages in sets])
        base = int(addresses.min(initial=np.iinfo(np.int64).max)) if len(addresses) else 0
        offsets = addresses - base
        unit = int(np.gcd.reduce(offsets)) or layout.page_bytes
        blocks = int(offsets.max(initial=0)) // unit + 1
        if blocks > _BLOCK_IDS_MAX:
            raise InvalidArgument("the pages lie too far apart in memory to be attended to together")
        self.block_tables = torch.zeros(len(sets), max(len(pages) for pages in sets), dtype=torch.int32)
        for row, pages in zip(self.block_tables, sets, strict=True):
            row[: len(pages)] = torch.from_numpy(((pages.addresses - base) // unit).astype(np.int32))
        self.context_lens = torch.tensor([pages.keys for pages in sets], dtype=torch.int32)
        self.tensor = _tensor_at(base, (blocks - 1) * unit + layout.page_bytes if len(addresses) else 0, unit, layout, dtype)


def _tensor_at(base: int, span_bytes: int, unit_bytes: int, layout: PageLayout, dtype: torch.dtype) -> Tensor:
    """Returns `[blocks, *layout.shape]` from `base` on; blocks are `unit_bytes` apart and may overlap, because they
    are only read.
    """
    if not span_bytes:
        return torch.zeros(1, *layout.shape, dtype=dtype)
    flat = torch.frombuffer((ctypes.c_uint8 * span_bytes).from_address(base), dtype=dtype)
    blocks = (span_bytes - layout.page_bytes) // unit_bytes + 1
    inner = torch.empty(layout.shape, dtype=dtype, device="meta").stride()
    return flat.as_strided((blocks, *layout.shape), (unit_bytes // dtype.itemsize, *inner))


def rows_from(buffer: Buffer, q_heads: int, head_dim: int) -> Tensor:
    """Returns the query rows in `buffer`, fp32 `[n, q_heads, head_dim]`. The size of `buffer` must be a multiple of a row.

    They share the memory of a writable buffer, and are a copy of a read-only one, such as a message of gRPC, because torch does not
    support read-only memory.

    Raises `InvalidArgument` if an element is not finite: the partial would be NaN, and so would every later token.
    """
    writable = bytearray(buffer) if memoryview(buffer).readonly else buffer
    rows = torch.frombuffer(writable, dtype=torch.float32).view(-1, q_heads, head_dim)
    if not bool(torch.isfinite(rows).all()):
        raise InvalidArgument("a query row has an element that is not finite")
    return rows


def _array(tensor: Tensor) -> Any:
    return tensor.numpy()


def _address(view: memoryview) -> int:
    return int(np.frombuffer(view, dtype=np.uint8).__array_interface__["data"][0])
