"""Llama's forward pass on a device that uses Triton, with the weights of transformers' module in the device's memory.

Owns: `DeviceLlamaDecoder`. Invariants: the logits are those of `TransformersDecoder` on the same module, up to rounding; nothing is
read back from the device and every shape follows from the arguments' shapes, so a CUDA graph may capture a step.

Matrix products are torch's; between two of them there is one kernel of `triton_rows`. Query, key and value are one product, as are
gate and up.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from attnstore_worker.model.attention import PagedStep
from attnstore_worker.model.context import context_tokens_max
from attnstore_worker.model.triton_rows import gated, normalized, rotated_and_put
from attnstore_worker.model.weights import share_weight

_ANGLE_POSITIONS: Final = 1 << 14
"""Positions whose angles are computed at once, which bounds the memory for it."""


class _Linear(NamedTuple):
    """Arguments of `functional.linear`."""

    weight: Tensor
    bias: Tensor | None

    def __call__(self, rows: Tensor) -> Tensor:
        return functional.linear(rows, self.weight, self.bias)


@dataclass(frozen=True, slots=True)
class _Layer:
    attention_norm: Tensor
    query_key_value: _Linear
    attention_output: _Linear
    mlp_norm: Tensor
    gate_up: _Linear
    down: _Linear


class DeviceLlamaDecoder:
    """See `Decoder`. Takes over transformers' `LlamaForCausalLM`, whose weights are on the device already, and which still runs by
    itself.
    """

    capturable: Final = True

    def __init__(self, module: Any) -> None:
        config = module.config
        self._embedding = module.model.embed_tokens.weight.detach()
        self._rotation = rotation_table(module.model.rotary_emb, context_tokens_max(config), self._embedding.device)
        self._layers = [_layer(layer) for layer in module.model.layers]
        self._norm = module.model.norm.weight.detach()
        self._head = _linear(module.lm_head)
        self._epsilon = float(config.rms_norm_eps)
        self._head_dim = int(module.model.layers[0].self_attn.head_dim)
        self._scale = float(module.model.layers[0].self_attn.scaling)

    def logits(self, token_ids: Tensor, positions: Tensor, rows: Tensor, step: PagedStep) -> Tensor:
        """See `Decoder.logits`. All tensors are on the device of the step."""
        with torch.inference_mode():
            hidden = functional.embedding(token_ids, self._embedding)
            delta: Tensor | None = None
            # Each layer begins with the norm after the sum with which the previous layer ends.
            for index, layer in enumerate(self._layers):
                normed = normalized(hidden, layer.attention_norm, self._epsilon, delta)
                delta = self._run_layer(index, layer, hidden, normed, positions, step)
            assert delta is not None
            if len(rows) == 0:
                return torch.empty(0, len(self._head.weight), dtype=torch.float32, device=hidden.device)
            wanted, change = hidden.index_select(0, rows), delta.index_select(0, rows)
            return self._head(normalized(wanted, self._norm, self._epsilon, change)).float()

    def _run_layer(self, index: int, layer: _Layer, hidden: Tensor, normed: Tensor, positions: Tensor, step: PagedStep) -> Tensor:
        """Adds the output of attention to `hidden`, in place. Returns the output of the MLP, which is still to be added."""
        heads = layer.query_key_value(normed).view(len(hidden), -1, self._head_dim)
        step.before_layer(index)
        slots = (step.slot_blocks, step.slot_offsets)
        query = rotated_and_put(heads, self._rotation, positions, slots, step.pool, index)
        attended = step.attend_stored(index, query, scale=self._scale)
        delta = layer.attention_output(attended.flatten(1))
        return layer.down(gated(layer.gate_up(normalized(hidden, layer.mlp_norm, self._epsilon, delta))))


def rotation_table(rotary: Any, positions: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Returns fp32 cosines and sines `[positions, head_dim / 2]` of transformers' rotary embedding, scaled as it scales them.

    Both halves of a head have the same angles (RoPE, Su et al. 2021, in the order of GPT-NeoX).
    """
    like = torch.empty(0, dtype=torch.float32, device=device)  # only for its type and place
    cosines, sines = [], []
    with torch.inference_mode():
        for begin in range(0, positions, _ANGLE_POSITIONS):
            places = torch.arange(begin, min(begin + _ANGLE_POSITIONS, positions), device=device)
            cosine, sine = rotary(like, places[None])
            half = cosine.shape[-1] // 2
            cosines.append(cosine[0, :, :half])
            sines.append(sine[0, :, :half])
        return torch.cat(cosines), torch.cat(sines)


def _layer(layer: Any) -> _Layer:
    attention, mlp = layer.self_attn, layer.mlp
    return _Layer(
        attention_norm=layer.input_layernorm.weight.detach(),
        query_key_value=_merged([attention.q_proj, attention.k_proj, attention.v_proj]),
        attention_output=_linear(attention.o_proj),
        mlp_norm=layer.post_attention_layernorm.weight.detach(),
        gate_up=_merged([mlp.gate_proj, mlp.up_proj]),
        down=_linear(mlp.down_proj),
    )


def _linear(linear: nn.Linear) -> _Linear:
    return _Linear(linear.weight.detach(), None if linear.bias is None else linear.bias.detach())


def _merged(linears: Sequence[nn.Linear]) -> _Linear:
    """Returns one product with the outputs of several side by side. Its weight is the only copy of theirs."""
    first = linears[0].weight
    weight = torch.empty(sum(len(linear.weight) for linear in linears), first.shape[1], dtype=first.dtype, device=first.device)
    share_weight(weight, linears)
    biases = [linear.bias.detach() for linear in linears if linear.bias is not None]
    assert len(biases) in (0, len(linears))
    return _Linear(weight, torch.cat(biases) if biases else None)
