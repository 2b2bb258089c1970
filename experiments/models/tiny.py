"""Tiny models of every architecture that transformers registers, with random weights from a seed.

Owns: the list of architectures, and their sizes here. Invariant: a model is the same on every machine and at every time; every
field that scales, caps or windows has a value that changes the result, so that ignoring it is detected.
"""

from __future__ import annotations

import dataclasses
import json
import zlib
from pathlib import Path
from typing import Any, Final

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

VOCABULARY: Final = 11
"""A prime; see `agreement.prompt`."""
PARAMETERS_MAX: Final = 1_000_000
"""A larger model has sizes that no field here controls."""
_WEIGHT_SPREAD: Final = 0.2
_VECTOR_SPREAD: Final = 0.1


class NotTiny(Exception):
    """The model does not exist in a tiny size."""


_FIELDS: Final[dict[str, Any]] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "num_local_experts": 4,
    "num_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "intermediate_size_mlp": 96,
    "n_shared_experts": 1,
    "vocab_size_per_layer_input": VOCABULARY,
    "hidden_size_per_layer_input": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "sliding_window": 24,
    "attention_chunk_size": 24,
    "attn_logit_softcapping": 2.0,
    "final_logit_softcapping": 5.0,
    "query_pre_attn_scalar": 9,
    "embedding_multiplier": 1.5,
    "residual_multiplier": 0.7,
    "attention_multiplier": 0.4,
    "logits_scaling": 3.0,
    "logit_scale": 0.25,
}
"""Given to every architecture whose config has the field."""

_PARTICULAR: Final[dict[str, dict[str, Any]]] = {
    "granitemoehybrid": {"mamba_n_heads": 4, "mamba_d_state": 16, "mamba_chunk_size": 16},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "smollm3": {"no_rope_layer_interval": 2},
}
"""Additional fields for single architectures."""


def _rope(architecture: str, kind: str, **parameters: Any) -> tuple[str, dict[str, Any]]:
    return architecture, {"rope_parameters": {"rope_type": kind, "rope_theta": 10_000.0, "factor": 4.0, **parameters}}


_LONG: Final = {"short_factor": [1.0] * 8, "long_factor": [4.0] * 8, "original_max_position_embeddings": 256}
VARIANTS: Final[dict[str, tuple[str, dict[str, Any]]]] = {
    "llama, biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama, tied embeddings": ("llama", {"tie_word_embeddings": True}),
    "llama, dynamic RoPE": _rope("llama", "dynamic"),
    "llama, linear RoPE": _rope("llama", "linear"),
    "llama, RoPE of Llama 3": _rope(
        "llama", "llama3", low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64
    ),
    "llama, YaRN": _rope("llama", "yarn", original_max_position_embeddings=64),
    "llama, one key head": ("llama", {"num_key_value_heads": 1}),
    "gemma3_text, both directions": ("gemma3_text", {"use_bidirectional_attention": True}),
    "ministral3, queries scaled by position": _rope(
        "ministral3", "yarn", original_max_position_embeddings=32, llama_4_scaling_beta=0.5,
        beta_fast=32.0, beta_slow=1.0, mscale=1.0, mscale_all_dim=1.0,
    ),
    "llama, long RoPE": _rope("llama", "longrope", **_LONG),
    "phi3, long RoPE": (
        "phi3", {**_rope("phi3", "longrope", **_LONG)[1], "original_max_position_embeddings": 256},
    ),
    "llama4_text, no temperature": ("llama4_text", {"attn_temperature_tuning": False}),
    "mistral, no window": ("mistral", {"sliding_window": None}),
    "phi, normalised queries and keys": ("phi", {"qk_layernorm": True}),
    "qwen2, windows": ("qwen2", {"use_sliding_window": True, "max_window_layers": 1}),
    "qwen3, windows": ("qwen3", {"use_sliding_window": True, "max_window_layers": 1}),
}  # fmt: skip
"""Configurations of an architecture that compute differently from its default: by name, the architecture and fields."""


def names() -> list[str]:
    """Returns the `model_type` of every causal language model that transformers registers, and the variants."""
    return sorted([*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *VARIANTS])


def tiny_config(name: str) -> Any:
    """Returns the config of an architecture or variant. Raises whatever transformers does if the sizes do not fit."""
    architecture, fields = VARIANTS.get(name, (name, {}))
    kind = CONFIG_MAPPING[architecture]
    known = {field.name for field in dataclasses.fields(kind)} | set(kind.attribute_map)
    chosen = {field: value for field, value in _FIELDS.items() if field in known}
    if "qk_rope_head_dim" in known:  # keys come from a latent vector: each head has its own, and its parts have sizes of their own
        chosen["num_key_value_heads"] = chosen["num_attention_heads"]
        chosen.pop("head_dim", None)
    chosen |= {**_PARTICULAR.get(architecture, {}), **fields}
    config = kind(**chosen)
    # If only every n-th layer attends to all keys, a few layers contain none that does.
    if set(getattr(config, "layer_types", None) or ()) == {"sliding_attention"}:
        config = kind(**chosen, layer_types=["sliding_attention", "full_attention"])
    return config


def write_model(name: str, folder: Path) -> None:
    """Writes the model `name` and a tokenizer to `folder`; the name is the seed of its weights.

    Raises `NotTiny` if the sizes do not fit the architecture, or do not make it tiny.
    """
    try:
        config = tiny_config(name)
        with torch.device("meta"):
            size = sum(weight.numel() for weight in transformers.AutoModelForCausalLM.from_config(config).parameters())
        if size > PARAMETERS_MAX:
            raise NotTiny(f"{size:,} parameters")
        torch.manual_seed(zlib.crc32(name.encode()))
        module = transformers.AutoModelForCausalLM.from_config(config)
    except NotTiny:
        raise
    except Exception as error:  # a config refuses sizes in as many ways as there are configs
        raise NotTiny(f"{type(error).__name__}: {error}") from error
    with torch.no_grad():
        for weight in module.state_dict().values():
            if weight.is_floating_point():
                weight.add_(torch.randn(weight.shape) * (_WEIGHT_SPREAD if weight.ndim > 1 else _VECTOR_SPREAD))
    module.save_pretrained(str(folder))
    _write_tokenizer(folder)


def _write_tokenizer(folder: Path) -> None:
    """Writes a tokenizer with as many words as the models know."""
    tokenizer = Tokenizer(models.WordLevel({f"w{index}": index for index in range(VOCABULARY)}, unk_token="w3"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "w2"}))
