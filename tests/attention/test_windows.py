"""Windowed partials: pages of a window at "nodes" and the rest here merge to a seeded random Mistral's own output."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers.models.mistral import modeling_mistral as mistral

from attnstore.attention import AttentionBackend, create_attention, merge
from attnstore.attention.windows import seeing_from
from attnstore.core.windows import first_keys
from tests.attention.cases import assert_close, paged

BLOCK_TOKENS = 16
TOKENS, REMOTE_PAGES = 150, 8


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("rows", [1, 5, 120])
def test_a_row_sees_its_table_from_its_first_key_on(backend: Any, rows: int) -> None:
    torch.manual_seed(rows)
    keys, values = torch.randn(2, 2, 100, 64)
    query = torch.randn(rows, 4, 64)
    firsts = torch.randint(0, 110, (rows,), dtype=torch.int32)
    firsts[0] = 0
    positions, window = seeing_from(firsts)
    out, lse = create_attention(backend).paged_attention(
        query, *paged(keys, values, rows), layer=0, scale=0.125, query_positions=positions, sliding_window=window
    )
    scores = torch.einsum("rhd,hkd->rhk", query, keys.repeat_interleave(2, 0)) * 0.125
    scores = scores.masked_fill((torch.arange(100) < firsts.unsqueeze(1)).unsqueeze(1), -torch.inf)
    weights = scores.softmax(-1).nan_to_num(0.0)
    assert_close((out, lse), (torch.einsum("rhk,hkd->rhd", weights, values.repeat_interleave(2, 0)), scores.logsumexp(-1)))


def layer_and_inputs(window: int) -> tuple[Any, Tensor, Any]:
    torch.manual_seed(window)
    config = transformers.MistralConfig(
        hidden_size=96,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        sliding_window=window,
        attn_implementation="eager",
    )
    layer = mistral.MistralAttention(config, 0).eval()
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    hidden = torch.randn(1, TOKENS, 96)
    return layer, hidden, mistral.MistralRotaryEmbedding(config)(hidden, torch.arange(TOKENS).unsqueeze(0))


def attended(
    backend: AttentionBackend, layer: Any, query: Tensor, keys_values: Tensor, positions: Tensor, window: int
) -> tuple[Tensor, Tensor]:
    return backend.paged_attention(
        query,
        *paged(*keys_values, len(query)),
        layer=0,
        scale=layer.scaling,
        query_positions=positions,
        sliding_window=window,
    )


@pytest.mark.parametrize("rows", [1, 6, TOKENS - REMOTE_PAGES * BLOCK_TOKENS])
@pytest.mark.parametrize("window", [1, 17, 40, 100, 1000])
@pytest.mark.parametrize("sets", [[range(8)], [[0, 1, 5], [2, 3, 4, 6, 7]], [[0, 2, 4, 6], [1, 3, 5, 7]]], ids=str)
def test_the_pages_of_a_window_at_nodes_and_the_rest_here_give_the_layers_own_output(
    sets: list[list[int]], window: int, rows: int
) -> None:
    """A node knows the first key of each row, and neither its position nor the window; sets that no row sees are not asked."""
    layer, hidden, (cos, sin) = layer_and_inputs(window)
    backend = create_attention("cpu")
    with torch.inference_mode():
        ahead = torch.arange(TOKENS).unsqueeze(1) - torch.arange(TOKENS)
        mask = torch.zeros(TOKENS, TOKENS).masked_fill((ahead < 0) | (ahead >= window), -torch.inf)[None, None]
        want, _ = layer(hidden, (cos, sin), mask)
        query, keys, values = (
            each(hidden).unflatten(-1, (-1, 64)).transpose(1, 2) for each in (layer.q_proj, layer.k_proj, layer.v_proj)
        )
        query, keys = mistral.apply_rotary_pos_emb(query, keys, cos, sin)
        rows_query, keys_values = query[0, :, -rows:].transpose(0, 1), torch.stack((keys[0], values[0]))
        positions = range(TOKENS - rows, TOKENS)
        here = REMOTE_PAGES * BLOCK_TOKENS
        parts = [attended(backend, layer, rows_query, keys_values[:, :, here:], torch.tensor(positions).int() - here, window)]
        for pages in sets:
            firsts = first_keys(pages, BLOCK_TOKENS, positions, window)
            if min(firsts) == len(pages) * BLOCK_TOKENS:
                continue
            of_set = torch.cat([keys_values[:, :, page * BLOCK_TOKENS : (page + 1) * BLOCK_TOKENS] for page in pages], dim=2)
            parts.append(attended(backend, layer, rows_query, of_set, *seeing_from(torch.tensor(firsts, dtype=torch.int32))))
        assert len(parts) == 1 + sum(window > TOKENS - rows + 1 - BLOCK_TOKENS * (max(pages) + 1) for pages in sets)
        out, _ = merge(*zip(*parts, strict=True))
        got = layer.o_proj(out.flatten(1))
    torch.testing.assert_close(got, want[0, -rows:], rtol=0, atol=2e-5 * float(want.abs().max()))
