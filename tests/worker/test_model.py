"""Finding, converting, loading and naming models."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
import transformers

from attnstore.core.layout import DType
from worker.errors import ModelUnavailable
from worker.model import LoadedModel, export_model, find_model, load_model
from worker.model.conversion import cache_dir, converted_model
from worker.model.source import FolderSource, GgufSource, weights_digest


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


def test_the_cache_is_where_the_environment_says() -> None:
    assert cache_dir({"ATTNSTORE_CACHE_DIR": "/a"}) == Path("/a")
    assert cache_dir({"XDG_CACHE_HOME": "/b"}) == Path("/b/attnstore")
    assert cache_dir({}) == Path.home() / ".cache" / "attnstore"


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
