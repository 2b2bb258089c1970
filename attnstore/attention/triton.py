"""Paged attention and page copies on a GPU, by the kernels in `triton_kernels`.

Owns: `TritonAttention`, `gather_pages`, `scatter_pages`.
Invariant: launching reads nothing back from the device, so a step's layers are queued without a stall.
Under `TRITON_INTERPRET=1` everything here also runs on CPU tensors.
"""

from __future__ import annotations

import math
from typing import Final

import torch
import triton
import triton.language as tl
from torch import Tensor

from attnstore.attention import triton_kernels
from attnstore.errors import InvalidArgument

PREFILL_ROWS: Final = 64
"""Rows (query tokens times GQA group) of a program's tile for sequences with many rows; tensor cores need at least DECODE_ROWS."""

DECODE_ROWS: Final = 16
SPLITS_MAX: Final = 32
SPLIT_KEYS_MIN: Final = 256
"""A split shorter than this costs more to merge than it gains."""

COPY_WORDS: Final = 2048
_COMPUTE: Final = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}


class TritonAttention:
    """See `AttentionBackend`. `programs_wanted` is the number of programs that fill the device; None queries it (two per
    multiprocessor).
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
        block_m = _tile_rows(total_q, seqs, group)
        tiles = total_q // (block_m // group) + seqs
        splits = self._splits(tiles * kv_heads, max_blocks * block_tokens, query.device)
        outs = out if splits == 1 else torch.empty(splits, *query.shape, dtype=torch.float32, device=query.device)
        lses = lse if splits == 1 else torch.empty(splits, *lse.shape, dtype=torch.float32, device=query.device)
        triton_kernels.attend[(tiles, kv_heads, splits)](
            query,
            pool,
            block_tables,
            context_lens,
            query_starts,
            query_positions,
            sinks,
            outs,
            lses,
            seqs,
            total_q,
            q_heads,
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
            BLOCK_D=padded_head_dim(head_dim),
        )
        if splits > 1:
            states = total_q * q_heads
            triton_kernels.merge_splits[(states,)](
                outs, lses, out, lse, states, splits, HEAD_DIM=head_dim, BLOCK_D=padded_head_dim(head_dim)
            )
        return out, lse

    def _splits(self, programs: int, keys_max: int, device: torch.device) -> int:
        if self._programs_wanted is not None:
            wanted = self._programs_wanted
        else:  # the interpreter runs one program after the other
            wanted = 1 if device.type == "cpu" else 2 * torch.cuda.get_device_properties(device).multi_processor_count
        return max(1, min(wanted // programs, keys_max // SPLIT_KEYS_MIN, SPLITS_MAX))


def _compute_type(query: torch.dtype, pool: torch.dtype) -> tl.dtype:
    """Returns the type of the products. The interpreter multiplies bf16 as integers, so they are widened there."""
    common = torch.promote_types(query, pool)
    return tl.float32 if triton.knobs.runtime.interpret and common == torch.bfloat16 else _COMPUTE[common]


def padded_head_dim(head_dim: int) -> int:
    """Returns the padded size of a head for the kernel: a power of two, at least 16."""
    return max(16, int(triton.next_power_of_2(head_dim)))


def _tile_rows(total_q: int, seqs: int, group: int) -> int:
    """Returns the rows of a tile: those of a decode step if the sequences have few rows on average, else a prefill's."""
    wanted = PREFILL_ROWS if total_q > seqs * max(1, DECODE_ROWS // group) else DECODE_ROWS
    return max(wanted, int(triton.next_power_of_2(group)))


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
