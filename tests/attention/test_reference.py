"""The reference against the formulas of the models' authors, with contiguous keys."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from attnstore.attention import create_attention
from tests.attention.cases import paged

REFERENCE = create_attention("reference")
KEYS, KV_HEADS, HEAD_DIM = 50, 2, 64
SCALE = HEAD_DIM**-0.5


def dense(query: Tensor, keys: Tensor, values: Tensor, window: int | None, soft_cap: float | None, sinks: Tensor | None) -> Tensor:
    """Eager attention of the last tokens: `query` `[heads, rows, dim]`, keys and values `[kv_heads, keys, dim]`.

    Gemma 2 caps the scores, adds the mask, takes the softmax. GPT-OSS appends the sinks to the masked scores as one more column,
    takes the softmax and drops the column.
    """
    heads, rows, _ = query.shape
    group = heads // len(keys)
    keys, values = keys.repeat_interleave(group, 0), values.repeat_interleave(group, 0)
    scores = query @ keys.transpose(1, 2) * SCALE
    if soft_cap is not None:
        scores = torch.tanh(scores / soft_cap) * soft_cap
    seen = torch.ones(rows, keys.shape[1], dtype=torch.bool).tril(keys.shape[1] - rows)
    if window is not None:
        seen &= torch.ones_like(seen).triu(keys.shape[1] - rows - window + 1)
    scores = scores + torch.zeros(seen.shape).masked_fill(~seen, -torch.inf)
    if sinks is not None:
        scores = torch.cat([scores, sinks.view(-1, 1, 1).expand(-1, rows, 1)], dim=-1)
    weights = scores.softmax(dim=-1)[..., : keys.shape[1]]
    return weights @ values


@pytest.mark.parametrize("group", [1, 4])
@pytest.mark.parametrize("rows", [1, 9, KEYS])
@pytest.mark.parametrize("window", [None, 1, 5, 33, KEYS + 1])
def test_scores_are_capped_masked_and_joined_by_the_sink_as_in_the_models(group: int, rows: int, window: int | None) -> None:
    torch.manual_seed(rows)
    heads = KV_HEADS * group
    keys, values = torch.randn(2, KV_HEADS, KEYS, HEAD_DIM)
    query = 4 * torch.randn(heads, rows, HEAD_DIM)
    for soft_cap, sinks in itertools.product((None, 1.5, 50.0), (None, 2 * torch.randn(heads))):
        out, _ = REFERENCE.paged_attention(
            query.transpose(0, 1), *paged(keys, values, rows), sliding_window=window, soft_cap=soft_cap, sinks=sinks,
            layer=0, scale=SCALE,
        )  # fmt: skip
        torch.testing.assert_close(out.transpose(0, 1), dense(query, keys, values, window, soft_cap, sinks), rtol=0, atol=5e-6)


def test_lse_holds_the_capped_scores_and_the_sink() -> None:
    torch.manual_seed(0)
    keys, values = torch.randn(2, KV_HEADS, KEYS, HEAD_DIM)
    query, sinks = 4 * torch.randn(1, KV_HEADS, HEAD_DIM), torch.tensor([3.0, -1.0])
    _, lse = REFERENCE.paged_attention(query, *paged(keys, values, 1), layer=0, scale=SCALE, soft_cap=1.5, sinks=sinks)
    scores = 1.5 * torch.tanh(torch.einsum("rhd,hkd->hk", query, keys) * SCALE / 1.5)
    torch.testing.assert_close(lse[0].exp(), scores.exp().sum(dim=1) + sinks.exp())


def test_a_row_that_sees_no_key_has_its_sink_as_lse() -> None:
    sinks = torch.tensor([3.0, -1.0])
    keys, values = torch.randn(2, KV_HEADS, KEYS, HEAD_DIM)
    before_all = torch.tensor([-1], dtype=torch.int32)
    for tables in (paged(keys, values, 1), paged(keys[:, :0], values[:, :0], 1)):
        query = torch.randn(1, KV_HEADS, HEAD_DIM)
        out, lse = REFERENCE.paged_attention(query, *tables, layer=0, scale=SCALE, sinks=sinks, query_positions=before_all)
        assert not out.any()
        assert torch.equal(lse[0], sinks)
