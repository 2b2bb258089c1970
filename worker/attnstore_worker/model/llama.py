"""Llama's forward pass for packed rows over paged KV memory, with the weights of transformers' module.

Owns: `LlamaDecoder`. Invariant: the logits are those of `TransformersDecoder` on the same module, up to rounding
(tests/worker/model/test_decoder.py). transformers' modules are made for batches, caches and training; with one token per step their
overhead equals the time of reading the weights (docs/decisions/0017-lean-decoder.md).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.nn import functional

from attnstore_worker.model.attention import PagedStep
from attnstore_worker.model.few_rows import FewRows
from attnstore_worker.model.few_rows import fits as few_rows_fit
from attnstore_worker.model.linear import gated_product, merged_linear, pack_linears
from attnstore_worker.model.rows import added_and_normalized, normalized, rotate
from attnstore_worker.model.rows import fits as rows_fit
from attnstore_worker.model.weights import LayerWeights, gather_weights


@dataclass(frozen=True, slots=True)
class _Layer:
    """The modules and weights of one decoder layer."""

    attention_norm: Tensor
    query_key_value: nn.Module
    attention_output: nn.Module
    mlp_norm: Tensor
    gate: nn.Module
    up: nn.Module
    down: nn.Module


class LlamaDecoder:
    """See `Decoder`. Takes over the module and packs its linear layers if possible; the module still runs by itself."""

    capturable: Final = False

    def __init__(self, module: Any) -> None:
        config = module.config
        weights = gather_weights(module)
        merged = [_merged(weights, index, layer.self_attn) for index, layer in enumerate(module.model.layers)]
        head = module.lm_head.weight.detach()
        biased = any(linear.bias is not None for linear in module.modules() if isinstance(linear, nn.Linear))
        pack_linears(module)
        self._embedding = module.model.embed_tokens.weight
        self._rotary = module.model.rotary_emb
        self._norm = module.model.norm.weight
        self._head = module.lm_head
        self._epsilon = config.rms_norm_eps
        self._heads = (config.num_attention_heads, config.num_key_value_heads)
        self._scale = module.model.layers[0].self_attn.scaling
        self._layers = [_layer(*parts) for parts in zip(module.model.layers, merged, strict=True)]
        self._few_rows = None
        if few_rows_fit(weights.shape, len(head)) and not biased:
            self._few_rows = FewRows(weights, self._norm, head, epsilon=self._epsilon, scale=self._scale)

    def logits(self, token_ids: Tensor, positions: Tensor, rows: Tensor, step: PagedStep) -> Tensor:
        """See `Decoder.logits`."""
        with torch.inference_mode():
            hidden = functional.embedding(token_ids, self._embedding)
            rotation = _rotation(*self._rotary(hidden[:0].float(), positions[None]))  # only for its type: fp32
            if self._few_rows is not None and (plan := self._few_rows.plan(len(hidden), step)) is not None:
                return self._few_rows.logits(hidden, rotation, rows, step, plan)
            # Each layer begins with the norm after the sum with which the previous layer ends.
            normed = normalized(hidden, self._layers[0].attention_norm, self._epsilon)
            for index, layer in enumerate(self._layers[:-1]):
                delta = self._run_layer(index, layer, hidden, normed, rotation, step)
                normed = added_and_normalized(hidden, delta, self._layers[index + 1].attention_norm, self._epsilon)
            last = len(self._layers) - 1
            hidden = hidden + self._run_layer(last, self._layers[last], hidden, normed, rotation, step)
            logits: Tensor = self._head(normalized(hidden[rows], self._norm, self._epsilon))
            return logits.float()

    def _run_layer(
        self, index: int, layer: _Layer, hidden: Tensor, normed: Tensor, rotation: tuple[Tensor, Tensor], step: PagedStep
    ) -> Tensor:
        """Adds the output of attention to `hidden`, in place. Returns the output of the MLP, which is still to be added."""
        q_heads, kv_heads = self._heads
        heads: Tensor = layer.query_key_value(normed).view(len(hidden), q_heads + 2 * kv_heads, -1)
        rotate(heads, q_heads + kv_heads, *rotation)
        keys_values = heads[:, q_heads:].view(len(hidden), 2, kv_heads, -1)
        attended = step.attend(index, heads[:, :q_heads], keys_values, scale=self._scale)
        delta = layer.attention_output(attended.flatten(1))
        result: Tensor = layer.down(
            gated_product(layer.gate, layer.up, added_and_normalized(hidden, delta, layer.mlp_norm, self._epsilon))
        )
        return result


def fits(module: Any) -> bool:
    """Returns whether the weights of a `LlamaForCausalLM` lie where the kernels read them, and its rows have sizes that they
    support.
    """
    return module.device.type == "cpu" and rows_fit(module.config.hidden_size, module.model.layers[0].self_attn.head_dim)


def _merged(weights: LayerWeights, index: int, attention: Any) -> nn.Module:
    return merged_linear(weights.part(index, "query_key_value"), [attention.q_proj, attention.k_proj, attention.v_proj])


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
    """Returns fp32 cosines and sines `[total_q, head_dim / 2]`.

    From transformers' `[1, total_q, head_dim]`, in which both halves of a head have the same angles (RoPE, Su et al. 2021, in the
    order of GPT-NeoX).
    """
    half = cosines.shape[-1] // 2
    return cosines[0, :, :half].contiguous(), sines[0, :, :half].contiguous()
