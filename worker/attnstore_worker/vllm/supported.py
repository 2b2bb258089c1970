"""The configurations of vLLM, and the requests, that the connector serves.

Owns: the options that are refused, and why. Invariant: a setting that changes the bytes of a block, or the process that holds them,
is part of a page's name (`identity`) or is refused at start. A vLLM that lacks one of the fields is refused: the list is that of
0.32.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Final

from attnstore.errors import InvalidArgument
from attnstore_worker.vllm.identity import SHARED_HASH_ALGORITHMS
from attnstore_worker.vllm.page_groups import layer_specs

_SPLIT: Final = "the tokens of a block lie on several ranks"
SERVED: Final[Mapping[str, tuple[str, tuple[Any, ...], str]]] = MappingProxyType(
    {
        "parallel_config.pipeline_parallel_size": ("--pipeline-parallel-size", (1,), "a page holds all layers"),
        "parallel_config.prefill_context_parallel_size": ("--prefill-context-parallel-size", (1,), _SPLIT),
        "parallel_config.decode_context_parallel_size": ("--decode-context-parallel-size", (1,), _SPLIT),
        "cache_config.prefix_caching_hash_algo": (
            "--prefix-caching-hash-algo",
            SHARED_HASH_ALGORITHMS,
            "processes that share pages need equal hashes",
        ),
        "cache_config.cache_dtype": (
            "--kv-cache-dtype",
            ("auto", "float16", "bfloat16", "fp8", "fp8_e4m3", "fp8_e5m2"),
            "the scales of other quantized caches differ by token or block",
        ),
        "attention_config.use_non_causal": (
            "use_non_causal of --attention-config",
            (False,),
            "the KV of a token depends on tokens after it",
        ),
        "model_config.runner_type": ("--runner", ("generate",), "pages are those of models that generate"),
        "model_config.is_diffusion": ("a diffusion model", (False,), "the KV of a block changes while its tokens do"),
        "model_config.code_revision": ("--code-revision", (None,), "other code computes other KV"),
        "model_config.model_class_overrides": ("--model-class-overrides", ({},), "other code computes other KV"),
        "speculative_config.method": (
            "method of --speculative-config",
            (None, "ngram", "ngram_gpu", "suffix"),
            "a draft model's layers would be part of a page",
        ),
        "aux_output_config.enable_return_routed_experts": (
            "--enable-return-routed-experts",
            (False,),
            "tokens that are loaded have none",
        ),
        "additional_config": ("--additional-config", ({},), "what a platform's plugin does with it is not known"),
        "weight_transfer_config": ("--weight-transfer-config", (None,), "pages of weights that were replaced would be hits"),
        "kv_transfer_config.kv_role": (
            '"kv_role" of --kv-transfer-config',
            ("kv_both",),
            "an engine loads what it saved, and vLLM orders its writes before loads only then",
        ),
        "kv_transfer_config.kv_load_failure_policy": (
            '"kv_load_failure_policy" of --kv-transfer-config',
            ("recompute",),
            "a page that is lost is a miss",
        ),
        "kv_transfer_config.enable_permute_local_kv": (
            '"enable_permute_local_kv" of --kv-transfer-config',
            (False,),
            "blocks are kept as they lie",
        ),
    }
)
"""For each field: the option's name, the served values, and why others are refused. A field of a part that is None is None."""

_WEIGHTS_OF_THE_MODEL: Final = frozenset(
    {"auto", "hf", "safetensors", "pt", "npcache", "mistral", "gguf", "bitsandbytes", "fastsafetensors", "instanttensor"}
)
"""Load formats that read the files from which the weights' name is derived. `dummy`, for example, reads none."""

