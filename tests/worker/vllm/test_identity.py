"""Which pages vLLM processes may share."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers

from attnstore.errors import InvalidArgument
from attnstore_worker.errors import ModelUnavailable
from attnstore_worker.vllm import identity
from attnstore_worker.vllm.identity import (
    block_order,
    group_settings,
    kv_settings,
    page_hashes,
    page_layout,
    shard_of,
    vllm_namespace,
)

SETTINGS = {"model": "m", "dtype": "bfloat16", "config": {"rope_theta": 100_000}}
LONG_AFTER = float("inf")


def layout_of(rank: int, tp_size: int, replicas: int = 1) -> Any:
    shard = shard_of(rank, tp_size=tp_size, replicas=replicas)
    return page_layout(layers=30, layer_block_bytes=98_304, kv_heads=3, block_tokens=128, tp_rank=shard.index, tp_size=shard.count)


LAYOUT = layout_of(0, 2)


def test_a_page_has_the_bytes_of_all_layers() -> None:
    assert LAYOUT.page_bytes == 30 * 98_304


def test_a_block_that_heads_and_tokens_do_not_share_equally_is_refused() -> None:
    with pytest.raises(InvalidArgument, match="K and V"):
        page_layout(layers=1, layer_block_bytes=100, kv_heads=3, block_tokens=16, tp_rank=0, tp_size=1)


def test_settings_salt_and_rank_each_separate() -> None:
    spaces = {
        vllm_namespace(LAYOUT, SETTINGS, tenant_salt=""),
        vllm_namespace(LAYOUT, SETTINGS, tenant_salt="alice"),
        vllm_namespace(LAYOUT, {**SETTINGS, "dtype": "float32"}, tenant_salt=""),
        vllm_namespace(LAYOUT, {**SETTINGS, "config": {"rope_theta": 10_000}}, tenant_salt=""),
        vllm_namespace(layout_of(1, 2), SETTINGS, tenant_salt=""),
        vllm_namespace(layout_of(0, 4), SETTINGS, tenant_salt=""),
    }
    assert len(spaces) == 6
    assert vllm_namespace(LAYOUT, dict(reversed(SETTINGS.items())), tenant_salt="") in spaces, "order is no difference"


def test_names_are_those_of_their_version() -> None:
    """A change of these names without another `NAMES_VERSION` would let two versions of the connector read each other's pages."""
    root = vllm_namespace(LAYOUT, SETTINGS, tenant_salt="alice")
    assert (identity.NAMES_VERSION, root.hex(), page_hashes(root, [b"a" * 32, b"b" * 32])[1].hex()) == (
        2,
        "ff75353abbfab284fd42673035d592f9b40fea8b5eea506112e996be48b7a258",
        "019b8133ca9b17bdc74000d4ec04d44400e8a56de25c300f2889ca4fb6d0afea",
    )


def test_connectors_of_two_versions_share_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    root = vllm_namespace(LAYOUT, SETTINGS, tenant_salt="")
    monkeypatch.setattr(identity, "NAMES_VERSION", identity.NAMES_VERSION + 1)
    assert vllm_namespace(LAYOUT, SETTINGS, tenant_salt="") != root


def test_a_pages_name_depends_on_all_blocks_before_it() -> None:
    root = vllm_namespace(LAYOUT, SETTINGS, tenant_salt="")
    first, second = b"a" * 32, b"b" * 32
    assert page_hashes(root, [first, second])[0] == page_hashes(root, [first])[0]
    assert page_hashes(root, [second, second])[1] != page_hashes(root, [first, second])[1]


