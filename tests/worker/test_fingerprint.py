"""Which configurations have the same fingerprint."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import transformers
from transformers import LlamaConfig

from attnstore_worker.fingerprint import BOOKKEEPING_FIELDS, config_fields, fingerprint
from attnstore_worker.model import LoadedModel, load_model


class LaterConfig(LlamaConfig):
    """Llama's config as in a later version of transformers: with a new optional field."""

    novel: bool | None = False


class OtherwiseConfig(LlamaConfig):
    """The same field, with a default that changes the computation."""

    novel: bool | None = True


def name(config: Any) -> bytes:
    return fingerprint(config=config_fields(config))


def with_config(folder: Path, target: Path, **fields: Any) -> Path:
    """Returns a copy of a model's folder with some fields of its config.json replaced."""
    shutil.copytree(folder, target)
    file = target / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))
    return target


def test_a_moved_folder_and_an_upgrade_keep_the_fingerprint(tiny_folder: Path, tiny: LoadedModel, tmp_path: Path) -> None:
    moved = with_config(
        tiny_folder, tmp_path / "moved", transformers_version="4.0.0", _name_or_path="org/model", torch_dtype="bfloat16"
    )
    assert load_model(moved).fingerprint == tiny.fingerprint


@pytest.mark.parametrize(
    "fields", [{"rms_norm_eps": 1e-3}, {"embedding_multiplier": 2.0}, {"num_experts_per_tok": 1}, {"never_heard_of": {"a": [1]}}]
)
def test_any_other_field_changes_the_fingerprint(
    fields: dict[str, Any], tiny_folder: Path, tiny: LoadedModel, tmp_path: Path
) -> None:
    assert load_model(with_config(tiny_folder, tmp_path / "changed", **fields)).fingerprint != tiny.fingerprint


def test_a_field_that_is_left_out_is_one_that_has_the_default() -> None:
    assert name(LlamaConfig()) == name(LlamaConfig(rms_norm_eps=1e-6, attention_bias=False, rope_scaling=None))


def test_a_new_field_that_changes_nothing_keeps_the_fingerprint() -> None:
    assert name(LaterConfig()) == name(LlamaConfig())
    assert name(LaterConfig(novel=True)) != name(LlamaConfig())


def test_a_default_that_changes_does_not_name_two_things_alike() -> None:
    assert name(OtherwiseConfig()) != name(LlamaConfig())
    assert name(OtherwiseConfig(novel=False)) != name(OtherwiseConfig())


def test_fields_of_nested_configs_count_unless_they_are_bookkeeping() -> None:
    def nested(**text: Any) -> bytes:
        return name(transformers.Gemma3Config(text_config=text))

    assert nested(rms_norm_eps=1e-3) != nested()
    assert nested(use_cache=False) == nested()


def test_numbers_and_keys_have_one_spelling() -> None:
    assert fingerprint(a={1: 2.0}, b=(3,)) == fingerprint(b=[3], a={"1": 2})
    assert len({fingerprint(a=value) for value in (1, True, 1.5, "1", None, [1])}) == 6


def test_every_field_that_is_left_out_has_a_reason() -> None:
    assert all(BOOKKEEPING_FIELDS.values())
