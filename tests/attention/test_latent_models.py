"""A seeded random DeepSeek V2 of transformers: its layer's output from latent pages at "nodes", by absorbed queries.

What a worker with such a model does is here: it absorbs the projection of the keys into the query and applies that of the values to
the merged partial.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers.models.deepseek_v2 import modeling_deepseek_v2 as deepseek

from attnstore.attention import merge
from attnstore.attention.base import LatentAttention
from attnstore.attention.latent import CpuLatentAttention
from attnstore.attention.reference import ReferenceLatentAttention

BLOCK_TOKENS = 16
TOKENS = 117


def model(seed: int, *, q_lora_rank: int | None, rank: int, rope_dim: int, heads: int) -> Any:
    torch.manual_seed(seed)
    config = transformers.DeepseekV2Config(
        hidden_size=96,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        head_dim=rope_dim,
        kv_lora_rank=rank,
        q_lora_rank=q_lora_rank,
        qk_nope_head_dim=24,
        qk_rope_head_dim=rope_dim,
        v_head_dim=20,
        attn_implementation="eager",
    )
    layer = deepseek.DeepseekV2Attention(config, 0).eval()
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return layer, deepseek.DeepseekV2RotaryEmbedding(config)


def latents_and_query(layer: Any, hidden: Tensor, frequencies: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the latent rows `[tokens, rank + rope_dim]`, rotated, and the absorbed queries `[tokens, heads, rank + rope_dim]`."""
    rank, nope = layer.kv_lora_rank, layer.qk_nope_head_dim
    compressed = layer.kv_a_proj_with_mqa(hidden)
    latent, rotary_key = layer.kv_a_layernorm(compressed[..., :rank]), compressed[..., rank:].unsqueeze(1)
    query = layer.q_proj(hidden) if layer.q_lora_rank is None else layer.q_b_proj(layer.q_a_layernorm(layer.q_a_proj(hidden)))
    query = query.unflatten(-1, (layer.num_heads, -1)).transpose(1, 2)
    rotary_query, rotary_key = deepseek.apply_rotary_emb(query[..., nope:], rotary_key, frequencies)
    keys_up = layer.kv_b_proj.weight.view(layer.num_heads, -1, rank)[:, :nope]
    absorbed = torch.einsum("bhtn,hnr->bthr", query[..., :nope], keys_up)
    return (
        torch.cat((latent, rotary_key[:, 0]), dim=-1)[0],
        torch.cat((absorbed, rotary_query.transpose(1, 2)), dim=-1)[0],
    )


def projected(layer: Any, out: Tensor) -> Tensor:
    """Returns the layer's output of merged partials `[rows, heads, rank]`."""
    values_up = layer.kv_b_proj.weight.view(layer.num_heads, -1, layer.kv_lora_rank)[:, layer.qk_nope_head_dim :]
    output: Tensor = layer.o_proj(torch.einsum("thr,hvr->thv", out, values_up).flatten(1))
    return output


def partial(attention: LatentAttention, layer: Any, query: Tensor, rows: Tensor, begin: int) -> tuple[Tensor, Tensor]:
    """Attends from the last tokens' queries to latent rows from position `begin` on, in pages of one layer."""
    blocks = -(-len(rows) // BLOCK_TOKENS)
    pool = torch.zeros(blocks * BLOCK_TOKENS, rows.shape[1])
    pool[: len(rows)] = rows
    return attention.paged_attention(
        query,
        pool.view(blocks, 1, BLOCK_TOKENS, -1),
        torch.arange(blocks, dtype=torch.int32).unsqueeze(0),
        torch.tensor([len(rows)], dtype=torch.int32),
        torch.tensor([0, len(query)], dtype=torch.int32),
        layer=0,
        scale=layer.scaling,
        value_dim=layer.kv_lora_rank,
        query_positions=torch.arange(TOKENS - len(query), TOKENS, dtype=torch.int32) - begin,
    )


@pytest.mark.parametrize("attention", [CpuLatentAttention(), ReferenceLatentAttention()], ids=["cpu", "reference"])
@pytest.mark.parametrize("rows", [1, 4, TOKENS])
@pytest.mark.parametrize(
    "dims",
    [
        {"q_lora_rank": None, "rank": 512, "rope_dim": 64, "heads": 16},
        {"q_lora_rank": 32, "rank": 32, "rope_dim": 32, "heads": 3},
    ],
    ids=["rows of DeepSeek V2 Lite", "small, compressed queries"],
)
def test_partials_over_latent_pages_give_the_layers_own_output(dims: dict[str, Any], rows: int, attention: LatentAttention) -> None:
    layer, rotary = model(rows, **dims)
    with torch.inference_mode():
        hidden = torch.randn(1, TOKENS, 96)
        frequencies = rotary(hidden, torch.arange(TOKENS).unsqueeze(0))
        mask = torch.full((TOKENS, TOKENS), -torch.inf).triu(1)[None, None]
        want, _ = layer(hidden, attention_mask=mask, position_embeddings=frequencies)
        latents, queries = latents_and_query(layer, hidden, frequencies)
        query = queries[-rows:]
        parts = [partial(attention, layer, query, latents[begin:end], begin) for begin, end in ((0, 48), (48, 80), (80, TOKENS))]
        out, _ = merge(*zip(*parts, strict=True))
        got = projected(layer, out)
    torch.testing.assert_close(got, want[0, -rows:], rtol=0, atol=2e-5 * float(want.abs().max()))
