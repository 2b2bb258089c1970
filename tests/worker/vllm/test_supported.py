"""Refusals of vLLM configurations, by the names of their options. The configurations are made like those of vLLM 0.32."""

from __future__ import annotations

from enum import IntEnum
from types import SimpleNamespace
from typing import Any

import pytest

from attnstore.errors import InvalidArgument
from attnstore_worker.vllm.supported import SERVED, check_supported, continues_prefixes, is_served


class FullAttentionSpec(SimpleNamespace):
    """vLLM's class, with the fields that the connector reads."""


class MLAAttentionSpec(FullAttentionSpec):
    """A subclass in vLLM too."""


KINDS_THAT_ARE_REFUSED = [
    type(name, (FullAttentionSpec,), {})
    for name in (
        "SlidingWindowMLASpec", "CrossAttentionSpec", "EncoderOnlyAttentionSpec", "ChunkedLocalAttentionSpec",
        "SinkFullAttentionSpec", "HiddenStateCacheSpec", "RSWASpec", "CircularBufferSpec",
    )
]  # fmt: skip


class SlidingWindowSpec(FullAttentionSpec):
    """vLLM's class."""


class MambaSpec(SimpleNamespace):
    """vLLM's class."""


class KVQuantMode(IntEnum):
    """vLLM's enumeration, in part."""

    FP8_PER_TENSOR = 1
    FP8_PER_TOKEN_HEAD = 3


def spec_of(kind: type[FullAttentionSpec] = FullAttentionSpec, **fields: Any) -> FullAttentionSpec:
    neutral = {
        "kv_quant_mode": 0,
        "non_causal": False,
        "tokens_per_state": 1,
        "state_content_bytes": None,
        **({"model_version": None, "cache_role": "sparse", "is_index_group_leader": False} if kind is MLAAttentionSpec else {}),
    }
    return kind(**{"block_size": 16, **neutral, **fields})


def state_of(**fields: Any) -> MambaSpec:
    neutral = {"mamba_cache_mode": "align", "num_speculative_blocks": 0, "num_prefill_checkpoint_blocks": 0}
    return MambaSpec(**{"block_size": 16, **neutral, **fields})


def cache_of(*specs: Any, hash_block_size: int | None = 16, draft: bool = False) -> Any:
    groups = [
        SimpleNamespace(
            kv_cache_spec=spec, layer_names=["a", "b"], is_eagle_group=draft, host_resident=False, enable_kv_transfer=True
        )
        for spec in specs or (spec_of(),)
    ]
    return SimpleNamespace(kv_cache_groups=groups, hash_block_size=hash_block_size, kv_tp_replicas=1)


def config_of(**values: Any) -> Any:
    """Returns a served configuration, with other values for the fields at the dotted paths in `values`."""
    config: dict[str, Any] = {"load_config": SimpleNamespace(load_format="auto")}
    for path, (_, served, _) in SERVED.items():
        part, _, field = path.partition(".")
        if field:
            vars(config.setdefault(part, SimpleNamespace()))[field] = values.get(path, served[0])
        else:
            config[part] = values.get(path, served[0])
    return SimpleNamespace(**config)


def check(config: Any, cache: Any = None, *, weights_are_named: bool = False) -> None:
    check_supported(config, cache or cache_of(), weights_are_named=weights_are_named)


def test_what_is_served_passes() -> None:
    check(config_of())
    check(config_of(**{"cache_config.cache_dtype": "bfloat16", "speculative_config.method": "ngram"}))
    without_speculation = config_of()
    without_speculation.speculative_config = None
    check(without_speculation)
    check(config_of(), cache_of(spec_of(sliding_window=128)))
    check(config_of(**{"cache_config.cache_dtype": "fp8"}), cache_of(spec_of(kv_quant_mode=KVQuantMode.FP8_PER_TENSOR)))
    check(config_of(), cache_of(spec_of(MLAAttentionSpec)))
    check(config_of(), cache_of(spec_of(), spec_of(SlidingWindowSpec, page_size_padded=4_096), state_of(), hash_block_size=8))
    of_unequal_layers = SimpleNamespace(block_size=16, kv_cache_specs={"a": spec_of(), "b": spec_of(MLAAttentionSpec)})
    check(config_of(), cache_of(of_unequal_layers))


OTHER_VALUES: dict[str, list[Any]] = {
    "parallel_config.pipeline_parallel_size": [2],
    "parallel_config.prefill_context_parallel_size": [2],
    "parallel_config.decode_context_parallel_size": [2],
    "cache_config.prefix_caching_hash_algo": ["xxhash", "xxhash_cbor"],
    "cache_config.cache_dtype": [
        "fp8_inc",
        "fp8_ds_mla",
        "fp8_per_token_head",
        "int8_per_token_head",
        "nvfp4",
        "turboquant_4bit_nc",
    ],
    "attention_config.use_non_causal": [True],
    "model_config.runner_type": ["pooling"],
    "model_config.is_diffusion": [True],
    "model_config.code_revision": ["main"],
    "model_config.model_class_overrides": [{"A": "b:C"}],
    "speculative_config.method": ["eagle", "eagle3", "draft_model", "deepseek_mtp", "medusa", "custom_class"],
    "aux_output_config.enable_return_routed_experts": [True],
    "additional_config": [{"a_plugins": "own"}],
    "weight_transfer_config": [SimpleNamespace(backend="nccl")],
    "kv_transfer_config.kv_role": ["kv_producer", "kv_consumer"],
    "kv_transfer_config.kv_load_failure_policy": ["fail"],
    "kv_transfer_config.enable_permute_local_kv": [True],
}


