"""Finding, converting, loading and naming models."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from attnstore.core.layout import DType
from attnstore_worker.cli import main
from attnstore_worker.errors import ModelUnavailable
from attnstore_worker.model import LoadedModel, export_model, find_model, load_model
from attnstore_worker.model.conversion import converted_model
from attnstore_worker.model_source import FolderSource, GgufSource, weights_digest


def test_the_default_model_is_the_one_in_the_package(model: LoadedModel) -> None:
    assert isinstance(find_model(), GgufSource)
    assert model.name.startswith("SmolLM2-135M-Instruct")
    assert model.layout(16).page_bytes == 30 * 2 * 3 * 16 * 64 * 4
    assert model.context_tokens_max == 8192
    assert model.tokenizer("Hello world").input_ids == [19556, 905]


def test_a_truncated_gguf_file_is_a_clear_error_and_leaves_nothing(tmp_path: Path) -> None:
    whole = find_model().path
    truncated = tmp_path / "model.gguf"
    with whole.open("rb") as file:
        truncated.write_bytes(file.read(8 << 20))
    with pytest.raises(ModelUnavailable, match=r"model\.gguf is not a complete GGUF model"):
        load_model(truncated, cache=tmp_path / "cache")
    assert list((tmp_path / "cache" / "models").iterdir()) == []


@pytest.mark.parametrize("content", [b"", b"GGUF", b"no model at all"])
def test_a_file_that_is_no_model_is_a_clear_error(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "model.gguf"
    file.write_bytes(content)
    with pytest.raises(ModelUnavailable, match=r"model\.gguf"):
        load_model(file, cache=tmp_path / "cache")


def test_a_missing_model_is_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises(ModelUnavailable, match="no such file"):
        find_model(tmp_path / "absent")
    with pytest.raises(ModelUnavailable, match="neither"):
        find_model(tmp_path)


def test_a_cache_that_cannot_be_written_says_which_variable_moves_it(tmp_path: Path) -> None:
    (tmp_path / "models").write_text("a file where the folder should be")
    source = find_model()
    assert isinstance(source, GgufSource)
    with pytest.raises(ModelUnavailable, match="ATTNSTORE_CACHE_DIR"):
        converted_model(source, b"d" * 32, tmp_path)


def test_a_folder_with_damaged_weights_is_a_clear_error(tiny_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "damaged"
    shutil.copytree(tiny_folder, folder)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    with pytest.raises(ModelUnavailable, match="damaged"):
        load_model(folder)
    weights.unlink()
    with pytest.raises(ModelUnavailable, match="no weights"):
        load_model(folder)


EXTRA = "model.layers.0.self_attn.sinks"


@pytest.mark.parametrize(
    ("fields", "extra", "told"),
    [
        ({"num_hidden_layers": 3}, False, r"model.layers.2.\S+, model.layers.2.\S+, model.layers.2.\S+ and 6 more are missing"),
        ({"num_hidden_layers": 1}, False, r"model.layers.1.\S+, model.layers.1.\S+, model.layers.1.\S+ and 6 more are unexpected"),
        ({}, True, f"{EXTRA} is unexpected"),
        ({"intermediate_size": 192}, False, r"model.layers.0.mlp.\S+, .* and 3 more are of another shape"),
        ({"attention_bias": True}, False, r"model.layers.0.self_attn.k_proj.bias, .* are missing"),
    ],
)
def test_weights_that_do_not_fit_the_config_are_one_line_and_status_2(
    tiny_folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], fields: dict[str, object], extra: bool, told: str
) -> None:
    folder = tmp_path / "misfit"
    shutil.copytree(tiny_folder, folder)
    config = transformers.AutoConfig.from_pretrained(str(folder))
    config.update(fields)
    config.save_pretrained(str(folder))
    if extra:
        weights = load_file(folder / "model.safetensors")
        save_file({**weights, EXTRA: torch.zeros(4)}, folder / "model.safetensors", {"format": "pt"})
    prompt = tmp_path / "prompt.txt"
    prompt.write_text("one prompt")
    capfd.readouterr()
    assert main(["generate", "--prompt-file", str(prompt), "--model", str(folder)]) == 2
    written = capfd.readouterr().err.strip()
    assert re.fullmatch(rf"attnstore-worker: the weights in \S+/misfit do not fit its config: {told}", written), written


def test_tied_weights_and_buffers_of_old_checkpoints_are_no_errors(tiny_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "old"
    shutil.copytree(tiny_folder, folder)
    config = transformers.AutoConfig.from_pretrained(str(folder))
    config.update({"tie_word_embeddings": True})
    config.save_pretrained(str(folder))
    weights = load_file(folder / "model.safetensors")
    weights.pop("lm_head.weight", None)
    old = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(16)}
    save_file({**weights, **old}, folder / "model.safetensors", {"format": "pt"})
    module = load_model(folder).module
    assert module.lm_head.weight.data_ptr() == module.model.embed_tokens.weight.data_ptr()


def test_the_model_is_exported_as_a_folder_that_loads_to_the_same_weights(model: LoadedModel, tmp_path: Path) -> None:
    export_model(None, tmp_path / "exported")
    exported = transformers.AutoModelForCausalLM.from_pretrained(str(tmp_path / "exported"))
    expected = model.module.state_dict()
    assert {name for name, weight in exported.state_dict().items() if not torch.equal(weight, expected[name])} == set()
    with pytest.raises(ModelUnavailable, match="File exists"):
        export_model(None, tmp_path / "exported")
    with pytest.raises(ModelUnavailable, match="already"):
        export_model(tmp_path / "exported", tmp_path / "again")


def test_a_model_of_another_kind_is_refused(tmp_path: Path) -> None:
    config = transformers.GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=64)
    transformers.GPT2LMHeadModel(config).save_pretrained(str(tmp_path))
    with pytest.raises(ModelUnavailable):
        load_model(tmp_path)


def test_the_fingerprint_follows_weights_config_and_dtype(tiny_folder: Path, tiny: LoadedModel, tmp_path: Path) -> None:
    assert load_model(tiny_folder).fingerprint == tiny.fingerprint
    assert load_model(tiny_folder, DType.BF16).fingerprint != tiny.fingerprint
    rotated = tmp_path / "rotated"
    shutil.copytree(tiny_folder, rotated)
    config = transformers.AutoConfig.from_pretrained(str(rotated))
    config.rope_parameters = {"rope_type": "default", "rope_theta": 5000.0}
    config.save_pretrained(str(rotated))
    assert load_model(rotated).fingerprint != tiny.fingerprint
    renamed = tmp_path / "another-name"
    shutil.copytree(tiny_folder, renamed)
    assert load_model(renamed).fingerprint == tiny.fingerprint
    torch.manual_seed(8)
    transformers.LlamaForCausalLM(config).save_pretrained(str(renamed))
    assert weights_digest(FolderSource(renamed)) != weights_digest(FolderSource(tiny_folder))
