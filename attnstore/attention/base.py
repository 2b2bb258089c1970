"""The contracts of paged attention, and the facts that every backend derives from the arguments of a call.

Owns: `AttentionBackend`, `LatentAttention` and `row_positions`.
Invariant: any subset of a sequence's keys gives a partial `(out, lse)`; partials over a partition of the keys merge to the result
over all keys, exactly up to rounding (see `attnstore.attention.merge`). An attention sink is a key without a value, so it belongs
to one part of the partition.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

FLOAT_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
"""Element types of queries, pools and results. The types of query and pool may differ."""


class AttentionBackend(Protocol):
    """Attention of packed query rows over keys that lie in pages."""

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
        """Attends from every query row to the keys of its own sequence. Causal; prefill and decode rows may be mixed.

        Arguments:
            query: `[total_q, q_heads, head_dim]`, the rows of all sequences packed one after another. `q_heads` is a multiple of
                the pool's `kv_heads`; query head `h` reads key head `h // (q_heads // kv_heads)`.
            pool: `[blocks, layers, 2, kv_heads, block_tokens, head_dim]`, pages as they lie in every tier; each block is
                contiguous, blocks may be any distance apart. Keys are stored rotated (after RoPE).
            block_tables: int32 `[seqs, max_blocks]`; entry `j` of row `s` is the block with keys
                `[j * block_tokens, (j + 1) * block_tokens)` of sequence `s`. Entries past the context are not read.
            context_lens: int32 `[seqs]`, the keys stored for each sequence, the query rows' own tokens included; 0: an empty part.
            query_starts: int32 `[seqs + 1]`, cumulative: sequence `s` owns rows `[query_starts[s], query_starts[s + 1])`.
            layer: which layer of the pages.
            scale: factor on `q . k`, usually `head_dim ** -0.5`.
            sliding_window: a row at position `p` sees only keys in `(p - sliding_window, p]`; None sees all of `[0, p]`.
            query_positions: int32 `[total_q]`, the position of each row in its table's own count of keys, where key `j` of the
                table has position `j`. None means that the rows are the last tokens of their context: row `i` of sequence `s`
                is at `context_lens[s] - query_len[s] + i`. For a partial over the keys `[a, b)` of a sequence pass its rows'
                absolute positions minus `a`: rows past the part see all of it (and the window still holds).
            out_dtype: type of `out`; None means the query's. Ask for fp32 where `out` is a partial that will be merged.
            soft_cap: bounds every score: `s = soft_cap * tanh(scale * q . k / soft_cap)`, before anything is masked; None leaves
                `s = scale * q . k`. Source: Gemma 2.
            sinks: contiguous fp32 `[q_heads]`, one logit for each query head. Each row of head `h` sees one more key, whose score
                is `sinks[h]` (neither scaled nor capped) and whose value is 0, whatever its position and window. Give the sinks
                to exactly one of the partials that will be merged, and None to the others. Source: GPT-OSS.

        Returns:
            `out` `[total_q, q_heads, head_dim]` and `lse` fp32 `[total_q, q_heads]`, the natural logarithm of the sum of `exp(s)`
            over the visible keys and the sink. A row that sees no key has `out = 0`; its `lse` is its sink, without sinks -inf.

        Raises:
            InvalidArgument: a shape, type or range breaks the above (from the checking wrapper that `create_attention` returns;
                a bare backend assumes checked input).
        """
        ...


class LatentAttention(Protocol):
    """Attention of packed query rows over latent rows that lie in pages."""

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
        value_dim: int,
        sliding_window: int | None = None,
        query_positions: Tensor | None = None,
        out_dtype: torch.dtype | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Attends from every query row to the latent rows of its own sequence. Arguments not named here are those of
        `AttentionBackend.paged_attention`, and are not checked.

        Arguments:
            query: `[total_q, q_heads, row_dim]`, absorbed and rotated, in the order of the elements of a latent row.
            pool: `[blocks, layers, block_tokens, row_dim]`; each block is contiguous, blocks may be any distance apart. `row_dim`
                and `value_dim` are as `PageLayout.check_latents` demands. `attnstore.attention.latent.latent_rows` sees a pool of
                pages like this.
            scale: factor on the products; that of the model's own queries, such as `(nope_dim + rope_dim) ** -0.5`.
            value_dim: how many of a row's first elements are its value.

        Returns:
            `out` `[total_q, q_heads, value_dim]` and `lse` fp32 `[total_q, q_heads]`, both contiguous. A row that sees no key has
            `out = 0` and `lse = -inf`.
        """
        ...


def row_positions(context_lens: Tensor, query_starts: Tensor, query_positions: Tensor | None) -> Tensor:
    """Returns the position of every query row, int32 `[total_q]`: `query_positions` if given, else the last tokens of
    each context.
    """
    if query_positions is not None:
        return query_positions
    query_lens = query_starts.diff()
    first = context_lens - query_lens - query_starts[:-1]
    rows = torch.arange(int(query_starts[-1]), dtype=torch.int32, device=query_starts.device)
    return rows + torch.repeat_interleave(first, query_lens)