def test_every_option_of_the_list_is_tried() -> None:
    assert OTHER_VALUES.keys() == SERVED.keys()


@pytest.mark.parametrize(("path", "value"), [(path, value) for path, values in OTHER_VALUES.items() for value in values])
def test_an_option_that_is_not_served_is_refused_by_its_name(path: str, value: Any) -> None:
    option, _, reason = SERVED[path]
    with pytest.raises(InvalidArgument) as caught:
        check(config_of(**{path: value}))
    assert str(caught.value).startswith(f"{option} is ")
    assert str(caught.value).endswith(reason)


def test_all_that_is_refused_is_told_at_once() -> None:
    config = config_of(**{"parallel_config.decode_context_parallel_size": 2, "cache_config.cache_dtype": "nvfp4"})
    with pytest.raises(InvalidArgument, match=r"--decode-context-parallel-size is 2.*--kv-cache-dtype is nvfp4"):
        check(config)


@pytest.mark.parametrize("load_format", ["dummy", "tensorizer", "runai_streamer", "a_plugins_own"])
def test_weights_that_are_not_the_models_files_need_a_name(load_format: str) -> None:
    config = config_of()
    config.load_config.load_format = load_format
    with pytest.raises(InvalidArgument, match=f"--load-format {load_format}.*model_id"):
        check(config)
    check(config, weights_are_named=True)


@pytest.mark.parametrize(
    ("cache", "named"),
    [
        (cache_of(spec_of(), state_of(mamba_cache_mode="none")), "mamba_cache_mode .* is none, and only align"),
        (cache_of(spec_of(), state_of(num_speculative_blocks=1)), "num_speculative_blocks"),
        (cache_of(spec_of(), spec_of(SlidingWindowSpec, tokens_per_state=4)), "tokens_per_state"),
        *((cache_of(spec_of(kind)), f"KV cache is a {kind.__name__}") for kind in KINDS_THAT_ARE_REFUSED),
        (cache_of(spec_of(kv_quant_mode=KVQuantMode.FP8_PER_TOKEN_HEAD)), "kv_quant_mode .* is FP8_PER_TOKEN_HEAD"),
        (cache_of(spec_of(MLAAttentionSpec, model_version="deepseek_v4")), "model_version"),
        (cache_of(spec_of(MLAAttentionSpec, cache_role="indexer")), "cache_role"),
        (cache_of(spec_of(MLAAttentionSpec, is_index_group_leader=True)), "is_index_group_leader"),
        (cache_of(spec_of(non_causal=True)), "non_causal"),
        (cache_of(spec_of(tokens_per_state=4)), "tokens_per_state"),
        (cache_of(spec_of(state_content_bytes=64)), "state_content_bytes"),
        (cache_of(draft=True), "draft model"),
        (cache_of(hash_block_size=12), "hashes 12 tokens"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_cache_whose_blocks_are_not_k_and_v_of_their_tokens_is_refused(cache: Any, named: str) -> None:
    with pytest.raises(InvalidArgument, match=named):
        check(config_of(), cache)


@pytest.mark.parametrize(
    ("mla", "chunks", "caches", "continues"),
    [(True, False, False, False), (True, True, False, True), (True, False, True, True), (False, False, False, True)],
)
def test_a_vllm_that_turned_off_chunks_and_prefixes_for_mla_does_not_go_on_after_a_prefix(
    mla: bool, chunks: bool, caches: bool, continues: bool
) -> None:
    config = config_of()
    config.model_config.use_mla = mla
    config.scheduler_config = SimpleNamespace(enable_chunked_prefill=chunks)
    config.cache_config.enable_prefix_caching = caches
    assert continues_prefixes(config) is continues


def test_scales_that_an_engine_computes_are_refused() -> None:
    config = config_of()
    config.cache_config.calculate_kv_scales = True
    with pytest.raises(InvalidArgument, match="--calculate-kv-scales"):
        check(config)
    config.cache_config.calculate_kv_scales = False
    check(config)


def test_a_vllm_that_lacks_a_field_is_refused() -> None:
    config = config_of()
    del config.parallel_config.decode_context_parallel_size
    with pytest.raises(InvalidArgument, match=r"this vLLM has no parallel_config\.decode_context_parallel_size"):
        check(config)
    cache = cache_of()
    del cache.kv_tp_replicas
    with pytest.raises(InvalidArgument, match="this vLLM has no kv_tp_replicas"):
        check(config_of(), cache)


def test_requests_whose_content_vllms_hashes_do_not_name_pass_the_store_by() -> None:
    assert is_served(SimpleNamespace(lora_request=None, mm_features=[]))
    assert not is_served(SimpleNamespace(lora_request=SimpleNamespace(lora_path="/adapter"), mm_features=[]))
    assert not is_served(SimpleNamespace(lora_request=None, mm_features=[SimpleNamespace(identifier="the callers name")]))
