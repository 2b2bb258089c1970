"""The weights of a Llama's layers in one tensor, row by row, which the kernel for few rows reads in place.

Owns: `LayerShape`, `LayerWeights`, `gather_weights`. Invariant: there is no second row-by-row copy of these weights: the module's
own parameters become views of the tensor, and the module still computes the same.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor, nn

from attnstore_worker.device.pages import anonymous_memory


class LayerShape(NamedTuple):
    """The sizes of every layer, in elements."""

    hidden: int
    intermediate: int
    q_heads: int
    kv_heads: int
    head_dim: int

    def parts(self) -> dict[str, tuple[int, ...]]:
        """The weights of a layer in their order in memory, `[out, in]`, norms `[hidden]`."""
        attended = self.q_heads * self.head_dim
        return {
            "attention_norm": (self.hidden,),
            "query_key_value": (attended + 2 * self.kv_heads * self.head_dim, self.hidden),
            "attention_output": (self.hidden, attended),
            "mlp_norm": (self.hidden,),
            "gate": (self.intermediate, self.hidden),
            "up": (self.intermediate, self.hidden),
            "down": (self.hidden, self.intermediate),
        }


class LayerWeights:
    """`flat`: `[layers, elements]`, each layer's weights one after the other in the order of `LayerShape.parts`."""

    def __init__(self, shape: LayerShape, layers: int, dtype: torch.dtype) -> None:
        self.shape = shape
        parts = shape.parts()
        sizes = [math.prod(size) for size in parts.values()]
        elements = layers * sum(sizes)
        memory = anonymous_memory(elements * dtype.itemsize)
        self.flat = torch.frombuffer(memory, dtype=dtype, count=elements).view(layers, -1)
        self._views = [
            {name: part.view(size) for (name, size), part in zip(parts.items(), torch.split(row, sizes), strict=True)}
            for row in self.flat
        ]

    def part(self, layer: int, name: str) -> Tensor:
        """Returns a view of one weight."""
        return self._views[layer][name]


_SPLIT: Final = {"query_key_value": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")}
_MODULES: Final = {
    "attention_norm": "input_layernorm",
    "attention_output": "self_attn.o_proj",
    "mlp_norm": "post_attention_layernorm",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
}


def layer_shape(module: Any) -> LayerShape:
    """Returns the shape of the layers of transformers' `LlamaForCausalLM`."""
    config = module.config
    return LayerShape(
        config.hidden_size,
        config.intermediate_size,
        config.num_attention_heads,
        config.num_key_value_heads,
        module.model.layers[0].self_attn.head_dim,
    )


def gather_weights(module: Any) -> LayerWeights:
    """Moves the weights of the layers of transformers' `LlamaForCausalLM` into one tensor."""
    shape = layer_shape(module)
    weights = LayerWeights(shape, len(module.model.layers), module.dtype)
    for index, layer in enumerate(module.model.layers):
        for name in shape.parts():
            owners = [layer.get_submodule(path) for path in _SPLIT.get(name, (_MODULES.get(name, ""),))]
            share_weight(weights.part(index, name), owners)
    return weights


def share_weight(merged: Tensor, owners: Sequence[Any]) -> None:
    """Copies the weights of modules into `merged`, one after the other; they become views of it."""
    for owner, view in zip(owners, torch.split(merged, [len(owner.weight) for owner in owners]), strict=True):
        view.copy_(owner.weight)
        owner.weight = nn.Parameter(view, requires_grad=False)
