"""Paged attention on the CPU, at the speed of its memory.

Owns: `CpuAttention`. The number of query rows of a sequence decides between two ways, because one is bound by memory and the other
by arithmetic (measured in docs/decisions/0010-cpu-attention.md):
few rows (decode, speculative verification, pushed-down queries): the kernel in `cpu_kernel` reads scattered pages in place;
many rows (prefill): the visible blocks are gathered once, and torch's flash attention, which uses the matrix units, does the rest.
Invariant: the results do not depend on how the work is divided, up to rounding.
"""

from __future__ import annotations

import math
import threading
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor

from attnstore.attention import cpu_kernel, cpu_pages, prefill_kernel, team
from attnstore.attention.cpu_decode import DecodeCall
from attnstore.attention.cpu_plan import Plan, Prefill, make_plan
from attnstore.attention.simd import ELEMENTS, LANES

DECODE_ROWS_MAX: Final = {torch.bfloat16: 48, torch.float16: 96, torch.float32: 96}
"""Up to this many rows per KV head (query tokens times GQA group), the decode kernel is faster than gathering. The number depends
on the pool's type, because the matrix units take only bf16. See the decision record.
"""

TILE_ROWS: Final = 256
"""Query tokens per flash call: bounds the rows of its mask, and the work wasted above the causal diagonal to half of its square."""

SHARE_BYTES_MIN: Final = 512 * 1024
"""Bytes of keys and values that justify waking another thread: about 80 us of reading."""


