"""A model's geometry: the bytes of KV per token, and the operations to compute a token.

Owns: `Model`, read from the fields of a Hugging Face `config.json`: those shipped in `models.toml`, or a user's file.
Invariant: a configuration whose KV is not one K and one V vector per head is refused, never guessed.
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

from attnstore.core.layout import DType, PageLayout
from attnstore.errors import InvalidArgument
from attnstore.limits import SETTINGS_CHARS_MAX
from attnstore.option_types import file_to_read, read_text
from attnstore.secrecy import shown

_COUNT_MAX = (1 << 31) - 1
_OTHER_KV = {
    "kv_lora_rank": "multi-head latent attention keeps one compressed vector for all heads",
    "linear_num_key_heads": "linear attention keeps a state of fixed size",
    "ssm_state_size": "state space layers keep a state of fixed size",
}


@dataclass(frozen=True, slots=True)
class Model:
    """A decoder-only transformer with grouped-query attention and a gated MLP, dense or a mixture of experts.

    `experts` is 1 for a dense MLP; `experts_active` of them serve each token. Sliding windows are not modelled: each token attends
    to all before it.
    """

    name: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocabulary: int
    tied_embeddings: bool
    experts: int = 1
    experts_active: int = 1

    @classmethod
    def from_config(cls, name: str, config: Mapping[str, Any]) -> Model:
        """Reads the fields of a `config.json`. Raises `InvalidArgument` if one is missing or the model is of another kind."""
        text_config = config.get("text_config")
        config = text_config if isinstance(text_config, dict) else config
        for field, reason in _OTHER_KV.items():
            if config.get(field):
                raise InvalidArgument(f"model {name!r} has {field}: {reason}, which this calculator does not know")
        heads = _count(name, config, "num_attention_heads")
        hidden = _count(name, config, "hidden_size")
        experts_field = next((field for field in ("num_local_experts", "num_experts") if config.get(field)), None)
        experts = _count(name, config, experts_field) if experts_field else 1
        return cls(
            name=name,
            layers=_count(name, config, "num_hidden_layers"),
            hidden=hidden,
            heads=heads,
            kv_heads=_count(name, config, "num_key_value_heads") if config.get("num_key_value_heads") else heads,
            head_dim=_count(name, config, "head_dim") if config.get("head_dim") else hidden // heads,
            intermediate=_count(
                name, config, "moe_intermediate_size" if config.get("moe_intermediate_size") else "intermediate_size"
            ),
            vocabulary=_count(name, config, "vocab_size"),
            tied_embeddings=bool(config.get("tie_word_embeddings", False)),
            experts=experts,
            experts_active=_count(name, config, "num_experts_per_tok") if experts > 1 else 1,
        )

    def layout(self, block_tokens: int = 16) -> PageLayout:
        """Returns the page of this model with 16-bit elements."""
        return PageLayout(self.layers, self.kv_heads, self.head_dim, block_tokens, DType.BF16)

    @property
    def parameters(self) -> int:
        """The weights in matrices; norms and biases, a few parts in ten thousand, are left out."""
        embeddings = self.vocabulary * self.hidden * (1 if self.tied_embeddings else 2)
        return embeddings + self.layers * self._layer_weights(self.experts)

    @property
    def active_weights(self) -> int:
        """The weights used for one token: its layers with its experts, and the output head."""
        return self.layers * self._layer_weights(self.experts_active) + self.vocabulary * self.hidden

    def prefill_flop(self, begin: int, end: int) -> float:
        """Returns the operations to compute tokens `[begin, end)` after those before them.

        Two per weight and token (multiply, add), the output head once. For attention, four per dimension of each head and per pair
        of a token and a token that it sees (scores, and weighted sums). Kaplan et al., "Scaling Laws for Neural Language Models",
        2020, table 1, with causal attention counted exactly.
        """
        tokens = end - begin
        if tokens <= 0:
            return 0.0
        pairs = (end * (end + 1) - begin * (begin + 1)) / 2
        weights = 2.0 * self.layers * self._layer_weights(self.experts_active) * tokens
        attention = 4.0 * self.layers * self.heads * self.head_dim * pairs
        return weights + attention + 2.0 * self.vocabulary * self.hidden

    def _layer_weights(self, experts: int) -> int:
        attention = 2 * self.hidden * self.head_dim * (self.heads + self.kv_heads)
        router = self.hidden * self.experts if self.experts > 1 else 0
        return attention + router + 3 * self.hidden * self.intermediate * experts


def model_names() -> list[str]:
    """Returns the names of the shipped models."""
    return list(_shipped())


def load_model(name_or_path: str) -> Model:
    """Returns the shipped model of that name, or the one whose `config.json` is at that path. Raises `InvalidArgument`."""
    shipped = _shipped()
    if name_or_path.lower() in shipped:
        return Model.from_config(name_or_path.lower(), shipped[name_or_path.lower()])
    if not name_or_path.endswith(".json"):
        raise InvalidArgument(
            f"model {shown(name_or_path)} is unknown; give the path of a config.json or one of {', '.join(shipped)}"
        )
    path = file_to_read(name_or_path)
    text = read_text(path, SETTINGS_CHARS_MAX)
    try:
        config = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InvalidArgument(f"model {name_or_path} is not valid JSON: {error}") from None
    if not isinstance(config, dict):
        raise InvalidArgument(f"model {name_or_path} is no JSON object")
    return Model.from_config(path.parent.name or path.stem, config)


def _shipped() -> dict[str, dict[str, Any]]:
    return tomllib.loads(files("attnstore.whatif").joinpath("models.toml").read_text())


def _count(name: str, config: Mapping[str, Any], field: str) -> int:
    value = config.get(field)
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= _COUNT_MAX:
        raise InvalidArgument(f"model {name!r}: {field} is {value!r:.100} where a number from 1 to {_COUNT_MAX} is needed")
    return value