_ATTENTION: Final[Mapping[str, tuple[Any, ...]]] = MappingProxyType(
    {
        "kv_quant_mode": (0, 1),  # NONE, FP8_PER_TENSOR
        "tokens_per_state": (1,),
        "state_content_bytes": (None,),
    }
)
_FULL: Final[Mapping[str, tuple[Any, ...]]] = MappingProxyType({**_ATTENTION, "non_causal": (False,)})
_SPECS: Final[Mapping[str, Mapping[str, tuple[Any, ...]]]] = MappingProxyType(
    {
        "FullAttentionSpec": _FULL,
        "MLAAttentionSpec": {**_FULL, "model_version": (None,), "cache_role": ("sparse",), "is_index_group_leader": (False,)},
        "SlidingWindowSpec": _ATTENTION,
        # In mode `align`, which --enable-prefix-caching chooses, steps end where a block does, so its state has a name.
        "MambaSpec": {"mamba_cache_mode": ("align",), "num_speculative_blocks": (0,), "num_prefill_checkpoint_blocks": (0,)},
    }
)
"""The served kinds of vLLM's cache, and for each field of their specification the values with which a block is K and V of its
tokens, their latents, or the state after them, and nothing else.
"""
_GROUP: Final[Mapping[str, tuple[Any, ...]]] = MappingProxyType({"host_resident": (False,), "enable_kv_transfer": (True,)})


def check_supported(vllm_config: Any, kv_cache_config: Any, *, weights_are_named: bool) -> None:
    """Raises `InvalidArgument` that names every option with a value that is not served.

    `weights_are_named`: the user has set a name of the weights, so none is derived from their files.
    """
    refused = [
        f"{option} is {value}, and only {' or '.join(map(str, served))} is served: {reason}"
        for path, (option, served, reason) in SERVED.items()
        if (value := _field(vllm_config, path)) not in served
    ]
    load_format = str(_field(vllm_config, "load_config.load_format"))
    if load_format not in _WEIGHTS_OF_THE_MODEL and not weights_are_named:
        refused.append(f"--load-format {load_format} takes weights from elsewhere than the model's files: name them with model_id")
    if getattr(vllm_config.cache_config, "calculate_kv_scales", False):  # not in 0.32
        refused.append("--calculate-kv-scales is True: the scales of an engine depend on its first request")
    refused += _refused_cache(kv_cache_config)
    if refused:
        raise InvalidArgument("; ".join(refused))


def continues_prefixes(vllm_config: Any) -> bool:
    """Whether vLLM computes the rest of a prompt whose first tokens were loaded. On a CPU its MLA ignores loaded tokens when it
    computes several at once, and vLLM turns off chunked prefill and prefix caching for this reason.
    """
    chunks = _field(vllm_config, "scheduler_config.enable_chunked_prefill")
    return chunks or _field(vllm_config, "cache_config.enable_prefix_caching") or not _field(vllm_config, "model_config.use_mla")


def is_served(request: Any) -> bool:
    """Whether vLLM's hashes name the KV of a request in every process. They do not for an adapter, because they contain its path
    and not its content, nor for images and other inputs, which the caller may name.
    """
    return not request.lora_request and not request.mm_features


def _field(config: Any, path: str) -> Any:
    try:
        for name in path.split("."):
            config = config if config is None else getattr(config, name)
    except AttributeError:
        raise InvalidArgument(f"this vLLM has no {path}: the connector is written against 0.32") from None
    return config


def _refused_cache(kv_cache_config: Any) -> list[str]:
    _field(kv_cache_config, "kv_tp_replicas")  # says which ranks hold the same
    hashed = _field(kv_cache_config, "hash_block_size")
    refused: list[str] = []
    for group in kv_cache_config.kv_cache_groups:
        refused += _not_served(group, _GROUP, "KV cache group")
        if _field(group, "is_eagle_group"):
            refused.append("layers of a draft model are in the KV cache, and would be part of a page")
        for spec in {type(spec).__name__: spec for spec in layer_specs(group).values()}.values():
            kind = type(spec).__name__
            if kind in _SPECS:  # of others a block is not K and V, or not of every token
                refused += _not_served(spec, _SPECS[kind], "KV cache")
            else:
                refused.append(f"the model's KV cache is a {kind}, and only {' or '.join(_SPECS)} is served")
        block_tokens = _field(group, "kv_cache_spec.block_size")
        if hashed is not None and block_tokens % hashed:
            refused.append(f"vLLM hashes {hashed} tokens at once, which does not divide a block of {block_tokens}")
    return list(dict.fromkeys(refused))


def _not_served(spec: Any, served: Mapping[str, tuple[Any, ...]], what: str) -> list[str]:
    return [
        f"{name} of the model's {what} is {getattr(value, 'name', value)}, and only {' or '.join(map(str, values))} is served"
        for name, values in served.items()
        if (value := _field(spec, name)) not in values
    ]
