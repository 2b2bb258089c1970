"""Paged attention, merges of partials and page copies on a GPU, by the kernels in `triton_kernels`.

Owns: `TritonAttention`, `merge_partials`, `gather_pages`, `scatter_pages`, `gather_runs`, `scatter_runs`.
Invariants: launching reads nothing back from the device, so a step's layers are queued without a stall. Every grid and every
temporary tensor depends on shapes only, so a CUDA graph replays with other contents.
Under `TRITON_INTERPRET=1` everything here also runs on CPU tensors.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Final

import torch
import triton
import triton.language as tl
from torch import Tensor

from attnstore.attention import triton_kernels
from attnstore.attention.triton_kernels import DECODE_ROWS, configuration, tile_rows
from attnstore.attention.triton_plan import Grid
from attnstore.errors import InvalidArgument

PROGRAMS_PER_MULTIPROCESSOR: Final = 4
"""Programs among which the keys of a step are divided: those that run at once (see `configuration`)."""

MERGED_AT_ONCE: Final = 16
COPY_WORDS: Final = 2048
_COMPUTE: Final = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}


class TritonAttention:
    """See `AttentionBackend`. `programs_wanted` is the number of programs that fill the device; None asks the device.

    How the keys of a row are split depends on the other sequences of the step, so results of different steps are equal up to
    rounding.
    """

    def __init__(self, programs_wanted: int | None = None) -> None:
        self._programs_wanted = programs_wanted

    def paged_attention(
        self,
        query: Tensor,
        pool: Tensor,
        block_tables: Tensor,
        context_lens: Tensor,
        query_starts: Tensor,
        *,
        layer: int,
        scale: float,
        sliding_window: int | None = None,
        query_positions: Tensor | None = None,
        out_dtype: torch.dtype | None = None,
        soft_cap: float | None = None,
        sinks: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """See `AttentionBackend.paged_attention`."""
        query = query.contiguous()
        total_q, q_heads, head_dim = query.shape
        _, _, _, kv_heads, block_tokens, _ = pool.shape
        seqs, max_blocks = block_tables.shape
        out = torch.empty_like(query, dtype=out_dtype or query.dtype)
        lse = torch.empty(total_q, q_heads, dtype=torch.float32, device=query.device)
        if total_q == 0:
            return out, lse
        group = q_heads // kv_heads
        block_d = padded_head_dim(head_dim)
        decode = total_q <= seqs * max(1, DECODE_ROWS // group)  # on average, the rows of a sequence fit one such tile
        block_m = max(tile_rows(block_d, decode=decode), int(triton.next_power_of_2(group)))
        programs = max(1, (self._programs_wanted or _programs(query.device)) // kv_heads)
        grid = Grid.of(
            total_q=total_q,
            seqs=seqs,
            keys_max=max_blocks * block_tokens,
            tile_tokens=block_m // group,
            programs=programs,
        )
        partial_lses = torch.empty(grid.partials, kv_heads, block_m, dtype=torch.float32, device=query.device)
        partial_outs = torch.empty(*partial_lses.shape, head_dim, dtype=torch.float32, device=query.device)
        config = configuration(block_m, block_d, max(query.element_size(), pool.element_size()))
        triton_kernels.attend[(grid.items, kv_heads)](
            query,
            pool,
            block_tables,
            context_lens,
            query_starts,
            query_positions,
            sinks,
            out,
            lse,
            partial_outs,
            partial_lses,
            seqs,
            programs,
            max_blocks,
            pool.stride(0),
            layer * pool.stride(1),
            scale * math.log2(math.e) if soft_cap is None else scale / soft_cap,
            (soft_cap or 0.0) * math.log2(math.e),
            sliding_window or 0,
            GROUP=group,
            HEAD_DIM=head_dim,
            BLOCK_TOKENS=block_tokens,
            HAS_POSITIONS=query_positions is not None,
            HAS_WINDOW=sliding_window is not None,
            HAS_CAP=soft_cap is not None,
            HAS_SINKS=sinks is not None,
            COMPUTE=_compute_type(query.dtype, pool.dtype),
            BLOCK_M=block_m,
            BLOCK_D=block_d,
            BLOCK_N=config.keys,
            num_warps=config.warps,
            num_stages=config.stages,
        )
        if grid.split_tiles:
            triton_kernels.merge_splits[(grid.split_tiles, q_heads)](
                context_lens,
                query_starts,
                out,
                lse,
                partial_outs,
                partial_lses,
                seqs,
                programs,
                sliding_window or 0,
                GROUP=group,
                HEAD_DIM=head_dim,
                HAS_WINDOW=sliding_window is not None,
                BLOCK_M=block_m,
                BLOCK_D=block_d,
                PARTS=MERGED_AT_ONCE,
            )
        return out, lse


def merge_partials(out: Tensor, lse: Tensor, outs: Tensor, lses: Tensor, row_ids: Tensor | None = None) -> None:
    """Merges partials over other keys into `out` `[total_q, heads, head_dim]` and `lse` fp32 `[total_q, heads]`, in place.

    outs: fp32 `[parts, rows, heads, head_dim]`; lses: fp32 `[parts, rows, heads]`, natural logarithm, -inf for an empty partial,
    whose `out` is not read. row_ids: int32 `[rows]`, the row of `out` that each row of the partials belongs to, negative for none;
    no row twice. None stands for all rows in order. All tensors are contiguous and on one device. The ids are not checked.

    The formula is that of `attnstore.attention.merge`. Raises `InvalidArgument` for shapes and types that do not match.
    """
    rows = len(out) if row_ids is None else len(row_ids)
    shape = (*outs.shape[:1], rows, *out.shape[1:])
    if outs.shape != shape or lses.shape != shape[:-1] or lse.shape != out.shape[:-1]:
        raise InvalidArgument(
            f"partials are {tuple(outs.shape)} and {tuple(lses.shape)} for {rows} rows of {tuple(out.shape)} and {tuple(lse.shape)}"
        )
    if any(each.dtype != torch.float32 for each in (lse, outs, lses)) or (row_ids is not None and row_ids.dtype != torch.int32):
        raise InvalidArgument("partials and lse must be float32, and row_ids int32")
    if not all(each.is_contiguous() for each in (out, lse, outs, lses)):
        raise InvalidArgument("partials, out and lse must be contiguous")
    if outs.numel():
        _, heads, head_dim = out.shape
        triton_kernels.merge_partials[(rows, heads)](
            out, lse, outs, lses, row_ids, len(outs), HEAD_DIM=head_dim, BLOCK_D=padded_head_dim(head_dim)
        )


@cache
def _programs(device: torch.device) -> int:
    """Returns the number of programs that fill a device. The interpreter runs one program after the other."""
    if device.type == "cpu":
        return 1
    return PROGRAMS_PER_MULTIPROCESSOR * int(torch.cuda.get_device_properties(device).multi_processor_count)


def _compute_type(query: torch.dtype, pool: torch.dtype) -> tl.dtype:
    """Returns the type of the products. The interpreter multiplies bf16 as integers, so they are widened there."""
    common = torch.promote_types(query, pool)
    return tl.float32 if triton.knobs.runtime.interpret and common == torch.bfloat16 else _COMPUTE[common]


def padded_head_dim(head_dim: int) -> int:
    """Returns the padded size of a head for the kernel: a power of two, at least 16."""
    return max(16, int(triton.next_power_of_2(head_dim)))


def gather_pages(pool: Tensor, block_ids: Tensor, pages: Tensor | None = None) -> Tensor:
    """Returns the pages `block_ids` (int32 `[n]`) of a pool, packed `[n, layers, 2, kv_heads, block_tokens, head_dim]` for one
    transfer, in `pages` if that is given.

    Raises `InvalidArgument` for a pool whose blocks are not contiguous, ids that are not int32 or `pages` that do not match.
    """
    if pages is None:
        pages = torch.empty(len(block_ids), *pool.shape[1:], dtype=pool.dtype, device=pool.device)
    _require_packed(pages, block_ids, pool)
    _copy(pool, pages, block_ids, None)
    return pages


def scatter_pages(pages: Tensor, block_ids: Tensor, pool: Tensor) -> None:
    """The inverse of `gather_pages`: writes packed pages to the blocks `block_ids` of a pool, in place. Raises the same errors."""
    _require_packed(pages, block_ids, pool)
    _copy(pages, pool, None, block_ids)


def _require_packed(pages: Tensor, block_ids: Tensor, pool: Tensor) -> None:
    if pages.shape != (len(block_ids), *pool.shape[1:]) or pages.dtype != pool.dtype:
        raise InvalidArgument(
            f"pages are {pages.dtype} {tuple(pages.shape)}; {len(block_ids)} blocks of this pool are {tuple(pool.shape[1:])} each"
        )


def _copy(source: Tensor, target: Tensor, source_ids: Tensor | None, target_ids: Tensor | None) -> None:
    ids = source_ids if source_ids is not None else target_ids
    if ids is None or ids.dtype != torch.int32 or ids.dim() != 1:
        raise InvalidArgument("block_ids must be an int32 vector")
    if len(ids) == 0:
        return
    if not (source[0].is_contiguous() and target[0].is_contiguous()):
        raise InvalidArgument("every block of a pool must be contiguous")
    words = source[0].numel()
    grid = (len(ids), triton.cdiv(words, COPY_WORDS))
    triton_kernels.copy_pages[grid](
        source, target, source_ids, target_ids, source.stride(0), target.stride(0), words, BLOCK=COPY_WORDS
    )


def gather_runs(cache: Tensor, runs: Tensor, run_words: int, block_ids: Tensor, pages: Tensor) -> None:
    """Packs blocks of which a page lies in several runs of memory.

    runs: int64 `[runs, 2]`, for each run of a page in order where it begins in block 0, counted from the first element of `cache`,
    and how far apart it lies in neighbouring blocks, in elements. Each has `run_words` elements. block_ids: int32 `[n]`. pages:
    `[n, runs * run_words]`, contiguous and of the type of `cache`. Runs and ids are not checked.

    Raises `InvalidArgument` for ids that are not int32 or pages that do not match.
    """
    _copy_runs(cache, runs, run_words, block_ids, pages, into_pages=True)


def scatter_runs(cache: Tensor, runs: Tensor, run_words: int, block_ids: Tensor, pages: Tensor) -> None:
    """The inverse of `gather_runs`: writes packed pages to blocks. Raises the same errors."""
    _copy_runs(cache, runs, run_words, block_ids, pages, into_pages=False)


def _copy_runs(cache: Tensor, runs: Tensor, run_words: int, block_ids: Tensor, pages: Tensor, *, into_pages: bool) -> None:
    if block_ids.dtype != torch.int32 or block_ids.dim() != 1:
        raise InvalidArgument("block_ids must be an int32 vector")
    count, words = len(block_ids), len(runs) * run_words
    if pages.shape != (count, words) or pages.dtype != cache.dtype or not pages.is_contiguous():
        raise InvalidArgument(f"pages are {pages.dtype} {tuple(pages.shape)}; {count} blocks are {cache.dtype} {(count, words)}")
    if count:
        grid = (count, triton.cdiv(words, COPY_WORDS))
        triton_kernels.copy_runs[grid](cache, pages, block_ids, runs, words, run_words, INTO_PAGES=into_pages, BLOCK=COPY_WORDS)