@pytest.mark.parametrize(("tp_size", "replicas"), [(1, 1), (2, 1), (2, 2), (4, 2), (8, 8), (6, 3)])
def test_each_part_has_one_writer_and_every_rank_reads_its_part(tp_size: int, replicas: int) -> None:
    shards = [shard_of(rank, tp_size=tp_size, replicas=replicas) for rank in range(tp_size)]
    parts = tp_size // replicas
    assert [shard.index for shard in shards if shard.writes] == list(range(parts))
    assert [shard.index for shard in shards] == [rank // replicas for rank in range(tp_size)]
    assert {shard.count for shard in shards} == {parts}


def test_ranks_with_the_same_latents_share_pages_in_engines_of_any_size() -> None:
    spaces = {
        vllm_namespace(layout_of(rank, tp_size, replicas=tp_size), SETTINGS, tenant_salt="")
        for tp_size in (1, 2, 8)
        for rank in range(tp_size)
    }
    assert len(spaces) == 1


@pytest.mark.parametrize("replicas", [0, 3])
def test_ranks_that_cannot_be_divided_are_refused(replicas: int) -> None:
    with pytest.raises(InvalidArgument, match=f"{replicas} ranks"):
        shard_of(0, tp_size=4, replicas=replicas)


@dataclass(frozen=True)
class FullAttentionSpec:
    """vLLM's class, with some of its fields."""

    block_size: int = 128
    kv_quant_mode: int = 0
    dtype: str = "torch.bfloat16"
    sliding_window: int | None = None
    non_causal: bool = False


@dataclass(frozen=True)
class LaterSpec(FullAttentionSpec):
    """The class in a later version."""

    novel: bool = False


LaterSpec.__name__ = "FullAttentionSpec"


@dataclass
class Vllm:
    """What a vLLM was started with, as far as it makes the names of pages."""

    model: str
    revision: str | None = None
    model_id: str | None = None
    tokens_max: int = 4_096
    since_s: float = LONG_AFTER
    load_format: str = "auto"
    ignore_patterns: str = "original/**/*"
    download_dir: str | None = None
    cache_dtype: str = "auto"
    spec: FullAttentionSpec = FullAttentionSpec()
    layout: str = "LBNHC"
    groups: int = 1
    config: dict[str, Any] = field(default_factory=dict)

    @property
    def namespace(self) -> bytes:
        config = transformers.LlamaConfig(hidden_size=64, num_attention_heads=4, num_hidden_layers=30, **self.config)
        config.name_or_path = self.model
        vllm_config = SimpleNamespace(
            model_config=SimpleNamespace(
                model=self.model,
                revision=self.revision,
                hf_config=config,
                dtype="torch.bfloat16",
                quantization=None,
                quantization_config=None,
                max_model_len=self.tokens_max,
            ),
            load_config=SimpleNamespace(
                load_format=self.load_format, ignore_patterns=self.ignore_patterns, download_dir=self.download_dir
            ),
            cache_config=SimpleNamespace(cache_dtype=self.cache_dtype, prefix_caching_hash_algo="sha256"),
        )
        kv_cache_config = SimpleNamespace(kv_cache_layout=self.layout)
        settings = kv_settings(vllm_config, kv_cache_config, model_id=self.model_id, loaded_since_s=self.since_s)
        settings |= group_settings({"layer.0": self.spec, "layer.1": self.spec}, self.groups, 1)
        return vllm_namespace(LAYOUT, settings, tenant_salt="")


def space_of(model: str | Path, revision: str | None = None, **started: Any) -> bytes:
    """Returns the namespace of a vLLM that was started with `--model`, `--revision` and other fields of `Vllm`."""
    return Vllm(str(model), revision, **started).namespace


@pytest.fixture(autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATTNSTORE_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))


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


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The cache of a hub's client, empty."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize("position", [0, 2_000_000, 3_999_999])
def test_weights_are_told_apart_by_each_of_their_bytes(position: int, weights: Path) -> None:
    content = bytearray(4_000_000)
    (weights / "model.safetensors").write_bytes(content)
    before = space_of(weights)
    assert space_of(weights) == before
    content[position] ^= 1
    (weights / "model.safetensors").write_bytes(content)
    assert space_of(weights) != before


def test_a_folders_code_and_quantization_count_and_its_tokenizer_does_not(weights: Path) -> None:
    spaces = {space_of(weights)}
    for name in ("modeling_own.py", "hf_quant_config.json"):
        (weights / name).write_text("{}")
        spaces.add(space_of(weights))
    assert len(spaces) == 3
    (weights / "tokenizer.json").write_text("{}")
    assert space_of(weights) in spaces


def test_a_folder_without_weights_has_no_name(tmp_path: Path) -> None:
    (tmp_path / "weights.of_another_kind").write_bytes(b"1")
    with pytest.raises(InvalidArgument, match=r"has no weights.*model_id"):
        space_of(tmp_path)
    assert space_of(tmp_path, model_id="mine")


