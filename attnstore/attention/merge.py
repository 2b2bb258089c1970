"""The merge of partial attention results, which allows a tier to answer a query instead of handing over its pages.

Owns: `merge`. Invariant: merging partials over any partition of the keys gives the result over all keys, up to rounding.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from attnstore.errors import InvalidArgument


def merge(outs: Sequence[Tensor], lses: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Combines partials over disjoint sets of keys: `lse = log sum exp(lse_i)`, `out = sum exp(lse_i - lse) out_i`.

    `outs[i]` is `[rows, heads, head_dim]` (any float type), `lses[i]` fp32 `[rows, heads]`, natural logarithm. An empty part has
    `lse = -inf`, and its `out` is ignored. Computed in fp32; `out` has the type of `outs[0]`. Raises `InvalidArgument` if the
    shapes of the parts differ or there is no part. Source: the split softmax of FlashDecoding and the LSE merge of FlashInfer's
    cascade attention.
    """
    if not outs or len(outs) != len(lses):
        raise InvalidArgument(f"merge got {len(outs)} outs and {len(lses)} lses; it needs the same number of both, at least one")
    for out, lse in zip(outs, lses, strict=True):
        if out.shape != outs[0].shape or lse.shape != out.shape[:-1] or lse.dtype != torch.float32:
            raise InvalidArgument(
                f"a partial has out {tuple(out.shape)} and {lse.dtype} lse {tuple(lse.shape)}; "
                f"all outs must have shape {tuple(outs[0].shape)} and lses be float32 of the same shape without head_dim"
            )
    parts_lse = torch.stack(tuple(lses))
    highest = parts_lse.amax(dim=0)
    # If every part is empty the maximum is -inf, and -inf - -inf would be NaN.
    anchor = highest.masked_fill(highest == -torch.inf, 0.0)
    weights = (parts_lse - anchor).exp_()
    total = weights.sum(dim=0)
    share = (weights / total.clamp_min(torch.finfo(torch.float32).tiny)).unsqueeze(-1)
    parts_out = torch.stack([out.float() for out in outs]).masked_fill((parts_lse == -torch.inf).unsqueeze(-1), 0.0)
    return (parts_out * share).sum(dim=0).to(outs[0].dtype), anchor + total.log()
