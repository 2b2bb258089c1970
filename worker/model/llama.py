"""Llama's forward pass for packed rows over paged KV memory, from the weights of transformers' module.

Owns: `LlamaDecoder`. Invariant: the logits are those of `TransformersDecoder` on the same module, up to rounding
(tests/worker/test_decoder.py). Why: transformers' modules are made for batches, caches and training, and at one token a step they
cost as much as reading the weights (docs/decisions/0017-lean-decoder.md).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import rms_norm
from transformers import LlamaForCausalLM

from worker.model.attention import PagedStep
from worker.model.linear import gated_product, merged_linear, pack_linears


@dataclass(frozen=True, slots=True)
class _Layer:
    """What one decoder layer computes with."""

    attention_norm: Tensor
    query_key_value: nn.Module
    attention_output: nn.Module
    mlp_norm: Tensor
    gate: nn.Module
    up: nn.Module
    down: nn.Module


class LlamaDecoder:
    """See `Decoder`. Takes over the module, whose linear layers are packed where that is possible; it still runs by itself."""

    def __init__(self, module: Any) -> None:
        config = module.config
        merged = [merged_linear(_query_key_value(layer.self_attn)) for layer in module.model.layers]
        pack_linears(module)
        self._embedding = module.model.embed_tokens.weight
        self._rotary = module.model.rotary_emb
        self._norm = module.model.norm.weight
        self._head = module.lm_head
        self._epsilon = config.rms_norm_eps
        self._heads = (config.num_attention_heads, config.num_key_value_heads)
        self._scale = module.model.layers[0].self_attn.scaling
        self._layers = [_layer(*parts) for parts in zip(module.model.layers, merged, strict=True)]

    def logits(self, token_ids: Tensor, positions: Tensor, rows: Tensor, step: PagedStep) -> Tensor:
        """See `Decoder.logits`."""
        with torch.inference_mode():
            hidden = self._embedding[token_ids]
            rotation = _rotation(*self._rotary(hidden, positions[None]))
            for index, layer in enumerate(self._layers):
                hidden = self._run_layer(index, layer, hidden, rotation, step)
            logits: Tensor = self._head(self._normalized(hidden[rows], self._norm))
            return logits.float()

    def _run_layer(self, index: int, layer: _Layer, hidden: Tensor, rotation: tuple[Tensor, Tensor], step: PagedStep) -> Tensor:
        q_heads, kv_heads = self._heads
        heads: Tensor = layer.query_key_value(self._normalized(hidden, layer.attention_norm))
        heads = heads.view(len(hidden), q_heads + 2 * kv_heads, -1)
        turning = heads[:, : q_heads + kv_heads]
        cosines, sines = rotation
        torch.addcmul(turning * cosines, turning.roll(turning.shape[-1] // 2, -1), sines, out=turning)
        keys_values = heads[:, q_heads:].view(len(hidden), 2, kv_heads, -1)
        attended = step.attend(index, heads[:, :q_heads], keys_values, scale=self._scale)
        hidden = hidden + layer.attention_output(attended.flatten(1))
        rows = self._normalized(hidden, layer.mlp_norm)
        result: Tensor = hidden + layer.down(gated_product(layer.gate, layer.up, rows))
        return result

    def _normalized(self, rows: Tensor, weight: Tensor) -> Tensor:
        return rms_norm(rows, weight.shape, weight, self._epsilon)


def is_plain_llama(module: Any) -> bool:
    """`LlamaDecoder` computes what this module does: exactly Llama's, with its usual activation."""
    return type(module) is LlamaForCausalLM and module.config.hidden_act == "silu"


def _query_key_value(attention: Any) -> list[nn.Linear]:
    return [attention.q_proj, attention.k_proj, attention.v_proj]


def _layer(layer: Any, query_key_value: nn.Module) -> _Layer:
    attention, mlp = layer.self_attn, layer.mlp
    return _Layer(
        attention_norm=layer.input_layernorm.weight,
        query_key_value=query_key_value,
        attention_output=attention.o_proj,
        mlp_norm=layer.post_attention_layernorm.weight,
        gate=mlp.gate_proj,
        up=mlp.up_proj,
        down=mlp.down_proj,
    )


def _rotation(cosines: Tensor, sines: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and signed sines `[total_q, 1, head_dim]`: a rotation is then `x * cosines + roll(x, head_dim / 2) * sines`.

    From transformers' `[1, total_q, head_dim]`, in which both halves of a head have the same angles (RoPE, Su et al. 2021, in the
    order of GPT-NeoX).
    """
    signed = sines[0].clone()
    signed[:, : signed.shape[-1] // 2].neg_()
    return cosines[0].unsqueeze(1), signed.unsqueeze(1)