def test_weights_that_changed_since_the_start_have_no_name(weights: Path) -> None:
    changed_s = (weights / "model.safetensors").stat().st_ctime
    with pytest.raises(InvalidArgument, match=r"model\.safetensors .* changed while vLLM started"):
        space_of(weights, since_s=changed_s - 10)
    assert space_of(weights, since_s=changed_s + 10) == space_of(weights)


def test_weights_that_cannot_be_read_have_no_name(weights: Path) -> None:
    (weights / "model.safetensors").unlink()
    (weights / "model.safetensors").symlink_to(weights / "gone")
    with pytest.raises(ModelUnavailable, match="cannot be read"):
        space_of(weights)


def test_the_choice_of_files_separates(weights: Path) -> None:
    spaces = {space_of(weights), space_of(weights, load_format="pt"), space_of(weights, ignore_patterns="*.safetensors")}
    assert len(spaces) == 3


def test_a_model_id_stands_for_the_weights_and_for_nothing_else(weights: Path) -> None:
    named = space_of(weights, model_id="mine")
    (weights / "model.safetensors").write_bytes(b"2" * 100)
    assert (
        space_of(weights, model_id="mine") == space_of("s3://bucket/model", load_format="runai_streamer", model_id="mine") == named
    )
    assert len({named, space_of(weights, model_id="other"), space_of(weights, model_id="mine", tokens_max=8_192)}) == 3
    assert space_of(weights, model_id="mine", config={"rms_norm_eps": 1e-5}) != named


def test_engines_that_serve_other_lengths_share_nothing(weights: Path) -> None:
    assert space_of(weights, tokens_max=8_192) != space_of(weights, tokens_max=4_096), "long-rope's factors depend on it"