class CpuAttention:
    """See `AttentionBackend`. Safe to call from several threads at once.

    `threads` is the number of cores that one call may use for its decode rows; None means `torch.get_num_threads()`, which prefill
    always uses.
    """

    def __init__(self, threads: int | None = None) -> None:
        self._threads = threads
        # A store node, which passes `threads`, needs its cores between two calls, so they must not spin.
        self._run = team.run if threads is None else team.run_apart
        # One step calls every layer with the same lengths, so the last plan is kept with its inputs. They are compared by content,
        # because a caller may write the next step's lengths into the same tensors.
        self._planned: tuple[tuple[Any, ...], Plan] | None = None
        self._kept = threading.local()

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
        plan = self.plan(query, pool, context_lens, query_starts, query_positions, sliding_window)
        if query.stride()[1:] != (query.shape[2], 1):
            query = query.contiguous()
        scores = _Scores(scale, soft_cap, sinks)
        decoded = self._decode(plan, pool, block_tables, layer, query, scores) if len(plan.decode_rows) else None
        if decoded is not None and not plan.prefills:
            return decoded[0].to(out_dtype or query.dtype), decoded[1]
        pages = _Pages(pool, block_tables, layer)
        out = torch.empty_like(query, dtype=out_dtype or query.dtype)
        lse = torch.empty(query.shape[:2], dtype=torch.float32)
        if decoded is not None:
            out[plan.decode_rows] = decoded[0].to(out.dtype)
            lse[plan.decode_rows] = decoded[1]
        for prefill in plan.prefills:
            if (
                query.dtype is pages.dtype is torch.bfloat16
                and prefill_kernel.fits(pages.head_dim, pages.block_tokens)
                and scale > 0
            ):
                self._attend_many(plan, prefill, pages, query, scores, out, lse)
                continue
            keys_values = self._gather(pages, prefill)
            first_key = prefill.block_begin * pages.block_tokens
            for begin in range(prefill.row_begin, prefill.row_end, TILE_ROWS):
                rows = slice(begin, min(begin + TILE_ROWS, prefill.row_end))
                visible = torch.from_numpy(plan.visible[rows])
                out[rows], lse[rows] = _attend_gathered(query[rows], keys_values, first_key, visible, scores)
        return out, lse

    def plan(
        self,
        query: Tensor,
        pool: Tensor,
        context_lens: Tensor,
        query_starts: Tensor,
        query_positions: Tensor | None = None,
        sliding_window: int | None = None,
        share_bytes_min: int = SHARE_BYTES_MIN,
    ) -> Plan:
        """Returns how a call with these arguments is divided; of `query` and `pool` only shapes and types matter."""
        _, _, _, kv_heads, block_tokens, head_dim = pool.shape
        group = query.shape[1] // kv_heads
        threads = self._threads or torch.get_num_threads()
        positions = None if query_positions is None else query_positions.numpy().tobytes()
        lengths = (context_lens.numpy().tobytes(), query_starts.numpy().tobytes(), positions)
        source = (lengths, sliding_window, pool.shape[3:], pool.dtype, group, threads, share_bytes_min)
        planned = self._planned
        if planned is not None and planned[0] == source:
            return planned[1]
        in_place = head_dim % LANES == 0 and block_tokens % cpu_kernel.QUAD == 0
        plan = make_plan(
            context_lens,
            query_starts,
            query_positions,
            sliding_window,
            block_tokens=block_tokens,
            decode_rows_max=DECODE_ROWS_MAX[pool.dtype] // group if in_place else 0,
            block_bytes=2 * kv_heads * block_tokens * head_dim * pool.element_size(),
            share_bytes_min=share_bytes_min,
            threads=threads,
        )
        self._planned = (source, plan)
        return plan

    def _decode(
        self, plan: Plan, pool: Tensor, block_tables: Tensor, layer: int, query: Tensor, scores: _Scores
    ) -> tuple[Tensor, Tensor]:
        """Returns the result of the decode rows in the order of `plan.decode_rows`: fp32 `[rows, q_heads, head_dim]` and lse."""
        _, q_heads, head_dim = query.shape
        scaled = (query[: int(plan.decode_rows[-1]) + 1].float() * scores.factor).view(-1).numpy()
        call = DecodeCall(plan, pool, block_tables, scaled, q_heads, cap=scores.cap, sinks=scores.flat_sinks)
        self._run(call.shares, lambda share: call.run(share, layer))
        call.finish()
        return torch.from_numpy(call.outs).view(-1, q_heads, head_dim), torch.from_numpy(call.lses).view(-1, q_heads)

    def _attend_many(
        self, plan: Plan, prefill: Prefill, pages: _Pages, query: Tensor, scores: _Scores, out: Tensor, lse: Tensor
    ) -> None:
        """Writes the rows of `out` and `lse` that belong to the prefills."""
        threads = torch.get_num_threads()
        q_heads, head_dim = query.shape[1:]
        group = q_heads // pages.kv_heads
        panels = -(-prefill.block_end * pages.block_tokens // prefill_kernel.PANEL)
        packed = self._keep(2 * pages.kv_heads * panels * prefill_kernel.PANEL * head_dim, pages.dtype)
        keys, values = (half.numpy() for half in packed.view(ELEMENTS[pages.dtype]).chunk(2))
        narrow, wide = prefill_kernel.scratch_elements(group, head_dim)
        flat_query, flat_out = cpu_pages.elements(query), cpu_pages.elements(out)
        flat_lse, counters = lse.view(-1).numpy(), np.zeros(prefill_kernel.COUNTERS, np.int64)

        def attend(_: int) -> None:
            prefill_kernel.attend_many(
                threads,
                counters,
                prefill.row_begin,
                prefill.row_end,
                pages.tables[prefill.sequence],
                plan.visible,
                flat_query,
                query.stride(0),
                pages.flat,
                pages.block_stride,
                pages.layer_at,
                pages.kv_heads,
                group,
                pages.block_tokens,
                head_dim,
                np.float32(scores.factor),
                scores.cap,
                scores.flat_sinks,
                keys,
                values,
                flat_out,
                flat_lse,
                np.empty(narrow, np.uint16),
                np.empty(wide, np.float32),
            )

        team.run(threads, attend, counters)

    def _keep(self, elements: int, dtype: torch.dtype) -> Tensor:
        """Returns memory that is valid until this thread's next call. It is reused, because mapping fresh memory of this size each
        time costs more than filling it.
        """
        kept: Tensor | None = getattr(self._kept, "gathered", None)
        if kept is None or kept.dtype != dtype or kept.numel() < elements:
            kept = self._kept.gathered = torch.empty(elements, dtype=dtype)
        return kept[:elements]

    def _gather(self, pages: _Pages, prefill: Prefill) -> Tensor:
        """Returns keys and values of a prefill's blocks, `[2, kv_heads, tokens, head_dim]`, valid until this thread's next call."""
        shape = (2, pages.kv_heads, (prefill.block_end - prefill.block_begin) * pages.block_tokens, pages.head_dim)
        gathered = self._keep(math.prod(shape), pages.dtype)
        cpu_pages.gather(
            pages.flat,
            pages.tables[prefill.sequence],
            prefill.block_begin,
            prefill.block_end,
            pages.block_stride,
            pages.layer_at,
            pages.kv_heads,
            pages.run,
            gathered.view(ELEMENTS[pages.dtype]).numpy(),
        )
        return gathered.view(shape)


class _Pages:
    """One layer of a pool in the form that the kernels take."""

    def __init__(self, pool: Tensor, block_tables: Tensor, layer: int) -> None:
        _, _, _, self.kv_heads, self.block_tokens, self.head_dim = pool.shape
        self.dtype = pool.dtype
        self.block_stride = pool.stride(0)
        self.run = self.block_tokens * self.head_dim
        self.layer_at = layer * 2 * self.kv_heads * self.run
        self.flat = cpu_pages.elements(pool)
        self.tables = block_tables.contiguous().numpy()


class _Scores:
    """How products become weights in one call, in the form that the kernels take: in base 2."""

    def __init__(self, scale: float, soft_cap: float | None, sinks: Tensor | None) -> None:
        self.scale, self.soft_cap, self.sinks = scale, soft_cap, sinks
        self.factor = scale * math.log2(math.e) if soft_cap is None else scale / soft_cap
        self.cap = None if soft_cap is None else np.float32(soft_cap * math.log2(math.e))
        self.flat_sinks = None if sinks is None else sinks.detach().numpy()


def _attend_gathered(query: Tensor, keys_values: Tensor, first_key: int, visible: Tensor, scores: _Scores) -> tuple[Tensor, Tensor]:
    """Attends from the rows of one sequence to gathered keys from `first_key` on: returns `out` `[rows, q_heads, head_dim]`, lse
    `[rows, q_heads]`.
    """
    blind = visible[:, 1] == 0
    if bool(blind.all()):
        out, lse = torch.zeros_like(query), torch.full(query.shape[:2], -torch.inf)
    else:
        first, last = int(visible[~blind, 0].min()), int(visible[:, 1].max())
        keys, values = keys_values[:, :, first - first_key : last - first_key]
        if scores.soft_cap is None:
            dtype = torch.promote_types(query.dtype, keys.dtype)
            mask = _mask(visible, first, last, dtype)
            out, lse = _flash(query.to(dtype), keys.to(dtype), values.to(dtype), mask, scores.scale)
        else:
            mask = _mask(visible, first, last, torch.float32)
            out, lse = _capped(query.float(), keys, values, mask, scores.factor, scores.soft_cap)
        # A row with no visible key has an arbitrary lse, and its out may be NaN.
        out, lse = out.masked_fill(blind[:, None, None], 0.0), lse.masked_fill(blind[:, None], -torch.inf)
    if scores.sinks is None:
        return out, lse
    whole = torch.logaddexp(lse, scores.sinks)
    return out.float() * (lse - whole).exp().unsqueeze(-1), whole


def _flash(query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query.transpose(0, 1).unsqueeze(0), keys.unsqueeze(0), values.unsqueeze(0), 0.0, False, attn_mask=mask, scale=scale
    )
    return out[0].transpose(0, 1), lse[0].transpose(0, 1)


def _capped(
    query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, factor: float, soft_cap: float
) -> tuple[Tensor, Tensor]:
    """`_flash` with capped scores, for which torch has no kernel: in fp32, one KV head at a time to bound the memory."""
    grouped = query.reshape(len(query), len(keys), -1, query.shape[2])
    outs, lses = [], []
    for head in range(len(keys)):
        rows = grouped[:, head].transpose(0, 1)
        weights = (rows @ keys[head].float().T).mul_(factor).tanh_().mul_(soft_cap)
        if mask is not None:
            weights += mask
        lse = weights.logsumexp(dim=-1, keepdim=True)
        outs.append(weights.sub_(lse).exp_() @ values[head].float())
        lses.append(lse[..., 0])
    return torch.cat(outs).transpose(0, 1), torch.cat(lses).transpose(0, 1)


def _mask(visible: Tensor, first: int, last: int, dtype: torch.dtype) -> Tensor | None:
    """Returns the additive mask `[rows, last - first]`, 0 where visible, or None if every row sees all of `[first, last)`.

    Visits only those keys that at least one row does not see.
    """
    if bool((visible[:, 0] == first).all() and (visible[:, 1] == last).all()):
        return None
    all_see_from, all_see_to = int(visible[:, 0].max()), int(visible[:, 1].min())
    edges = ((first, all_see_from), (all_see_to, last)) if all_see_from < all_see_to else ((first, last),)
    mask = torch.zeros(len(visible), last - first, dtype=dtype)
    for begin, end in edges:
        keys = torch.arange(begin, end, dtype=torch.int32)
        hidden = (keys < visible[:, :1]) | (keys >= visible[:, 1:])
        mask[:, begin - first : end - first].masked_fill_(hidden, -torch.inf)
    return mask
