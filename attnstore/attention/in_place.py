"""Attention over pages anywhere in this process's memory: the arena of a store node, or memory mapped from one.

Owns: the conversion of page addresses into the `pool` and `block_tables` of an attention backend, so that no byte of a page is
copied. Invariant: only the bytes of the given pages are read, although the pool's tensor spans everything between the lowest and
the highest of them. The caller that creates a `PagesInPlace` keeps its pages pinned while it is in use.
"""

# mypy: disable-error-code="untyped-decorator,no-untyped-call,no-untyped-def"

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from attnstore.attention import team
from attnstore.attention.cpu import CpuAttention
from attnstore.attention.cpu_decode import DecodeCall
from attnstore.attention.latent import CpuLatentAttention, LatentCall, latent_rows
from attnstore.attention.warm_up import warm_up, warm_up_latents
from attnstore.attention.windows import seeing_from
from attnstore.copying.compiled import compiled
from attnstore.core.layout import DType, PageLayout
from attnstore.errors import InvalidArgument

_TORCH_DTYPES: Final = {DType.BF16: torch.bfloat16, DType.FP16: torch.float16, DType.FP32: torch.float32}
_BLOCK_IDS_MAX: Final = (1 << 31) - 1
_ZERO: Final = np.float32(0.0)
_ONE: Final = np.float32(1.0)

_ALL_KEYS: Final = memoryview(b"")

Buffer = bytes | bytearray | memoryview
Visibility = tuple[Tensor, Tensor, Tensor, int | None]
"""`context_lens`, `query_starts`, `query_positions` and `sliding_window` of `AttentionBackend.paged_attention`."""


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
class Asked:
    """What all queries of a stream share; `value_dim` is 0, or the pages hold latents, see `PageLayout.check_latents`."""

    q_heads: int
    scale: float
    value_dim: int = 0