def test_a_moved_folder_and_an_upgrade_keep_their_pages(weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = space_of(weights)
    assert space_of(f"{weights}/") == before, "a slash at the end is no difference"
    monkeypatch.chdir(weights.parent)
    assert space_of("model") == before
    weights.rename(weights.with_name("moved"))
    assert space_of(weights.with_name("moved")) == before
    monkeypatch.setattr("transformers.configuration_utils.__version__", "6.0.0")
    assert space_of(weights.with_name("moved")) == before


def test_any_other_field_of_the_configuration_separates(weights: Path) -> None:
    fields: list[dict[str, Any]] = [
        {}, {"rms_norm_eps": 1e-5}, {"never_heard_of": 1}, {"rope_parameters": {"rope_type": "default", "rope_theta": 5000.0}},
        {"quantization_config": {"quant_method": "fp8"}},
    ]  # fmt: skip
    assert len({space_of(weights, config=each) for each in fields}) == len(fields)


def test_the_specification_of_the_cache_separates_and_a_new_field_that_is_off_does_not(weights: Path) -> None:
    specs = [FullAttentionSpec(), FullAttentionSpec(sliding_window=128), FullAttentionSpec(kv_quant_mode=1), LaterSpec(novel=True)]
    assert len({space_of(weights, spec=spec) for spec in specs}) == len(specs)
    assert space_of(weights, spec=LaterSpec()) == space_of(weights)


def test_a_layer_of_another_kind_and_a_group_of_its_own_separate() -> None:
    one, other = FullAttentionSpec(), FullAttentionSpec(sliding_window=128)
    told = [
        group_settings({"a": one, "b": one}, 1, 1),
        group_settings({"a": one, "b": other}, 1, 1),
        group_settings({"a": one, "b": one}, 2, 1),
        group_settings({"a": one, "c": one}, 2, 1),
    ]
    assert len({vllm_namespace(LAYOUT, settings, tenant_salt="") for settings in told}) == len(told)


def test_an_order_in_memory_that_pages_do_not_have_is_no_difference(weights: Path) -> None:
    assert space_of(weights, layout="BHLNC") == space_of(weights)
    assert space_of(weights, layout="a later one") != space_of(weights)


def test_a_dtype_that_is_spelled_out_is_no_difference(weights: Path) -> None:
    assert space_of(weights, cache_dtype="bfloat16") == space_of(weights, cache_dtype="auto")


def test_commits_of_one_name_on_a_hub_share_nothing(hub: Path) -> None:
    first, second = "1" * 40, "2" * 40
    folder = snapshot(hub, first)
    before = space_of("org/model")
    assert space_of("org/model", first) == before, "a commit by its hash is the one that a branch names"
    assert space_of(folder) == space_of(f"{folder}/") == before, "so is the folder in which it lies"
    (hub / "link").symlink_to(folder)
    assert space_of(hub / "link") == before
    snapshot(hub, second)
    assert space_of("org/model") == space_of("org/model", second) != before


def test_the_commit_is_that_of_the_folder_to_which_vllm_downloads(hub: Path, tmp_path: Path) -> None:
    snapshot(hub, "1" * 40)
    downloads = tmp_path / "downloads"
    snapshot(downloads, "2" * 40)
    assert space_of("org/model", download_dir=str(downloads)) == space_of(
        downloads / "models--org--model" / "snapshots" / ("2" * 40)
    )


def test_a_name_that_was_updated_since_the_start_has_no_name(hub: Path) -> None:
    snapshot(hub, "1" * 40)
    assert space_of("org/model", since_s=0), "the only commit in the cache is the one that was loaded"
    snapshot(hub, "2" * 40)
    with pytest.raises(InvalidArgument, match="org/model was updated while vLLM started"):
        space_of("org/model", since_s=0)
    assert space_of("org/model", "2" * 40, since_s=0) == space_of("org/model")


def test_a_name_whose_commit_is_unknown_needs_a_model_id(hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for model in ("org/model", "s3://bucket/model", "org/model/file.gguf"):
        with pytest.raises(InvalidArgument, match="model_id"):
            space_of(model)
    assert space_of("org/model", model_id="mine") == space_of("s3://bucket/model", model_id="mine")
    snapshot(hub, "1" * 40)
    monkeypatch.setenv("VLLM_USE_MODELSCOPE", "True")
    with pytest.raises(InvalidArgument, match="model_id"):
        space_of("org/model")


class Layer:
    """An attention layer of vLLM, with the fields that the connector reads."""

    def __init__(self, *scales: float, cache_dtype: str = "fp8", backend: str = "FLASH_ATTN", isa: str | None = None) -> None:
        self.kv_cache_dtype = cache_dtype
        self.isa = isa
        if scales:
            self._k_scale, self._v_scale = map(torch.tensor, scales)
        self._backend = backend

    def get_attn_backend(self) -> Any:
        return SimpleNamespace(get_name=lambda: self._backend)


def order_of(*layers: Layer, platform: str = "") -> str:
    return block_order({str(number): layer for number, layer in enumerate(layers)}, platform)


def test_the_scales_of_every_layer_the_format_and_the_platform_of_a_quantized_cache_separate() -> None:
    orders = {
        order_of(Layer(1.0, 1.0), Layer(1.0, 1.0)),
        order_of(Layer(1.0, 1.0), Layer(1.0, 0.5)),
        order_of(Layer(1.0, 1.0), Layer(0.5, 1.0)),
        order_of(Layer(0.5, 1.0), Layer(1.0, 1.0)),
        order_of(Layer(1.0, 1.0, cache_dtype="fp8_e5m2"), Layer(1.0, 1.0, cache_dtype="fp8_e5m2")),
        order_of(Layer(1.0, 1.0), Layer(1.0, 1.0), platform="fnuz=True"),
    }
    assert len(orders) == 6
    assert order_of(Layer(1.0, 1.0, cache_dtype="fp8_e4m3"), Layer(1.0, 1.0)) in orders, "vLLM's two names of one format"


def test_the_scales_of_a_cache_that_is_not_quantized_are_no_difference() -> None:
    assert order_of(Layer(0.5, 0.5, cache_dtype="auto")) == order_of(Layer(cache_dtype="bfloat16"))


@pytest.mark.parametrize("layer", [Layer(), Layer([1.0, 0.5], [1.0, 0.5])], ids=["none", "one per head"])
def test_a_quantized_cache_without_one_scale_for_k_and_one_for_v_is_refused(layer: Layer) -> None:
    with pytest.raises(InvalidArgument, match="layer 1 has a quantized cache without one scale"):
        order_of(Layer(1.0, 1.0), layer)


def test_the_backends_and_how_a_cpu_packs_keys_separate() -> None:
    layers = [Layer(cache_dtype="auto", backend="CPU_ATTN", isa=isa) for isa in ("amx", "vec")]
    orders = {order_of(layers[0]), order_of(layers[1]), order_of(*layers), order_of(Layer(cache_dtype="auto"))}
    assert len(orders) == 4
    with pytest.raises(InvalidArgument, match="does not report the instructions"):
        order_of(Layer(cache_dtype="auto", backend="CPU_ATTN"))
