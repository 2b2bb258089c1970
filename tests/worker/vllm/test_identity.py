"""Which pages vLLM processes may share."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import transformers

from attnstore.errors import InvalidArgument
from attnstore_worker.vllm.identity import kv_settings, page_hashes, page_layout, vllm_namespace
from attnstore_worker.vllm.settings import Settings

LAYOUT = page_layout(layers=30, layer_block_bytes=98_304, kv_heads=3, block_tokens=128, tp_rank=0, tp_size=2)
SETTINGS = {"model": "m", "dtype": "bfloat16", "config": {"rope_theta": 100_000}}


def test_a_page_has_the_bytes_of_all_layers() -> None:
    assert LAYOUT.page_bytes == 30 * 98_304


def test_a_block_that_heads_and_tokens_do_not_share_equally_is_refused() -> None:
    with pytest.raises(InvalidArgument, match="K and V"):
        page_layout(layers=1, layer_block_bytes=100, kv_heads=3, block_tokens=16, tp_rank=0, tp_size=1)


def test_settings_salt_and_rank_each_separate() -> None:
    other_rank = page_layout(layers=30, layer_block_bytes=98_304, kv_heads=3, block_tokens=128, tp_rank=1, tp_size=2)
    spaces = {
        vllm_namespace(LAYOUT, SETTINGS, tenant_salt=""),
        vllm_namespace(LAYOUT, SETTINGS, tenant_salt="alice"),
        vllm_namespace(LAYOUT, {**SETTINGS, "dtype": "float32"}, tenant_salt=""),
        vllm_namespace(LAYOUT, {**SETTINGS, "config": {"rope_theta": 10_000}}, tenant_salt=""),
        vllm_namespace(other_rank, SETTINGS, tenant_salt=""),
    }
    assert len(spaces) == 5
    assert vllm_namespace(LAYOUT, dict(reversed(SETTINGS.items())), tenant_salt="") in spaces, "order is no difference"


def test_a_pages_name_depends_on_all_blocks_before_it() -> None:
    root = vllm_namespace(LAYOUT, SETTINGS, tenant_salt="")
    first, second = b"a" * 32, b"b" * 32
    assert page_hashes(root, [first, second])[0] == page_hashes(root, [first])[0]
    assert page_hashes(root, [second, second])[1] != page_hashes(root, [first, second])[1]


def space_of(
    model: str, revision: str | None = None, *, model_id: str | None = None, tokens_max: int = 4_096, **fields: Any
) -> bytes:
    """Returns the namespace of a vLLM that was started with `--model` and `--revision`."""
    config = transformers.LlamaConfig(hidden_size=64, num_attention_heads=4, num_hidden_layers=30, **fields)
    config.name_or_path = model
    vllm_config = SimpleNamespace(
        model_config=SimpleNamespace(
            model=model,
            revision=revision,
            hf_config=config,
            dtype="torch.bfloat16",
            quantization=None,
            quantization_config=None,
            max_model_len=tokens_max,
        ),
        cache_config=SimpleNamespace(cache_dtype="auto", prefix_caching_hash_algo="sha256"),
    )
    kv_cache_config = SimpleNamespace(kv_cache_layout="LBHNC", kv_cache_groups=[SimpleNamespace(kv_cache_spec="spec")])
    return vllm_namespace(LAYOUT, kv_settings(vllm_config, kv_cache_config, model_id=model_id), tenant_salt="")


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    """A folder with weights."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(b"1" * 100)
    return folder


def snapshot(hub: Path, commit: str, *, branch: str = "main") -> Path:
    """Creates what a hub's client leaves in its cache after loading a commit of `org/model`."""
    repository = hub / "models--org--model"
    folder = repository / "snapshots" / commit
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (repository / "refs").mkdir(exist_ok=True)
    (repository / "refs" / branch).write_text(commit)
    return folder


