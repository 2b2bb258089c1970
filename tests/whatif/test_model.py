"""A model's geometry comes from its configuration, and the shipped models agree with their authors' publications."""

from __future__ import annotations

import json
import tomllib
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest

from attnstore.errors import InvalidArgument
from attnstore.whatif.model import Model, load_model, model_names

_SHIPPED: dict[str, dict[str, Any]] = tomllib.loads(files("attnstore.whatif").joinpath("models.toml").read_text())
_DENSE = {
    "num_hidden_layers": 2,
    "hidden_size": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 16,
    "vocab_size": 32,
}


@pytest.mark.parametrize("name", model_names())
def test_a_shipped_models_weights_add_up_to_its_published_size(name: str) -> None:
    assert load_model(name).parameters == pytest.approx(_SHIPPED[name]["parameters"], rel=0.006)


@pytest.mark.parametrize(
    ("name", "token_bytes"), [("smollm2-135m", 23_040), ("llama-3-8b", 131_072), ("llama-2-70b", 327_680), ("qwen3-32b", 262_144)]
)
def test_kv_of_a_token_is_what_the_layout_says(name: str, token_bytes: int) -> None:
    assert load_model(name).layout(16).page_bytes == 16 * token_bytes


def test_operations_of_a_small_model_counted_by_hand() -> None:
    model = Model.from_config("tiny", _DENSE)
    weights = 2 * (8 * 8 + 2 * 8 * 4 + 8 * 8 + 3 * 8 * 16)  # q, k and v, o, MLP, in two layers
    pairs = 1 + 2 + 3
    assert model.prefill_flop(0, 3) == 2 * weights * 3 + 2 * 4 * 4 * 2 * pairs + 2 * 32 * 8
    assert model.prefill_flop(3, 3) == 0


def test_computing_in_two_parts_costs_one_more_output_head() -> None:
    model = load_model("llama-3-8b")
    head = 2 * model.vocabulary * model.hidden
    assert model.prefill_flop(0, 500) + model.prefill_flop(500, 900) - head == pytest.approx(model.prefill_flop(0, 900))


def test_a_mixture_of_experts_computes_with_those_that_serve_a_token() -> None:
    mixture = load_model("mixtral-8x7b")
    assert mixture.active_weights < 0.3 * mixture.parameters
    assert mixture.layout().page_bytes == load_model("mistral-7b").layout().page_bytes


def test_a_head_size_of_its_own_and_missing_kv_heads_are_understood() -> None:
    assert load_model("llama-3.2-1b").head_dim == 64
    plain = {name: value for name, value in _DENSE.items() if name != "num_key_value_heads"}
    assert Model.from_config("plain", plain).kv_heads == 4


def test_anyones_configuration_file_works(tmp_path: Path) -> None:
    directory = tmp_path / "my-llama"
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(_SHIPPED["llama-3-8b"] | {"model_type": "llama", "rope_theta": 5e5}))
    mine = load_model(str(directory / "config.json"))
    assert (mine.name, mine.parameters) == ("my-llama", load_model("llama-3-8b").parameters)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"hidden_size": None}, "hidden_size is None"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0"),
        ({"vocab_size": "many"}, "vocab_size is 'many'"),
        ({"kv_lora_rank": 512}, "latent attention"),
        ({"linear_num_key_heads": 16}, "linear attention"),
    ],
)
def test_a_configuration_that_cannot_be_counted_is_refused(change: dict[str, object], words: str) -> None:
    with pytest.raises(InvalidArgument, match=words):
        Model.from_config("odd", _DENSE | change)


@pytest.mark.parametrize(("content", "words"), [("{", "not valid JSON"), ("[1]", "no JSON object"), (None, "cannot be read")])
def test_a_file_that_is_no_configuration_is_refused(tmp_path: Path, content: str | None, words: str) -> None:
    path = tmp_path / "config.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(InvalidArgument, match=words):
        load_model(str(path))


def test_an_unknown_model_is_refused_with_the_known_ones() -> None:
    with pytest.raises(InvalidArgument, match="llama-3-70b"):
        load_model("llama-9")