class PreparedQuery:
    """Everything about a query that does not change from layer to layer of a step: which rows ask which pages, how the work is
    divided, and memory for the rows and the result, so that a layer allocates nothing.

    For each layer: `load` the rows, let `InPlaceAttention.attend` compute, and read `out` and `lse` before the next `load`.
    """

    def __init__(
        self,
        backend: CpuAttention,
        threads: int,
        sets: Sequence[PagesInPlace],
        counts: Sequence[int],
        asked: Asked,
        firsts: memoryview,
    ) -> None:
        layout, pool = sets[0].layout, _Pool(sets)
        total, row_dim = sum(counts), layout.query_dim(asked.value_dim)
        starts = torch.tensor([0, *counts], dtype=torch.int32).cumsum(0, dtype=torch.int32)
        numbers = _first_keys(sets, counts, firsts)
        seen_from = [int(of_set.min()) // layout.block_tokens for of_set in np.split(numbers, starts[1:-1].numpy())]
        self.seen_pages = [len(pages) - first for pages, first in zip(sets, seen_from, strict=True)]
        """How many pages of each set its rows see."""
        visibility = pool.context_lens, starts, *seeing_from(torch.from_numpy(numbers))
        self._shape = total, asked.q_heads, row_dim
        self._factor = np.float32(asked.scale * math.log2(math.e))
        self._work: DecodeCall | _ManyRows | LatentCall
        if asked.value_dim:
            self._work = LatentCall(
                latent_rows(pool.tensor, layout),
                pool.block_tables,
                *visibility,
                q_heads=asked.q_heads,
                value_dim=asked.value_dim,
                threads=threads,
            )
            self._flat_rows = self._work.rows
        else:
            rows = torch.zeros(self._shape)
            self._flat_rows = rows.view(-1).numpy()
            plan = backend.plan(rows, pool.tensor, *visibility)
            if plan.prefills:
                self._work = _ManyRows(backend, pool, rows, visibility, asked.scale)
                self._factor = _ONE
            else:
                self._work = DecodeCall(plan, pool.tensor, pool.block_tables, self._flat_rows, asked.q_heads)
        self.shares = self._work.shares
        self.run = self._work.run
        self.finish = self._work.finish
        self.out = _bytes(self._work.outs)
        """fp32 `[rows, q_heads, head_dim]`, `value_dim` for latents, in native byte order: the rows of all sets in their order."""
        self.lse = _bytes(self._work.lses)
        """fp32 `[rows, q_heads]`, natural logarithm."""

    @property
    def divides(self) -> bool:
        """Whether each of the shares is to be computed by one thread; else a share takes all threads of torch."""
        return not isinstance(self._work, _ManyRows)

    def load(self, rows: Buffer) -> None:
        """Takes the query rows of a layer: fp32 `[rows, q_heads, head_dim]`, rotated, each positioned after every key.

        Raises `InvalidArgument` if their size is wrong or an element is not finite: the partial would be NaN, and so would every
        later token.
        """
        given = memoryview(rows)
        if given.nbytes != self._flat_rows.nbytes:
            total, heads, _ = self._shape
            raise InvalidArgument(f"{total} rows of {heads} heads have {self._flat_rows.nbytes} bytes, not {given.nbytes}")
        # Compiled code takes only memory that can be written, and a message of gRPC is read-only.
        asked = np.frombuffer(bytearray(given) if given.readonly else given, dtype=np.float32)
        if not _load(asked, self._factor, self._flat_rows):
            raise InvalidArgument("a query row has an element that is not finite")


class _ManyRows:
    """A query with too many rows for the decode kernel."""

    shares: Final = 1

    def __init__(self, backend: CpuAttention, pool: _Pool, rows: Tensor, visibility: Visibility, scale: float) -> None:
        context_lens, starts, self._positions, self._window = visibility
        self._backend = backend
        self._arguments = rows, pool.tensor, pool.block_tables, context_lens, starts
        self._scale = scale
        self.outs = np.empty(rows.numel(), np.float32)
        self.lses = np.empty(rows.shape[0] * rows.shape[1], np.float32)

    def run(self, _: int, layer: int) -> None:
        """Computes the result."""
        out, lse = self._backend.paged_attention(
            *self._arguments,
            layer=layer,
            scale=self._scale,
            sliding_window=self._window,
            query_positions=self._positions,
            out_dtype=torch.float32,
        )
        self.outs[:] = out.reshape(-1).numpy()
        self.lses[:] = lse.reshape(-1).numpy()

    def finish(self) -> None:
        """No-op."""


class InPlaceAttention:
    """Attends from the rows of several sequences at once; one call at a time.

    `threads` is the number of cores of a call. It also sets torch's threads in this process, which calls with many rows use.
    """

    def __init__(self, threads: int) -> None:
        torch.set_num_threads(threads)
        self._backend = CpuAttention(threads)
        self._threads = threads

    def warm_up(self) -> None:
        """Compiles the kernels for every type of page: seconds the first time on a machine, little afterwards."""
        for dtype in _TORCH_DTYPES.values():
            warm_up(self._backend, torch.zeros(1, 1, 2, 1, 16, 64, dtype=dtype), q_heads=1)
            warm_up_latents(CpuLatentAttention(self._threads), torch.zeros(1, 1, 16, 64, dtype=dtype))
        layout = PageLayout(layers=1, kv_heads=1, head_dim=64, block_tokens=16, dtype=DType.FP32)
        query = self.prepare([PagesInPlace(layout, [memoryview(bytearray(layout.page_bytes))])], [1], Asked(1, 1.0))
        query.load(bytes(len(query.out)))
        self.attend([query], 0)

    def prepare(
        self, sets: Sequence[PagesInPlace], counts: Sequence[int], asked: Asked, firsts: memoryview = _ALL_KEYS
    ) -> PreparedQuery:
        """Prepares queries of `counts[i]` rows, one or more, against `sets[i]`. All pages have one layout.

        firsts: u32 `[total rows]`, the first key of its set that each row sees; empty if every row sees all. Raises
        `InvalidArgument` for one that is not below the set's keys.
        """
        return PreparedQuery(self._backend, self._threads, sets, counts, asked, firsts)

    def attend(self, queries: Sequence[PreparedQuery], layer: int) -> None:
        """Computes the results of the loaded rows of several queries."""
        shares = [(query, share) for query in queries for share in range(query.shares)]
        threads = min(self._threads, len(shares)) if all(query.divides for query in queries) else 1

        def part(thread: int) -> None:
            for query, share in shares[thread::threads]:
                query.run(share, layer)

        if threads == 1:
            part(0)
        else:
            team.run_apart(threads, part)
        for query in queries:
            query.finish()


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


def _first_keys(sets: Sequence[PagesInPlace], counts: Sequence[int], firsts: memoryview) -> npt.NDArray[np.int32]:
    """Returns the first key of its set that each row sees, checked."""
    if not firsts:
        return np.zeros(sum(counts), dtype=np.int32)
    numbers = np.frombuffer(firsts, dtype="<u4")
    if (numbers >= np.repeat([pages.keys for pages in sets], counts)).any():
        raise InvalidArgument("a row's first key is not among the keys of its set; rows that see none are not sent")
    return numbers.astype(np.int32)


@compiled
def _load(rows, factor, scaled):
    """Computes `scaled = rows * factor`, fp32. Returns whether every element of `rows` is finite."""
    checked = _ZERO  # NaN as soon as an element is not finite
    for at in range(rows.shape[0]):
        value = rows[at]
        checked += value * _ZERO
        scaled[at] = value * factor
    return checked == _ZERO


def _bytes(array: Any) -> memoryview:
    return memoryview(array).cast("B")


def _address(view: memoryview) -> int:
    return int(np.frombuffer(view, dtype=np.uint8).__array_interface__["data"][0])