def test_weights_are_told_apart_by_their_bytes(weights: Path) -> None:
    before = space_of(str(weights))
    assert space_of(str(weights)) == before
    (weights / "model.safetensors").write_bytes(b"1" * 99 + b"2")
    assert space_of(str(weights)) != before


def test_engines_that_serve_other_lengths_share_nothing(weights: Path) -> None:
    assert space_of(str(weights), tokens_max=8_192) != space_of(str(weights), tokens_max=4_096), "long-rope's factors depend on it"


def test_a_moved_folder_and_an_upgrade_keep_their_pages(weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = space_of(str(weights))
    assert space_of(f"{weights}/") == before, "a slash at the end is no difference"
    monkeypatch.chdir(weights.parent)
    assert space_of("model") == before
    weights.rename(weights.with_name("moved"))
    assert space_of(str(weights.with_name("moved"))) == before
    monkeypatch.setattr("transformers.configuration_utils.__version__", "6.0.0")
    assert space_of(str(weights.with_name("moved"))) == before


def test_any_other_field_of_the_configuration_separates(weights: Path) -> None:
    fields: list[dict[str, Any]] = [
        {}, {"rms_norm_eps": 1e-5}, {"never_heard_of": 1}, {"rope_parameters": {"rope_type": "default", "rope_theta": 5000.0}},
        {"quantization_config": {"quant_method": "fp8"}},
    ]  # fmt: skip
    assert len({space_of(str(weights), **each) for each in fields}) == len(fields)


def test_commits_of_one_name_on_a_hub_share_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    first, second = "1" * 40, "2" * 40
    folder = snapshot(tmp_path, first)
    before = space_of("org/model")
    assert space_of("org/model", first) == before, "a commit by its hash is the one that a branch names"
    assert space_of(str(folder)) == space_of(f"{folder}/") == before, "so is the folder in which it lies"
    snapshot(tmp_path, second)
    assert space_of("org/model") == space_of("org/model", second) != before


def test_a_name_whose_commit_is_unknown_needs_a_model_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    for model in ("org/model", "s3://bucket/model", "org/model/file.gguf"):
        with pytest.raises(InvalidArgument, match="model_id"):
            space_of(model)
    assert space_of("org/model", model_id="mine") == space_of("s3://bucket/model", model_id="mine")


def test_a_wrong_option_is_named() -> None:
    with pytest.raises(InvalidArgument, match="load_ms_max"):
        Settings.parse({"store": "grpc://a:1", "load_ms_max": 0})
    with pytest.raises(InvalidArgument, match="stroe"):
        Settings.parse({"stroe": "grpc://a:1"})


@pytest.mark.parametrize("option", ["load_ms_max", "lookup_ms_max"])
@pytest.mark.parametrize("value", [0, -1, float("inf"), float("nan")])
def test_no_wait_is_without_an_end(option: str, value: float) -> None:
    with pytest.raises(InvalidArgument, match=option):
        Settings.parse({"store": "grpc://a:1", option: value})


def test_the_token_is_that_of_the_environment_unless_one_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ATTNSTORE_TOKEN", raising=False)
    assert Settings.parse({"store": "grpc://node:7400"}).token is None
    monkeypatch.setenv("ATTNSTORE_TOKEN", "from-the-environment")
    assert Settings.parse({"store": "grpc://node:7400"}).token == "from-the-environment"
    assert Settings.parse({"store": "grpc://node:7400", "token": "given"}).token == "given"


def test_the_tenants_salt_is_that_of_the_environment_unless_one_is_given_and_is_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ATTNSTORE_TENANT_SALT", raising=False)
    assert Settings.parse({"store": "grpc://node:7400"}).tenant_salt == ""
    monkeypatch.setenv("ATTNSTORE_TENANT_SALT", "pepper")
    from_environment = Settings.parse({"store": "grpc://node:7400"})
    assert from_environment.tenant_salt == "pepper"
    assert "pepper" not in repr(from_environment)
    assert Settings.parse({"store": "grpc://node:7400", "tenant_salt": "given"}).tenant_salt == "given"
